"""What the tests with kills rest on: whatever is lost or differs is counted."""

import json
import shutil
from pathlib import Path

import killing
import pytest
import torch
from safetensors.torch import save_file

FILE = "teacher/model.safetensors"


def run_folder(base: Path, losses: list[float], weight: float, clock: float = 1.0) -> Path:
    """A run of some steps, one line each, and a model of two tensors; its stream lies beside it."""
    (base / "teacher").mkdir(parents=True)
    steps = enumerate(losses)
    lines = [json.dumps({"step": step, "loss": loss, "images_per_s": clock * step}) + "\n" for step, loss in steps]
    (base / "metrics.jsonl").write_text("".join(lines))
    save_file({"a": torch.tensor([weight, 2.0]), "b": torch.ones(3)}, base / FILE)
    return base


def test_compare(tmp_path):
    alone = run_folder(tmp_path / "alone", [3.0, 2.0, 1.0], 1.0)
    cases = {
        "same": (run_folder(tmp_path / "same", [3.0, 2.0, 1.0], 1.0, clock=5.0), (0, 0)),
        "a line less": (run_folder(tmp_path / "less", [3.0, 2.0], 1.0), (1, 0)),
        "a line more": (run_folder(tmp_path / "more", [3.0, 2.0, 1.0, 0.5], 1.0), (0, 1)),
        "another loss": (run_folder(tmp_path / "loss", [3.0, 2.0 + 1e-15, 1.0], 1.0), (0, 1)),
        "another bit": (run_folder(tmp_path / "bit", [3.0, 2.0, 1.0], 1.0 + 2**-23), (0, 1)),
    }
    assert {name: killing.compare(out, alone, [FILE]) for name, (out, _) in cases.items()} == {
        name: expected for name, (_, expected) in cases.items()
    }
    twice = cases["same"][0] / "metrics.jsonl"
    twice.write_text(twice.read_text() + twice.read_text().splitlines(keepends=True)[1])
    assert killing.compare(cases["same"][0], alone, [FILE]) == (0, 1), "a step written twice"
    shutil.rmtree(cases["same"][0] / "teacher")
    assert killing.compare(cases["same"][0], alone, [FILE]) == (1, 1)


@pytest.mark.parametrize(
    "lines, expected",
    [
        ([(0, "a"), (1, "b"), (1, "b"), (2, "c")], (0, 0)),
        ([(0, "a"), (2, "c")], (2, 0)),
        ([(0, "a"), (1, "x"), (1, "b"), (2, "c")], (0, 1)),
        ([(0, "a"), (1, "b"), (2, "c"), (3, "d")], (0, 1)),
    ],
    ids=["again", "a step less", "other crops once", "a step more"],
)
def test_compare_streams(lines, expected, tmp_path):
    files = {"alone": [(0, "a"), (1, "b"), (2, "c")], "run": lines}
    for name, steps in files.items():
        told = [{"step": step, "rows": [step, step + 1], "digest": digest} for step, digest in steps]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in told) + '{"step": 4, "ro')
    assert killing.compare_streams(tmp_path / "run", tmp_path / "alone") == expected
