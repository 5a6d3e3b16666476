"""A step whose loss, gradient or teacher is not finite changes nothing, on no process; too many of them end the run."""

import itertools
import json
import shutil
from pathlib import Path

import injected
import pytest
import small
import together
import torch

from pretrain import checkpoint
from shards.order import Order, OrderConfig, rank_positions
from shards.reader import ShardReader

# 6 steps of 16, with a centre, so that there is one to be spoilt; a full state after every second step
SETTINGS = ["schedules.epochs=0.75", "checkpoint.every_epochs=0.25", "checkpoint.keep=9", "centering.kind=centre"]
STEPS, BAD = 6, 3


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


def watched_run(
    monkeypatch: pytest.MonkeyPatch, place: str | None, command: list[str]
) -> list[dict[str, torch.Tensor]]:
    """Run with a fault at a place in step BAD; returns the whole state after each step, but for the count of skipped
    steps."""
    seen: list[dict[str, torch.Tensor]] = []
    with monkeypatch.context() as patched:
        if place:
            injected.arm(place, [BAD], patch=patched.setattr)
        injected.states(lambda _, state: seen.append({k: v.clone() for k, v in state.items()}), patched.setattr)
        assert small.run(command) == 0
    return seen


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """The kinds of state that differ in a bit."""
    assert one.keys() == other.keys()
    return {name.partition(".")[0] for name in one if not torch.equal(one[name], other[name])}


@pytest.fixture(scope="module")
def sound(crops, tmp_path_factory) -> tuple[list, list]:
    """States and lines of a run without a fault."""
    out = tmp_path_factory.mktemp("sound") / "run"
    with pytest.MonkeyPatch.context() as patched:
        states = watched_run(patched, None, small.arguments("pretrain/run.py", out, crops, *SETTINGS))
    return states, small.repeatable(small.metrics(out))


KINDS = {"student", "teacher", "centres", "optimizer", "spikes"}


@pytest.mark.row("R13")
@pytest.mark.parametrize("place", injected.PLACES)
def test_the_step_changes_no_bit_and_the_run_goes_on(crops, sound, tmp_path, monkeypatch, figures, place):
    command, names = small.arguments("pretrain/run.py", tmp_path / "run", crops, *SETTINGS), injected.PLACES[place]
    states, lines = watched_run(monkeypatch, place, command), small.metrics(tmp_path / "run")
    assert len(states) == len(lines) == STEPS
    assert changed(states[BAD - 1], states[BAD]) == set()
    for before, after in ((BAD - 2, BAD - 1), (BAD, BAD + 1), (BAD + 1, BAD + 2)):
        assert changed(states[before], states[after]) == KINDS
    assert not [name for name, value in states[-1].items() if not torch.isfinite(value).all()]
    # the count of AdamW's steps too: the skipped one is not in it
    assert int(states[-1]["optimizer.backbone.vit.cls_token//step"]) == STEPS - 1
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert lines[BAD]["not_finite"] == names
    assert [line.get("alarms") for line in lines] == [None] * BAD + [["skipped_steps"]] + [None] * 2
    assert (lines[BAD]["loss"] is None) == ("loss" in names)
    assert None not in [line["loss"] for line in lines[:BAD] + lines[BAD + 1 :]]
    theirs, own = sound
    assert small.repeatable(lines[:BAD]) == own[:BAD]
    assert changed(states[BAD - 1], theirs[BAD - 1]) == set()
    assert changed(states[BAD], theirs[BAD]) == KINDS, "the fault was there"
    figures("R13", injected=f"not finite: {place}", times=1, lost=0, wrong=0, note="no bit of the state changed")


def read_rows(crops: Path) -> list[list[list[int]]]:
    """The rows of the first nine steps of 16, of each of two processes."""
    order = Order(ShardReader([crops], "unlabeled").shard_sizes, 0, OrderConfig())
    return [[[order(n)[1] for n in rank_positions(step, 16, rank, 2)] for step in range(9)] for rank in range(2)]


