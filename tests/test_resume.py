"""Killed with SIGKILL and started again by the same command, a pretraining gives the same bits as one left alone."""

import os
import signal
import time
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file

from pretrain import checkpoint
from pretrain.backbone import Backbone
from pretrain.checkpoint import CheckpointConfig, Keeper

# 16 steps an epoch of 128 images, 24 in all; a full state every 4.8 steps: after 5, 10, 15, 20 and 24
SETTINGS = ["loader.batch=8", "schedules.epochs=1.5", "checkpoint.every_epochs=0.3", "views.local_count=1"]
BATCH = 8
PATIENCE_S = 120.0


def newest_state(out: Path) -> int:
    """Steps done at the newest complete state; 0 without one."""
    states = checkpoint.states(out / "checkpoints")
    return int(states[-1].name.partition("-")[2]) // BATCH if states else 0


def kill_beyond(command: list[str], out: Path, state: int) -> tuple[int, int]:
    """Start the command and kill its whole process group once a line follows a state of at least `state` steps.

    Returns the steps of the newest state and the number of lines in metrics.jsonl.
    """
    process = small.start(command)
    try:
        for _ in range(int(PATIENCE_S / 0.005)):
            assert process.poll() is None, process.communicate()
            written = newest_state(out)
            if written >= state and len(small.complete_lines(out)) > written + 1:
                break
            time.sleep(0.005)
        else:
            pytest.fail(f"no state of {state} steps within {PATIENCE_S} s")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    return newest_state(out), len(small.complete_lines(out))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Metrics lines, final state and teacher of a run that nobody disturbed."""
    base = tmp_path_factory.getbasetemp()
    out = tmp_path_factory.mktemp("alone") / "run"
    command = small.arguments("pretrain/run.py", out, small.drawn(base, small.UNLABELED), *SETTINGS)
    assert small.run(command) == 0
    return command, out


def moved(command: list[str], out: Path, *more: str) -> list[str]:
    """The same command with another --out."""
    command = [*command, *more]
    command[command.index("--out") + 1] = str(out)
    return command


def assert_same_run(out: Path, other: Path) -> None:
    """Every line, the full state and the teacher agree to the last bit."""
    assert small.repeatable(small.metrics(out)) == small.repeatable(small.metrics(other))
    state = Path("checkpoints", f"samples-{24 * BATCH:012d}", "tensors.safetensors")
    for file in (state, Path("teacher/model.safetensors")):
        ours, theirs = load_file(out / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


def test_killed_once(alone, tmp_path):
    command, undisturbed = alone
    command, out = moved(command, tmp_path / "run"), tmp_path / "run"
    state, lines = kill_beyond(command, out, 5)
    assert 5 <= state < lines < 24
    assert small.run(command) == 0
    assert_same_run(out, undisturbed)
    assert len(small.json_of(out / "environment.json")["earlier"]) == 1


def test_killed_twice_inside_one_epoch_with_a_worker(alone, tmp_path):
    command, undisturbed = alone
    command, out = moved(command, tmp_path / "run", "loader.workers=1"), tmp_path / "run"
    first, _ = kill_beyond(command, out, 5)
    second, lines = kill_beyond(command, out, first + 1)
    assert first < second < 16, "both inside the first epoch"
    assert second < lines
    assert small.run(command) == 0
    assert_same_run(out, undisturbed)


def test_a_finished_run_stays_as_it_is(alone):
    command, out = alone
    before = {path: path.read_bytes() for path in [*out.glob("teacher/*"), *out.glob("checkpoints/*/*")]}
    lines = (out / "metrics.jsonl").read_bytes()
    assert small.run(command) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert (out / "metrics.jsonl").read_bytes() == lines


def test_the_teacher_is_on_disk_before_the_last_state(tmp_path, monkeypatch):
    """Else a kill between the two leaves a run that counts as finished and has no teacher."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_state", killed)
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 1, "img_size": [16, 16], "patch_size": 8}
    teacher = torch.nn.Module()
    teacher.backbone = Backbone({"model_name": "vit_tiny_patch16_224", "num_classes": 0, **sizes})
    config = CheckpointConfig(every_epochs=1, teacher_every_epochs=1)
    with pytest.raises(KeyboardInterrupt):
        Keeper(tmp_path, config, 2, 2.0, 8).after(2, {"teacher": teacher, "student": teacher}, None, {})
    assert (tmp_path / "teacher" / "model.safetensors").is_file()
    assert (tmp_path / "teachers" / "epoch-0001.00" / "model.safetensors").is_file()


def test_smaller_cards_may_go_on_unless_something_sees_the_micro_batch(alone, tmp_path, capsys):
    command, _ = alone
    for kind, goes_on in (("centre", True), ("sinkhorn", False)):
        first = moved(command, tmp_path / kind, f"centering.kind={kind}", "schedules.epochs=0.2")
        assert small.run(first) == 0
        assert (small.run([*first, "loader.batch_per_device=4"]) == 0) is goes_on
    assert "loader.batch_per_device was 16 and is now 4" in capsys.readouterr().err