def dumps_tell_whose_fault_it_is(folder: Path, rows: list[list[list[int]]]) -> None:
    assert {path.name for path in folder.iterdir()} == {"step-8-rank-0.json", "step-8-rank-1.json"}
    for rank in range(2):
        told = small.json_of(folder / f"step-8-rank-{rank}.json")
        assert [step["rows"] for step in told["steps"]] == rows[rank]
        assert [step["step"] for step in told["steps"] if step["not_finite"]] == [2, 6, 7, 8]
        assert [step["own"]["loss"] == "nan" for step in told["steps"]] == [
            rank and n in (2, 6, 7, 8) for n in range(9)
        ]
        assert set(told["gradient_norms"].values()) == {"nan"}, "the sum over both"
        assert "backbone.vit.blocks.1.mlp.fc2.weight" in told["gradient_norms"]
        assert told["not_finite_in_state"] == {}
        assert told["not_finite_first_in"] == {"teacher": None, "student": None}
        assert 0 < told["scheduled"]["lr"] < 0.1


def test_the_count_goes_on_after_a_resume(crops, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = small.arguments("pretrain/run.py", out, crops, *SETTINGS)
    watched_run(monkeypatch, "loss", command)
    lines = small.repeatable(small.metrics(out))
    shutil.rmtree(out / "checkpoints" / f"samples-{STEPS * 16:012d}")  # as if killed behind the state of step 4
    assert small.run(command) == 0
    assert small.repeatable(small.metrics(out)) == lines
    assert lines[-1]["skipped_steps"] == 1


@pytest.mark.row("R13")
def test_one_process_of_two(crops, tmp_path, forks, figures):
    """Not finite on the second process alone at step 2, and from step 6 on: then the run stops on both at step 8."""
    out, notes = tmp_path / "run", tmp_path / "notes"
    settings = ["schedules.epochs=1.5", "checkpoint.every_epochs=0.5", "centering.kind=centre", "health.max_skipped=2"]
    bad = [2, *range(6, 40)]
    command = small.arguments("pretrain/run.py", out, crops, *settings)
    prepare = [
        ("injected", "arm", {"place": "loss", "steps": bad, "ranks": [1]}),
        ("injected", "note", {"file": str(notes)}),
    ]
    runs = together.start(forks, command, 2, prepare)
    assert together.wait(runs) == {2}, runs[0].told()[-3000:]
    for process in runs:
        told = process.told()
        assert told.count("error: step 8: 3 steps in a row were skipped, more than health.max_skipped = 2") == 1
        assert "(loss, loss_cls, loss_patch, grad_norm)" in told
        assert "Traceback" not in told
    first, second = ([json.loads(line) for line in Path(f"{notes}{rank}").read_text().splitlines()] for rank in "01")
    assert first == second, "bit by bit the same on both"
    assert [note["step"] for note in first] == list(range(8))
    wrong = 0
    for before, after in itertools.pairwise(first):
        same = {part for part in KINDS if before["sums"][part] == after["sums"][part]}
        wrong += same != (KINDS if after["step"] in bad else set())
    figures("R13", injected="not finite: loss of one process of two", times=4, lost=0, wrong=wrong)
    assert not wrong
    dumps_tell_whose_fault_it_is(out / "faults", read_rows(crops))
    lines = small.metrics(out)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1, 2, 3, 4]
    assert [line["step"] for line in lines if "not_finite" in line] == [2, 6, 7, 8]
    # the last checkpoint is that of 8 steps, whose last two were skipped: it is sound, and the run goes on from it
    newest = checkpoint.states(out / "checkpoints")[-1]
    assert newest.name == f"samples-{8 * 16:012d}"
    tensors, _ = checkpoint.read_state(newest)
    assert not [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    assert int(tensors["skipped.total"]) == 3
    assert int(tensors["optimizer.backbone.vit.cls_token//step"]) == 5
    assert small.run([*command, "health.max_skipped=20"]) == 0
    assert small.metrics(out)[-1]["skipped_steps"] == 3
