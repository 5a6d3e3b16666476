"""A step whose loss, gradient or teacher is not finite changes nothing, on no process; too many of them end the run."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import small
import torch

from pretrain import checkpoint, losses, student_teacher
from pretrain.keeping import Keeper

# 6 steps of 16, with a centre, so that there is one to be spoilt; a full state after every second step
SETTINGS = ["schedules.epochs=0.75", "checkpoint.every_epochs=0.25", "checkpoint.keep=9", "centering.kind=centre"]
STEPS, BAD = 6, 3


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


def nan_loss(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    calls, real = iter(range(99)), losses.named_losses

    def spoilt(*given: Any) -> dict[str, torch.Tensor]:
        factor = torch.nan if next(calls) == bad else 1.0
        return {name: value * factor for name, value in real(*given).items()}

    monkeypatch.setattr(losses, "named_losses", spoilt)


def inf_gradient(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """The loss stays finite."""
    calls, real = iter(range(99)), losses.named_losses

    def spoilt(*given: Any) -> dict[str, torch.Tensor]:
        found, now = real(*given), next(calls)
        if now == bad:
            found["loss"].register_hook(lambda slope: slope * torch.inf)
        return found

    monkeypatch.setattr(losses, "named_losses", spoilt)


def nan_teacher(monkeypatch: pytest.MonkeyPatch, bad: int, unmasked: bool = False) -> None:
    """All its logits, or only the patches that no mask covers: these enter the centre, and not the loss."""
    calls, real = iter(range(99)), student_teacher.Teacher.forward

    def spoilt(self: student_teacher.Teacher, batch: Any) -> student_teacher.Seen:
        seen = real(self, batch)
        if next(calls) != bad:
            return seen
        if unmasked:
            return seen._replace(patch_mean=seen.patch_mean * torch.nan)
        return seen._replace(logits=losses.Logits(*(part * torch.nan for part in seen.logits)))

    monkeypatch.setattr(student_teacher.Teacher, "forward", spoilt)


def nan_unmasked(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    nan_teacher(monkeypatch, bad, unmasked=True)


def nowhere(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """No fault."""


def watched_run(monkeypatch: pytest.MonkeyPatch, fault: Any, command: list[str]) -> list[dict[str, torch.Tensor]]:
    """Run with a fault in step BAD; returns the whole state after each step, the count of skipped steps apart."""
    states, real = [], Keeper.after

    def after(self: Keeper, step: int, modules: dict, optimizer: torch.optim.Optimizer, facts: dict) -> None:
        parts = {name: module.state_dict() for name, module in modules.items() if name != "skipped"}
        parts["optimizer"] = checkpoint.optimizer_tensors(optimizer, modules["student"])
        states.append({f"{part}.{k}": v.clone() for part, tensors in parts.items() for k, v in tensors.items()})
        real(self, step, modules, optimizer, facts)

    with monkeypatch.context() as patched:
        fault(patched, BAD)
        patched.setattr(Keeper, "after", after)
        assert small.run(command) == 0
    return states


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """The kinds of state that differ in a bit."""
    assert one.keys() == other.keys()
    return {name.partition(".")[0] for name in one if not torch.equal(one[name], other[name])}


@pytest.fixture(scope="module")
def sound(crops, tmp_path_factory) -> tuple[list, list]:
    """States and lines of a run without a fault."""
    out = tmp_path_factory.mktemp("sound") / "run"
    with pytest.MonkeyPatch.context() as patched:
        states = watched_run(patched, nowhere, small.arguments("pretrain/run.py", out, crops, *SETTINGS))
    return states, small.repeatable(small.metrics(out))


KINDS = {"student", "teacher", "centres", "optimizer"}


@pytest.mark.parametrize(
    "fault, names",
    [
        (nan_loss, ["loss", "loss_cls", "loss_patch", "grad_norm"]),
        (inf_gradient, ["grad_norm"]),
        (nan_teacher, ["loss", "loss_cls", "loss_patch", "grad_norm"]),
        (nan_unmasked, ["teacher"]),
    ],
)
def test_the_step_changes_no_bit_and_the_run_goes_on(crops, sound, tmp_path, monkeypatch, fault, names):
    command = small.arguments("pretrain/run.py", tmp_path / "run", crops, *SETTINGS)
    states, lines = watched_run(monkeypatch, fault, command), small.metrics(tmp_path / "run")
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


def test_the_count_goes_on_after_a_resume(crops, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = small.arguments("pretrain/run.py", out, crops, *SETTINGS)
    watched_run(monkeypatch, nan_loss, command)
    lines = small.repeatable(small.metrics(out))
    shutil.rmtree(out / "checkpoints" / f"samples-{STEPS * 16:012d}")  # as if killed behind the state of step 4
    assert small.run(command) == 0
    assert small.repeatable(small.metrics(out)) == lines
    assert lines[-1]["skipped_steps"] == 1


# runs pretrain/run.py with a loss that is not a number on the second process at some steps, and notes after each step,
# on each process, a sum over all bits of each part of the state
LAUNCHED = """
import hashlib, json, os, runpy, sys, torch
from pretrain import checkpoint, losses, optim
from pretrain.journal import Journal

bad, rank = set(json.loads(sys.argv[1])), os.environ["RANK"]
notes, calls, made = open(sys.argv[2] + rank, "w"), iter(range(99)), {}
real_losses, real_build = losses.named_losses, optim.build_optimizer
real_init, real_record = Journal.__init__, Journal.record

def named_losses(*given):
    spoilt = rank == "1" and next(calls) in bad
    return {name: value * torch.nan if spoilt else value for name, value in real_losses(*given).items()}

def build_optimizer(model, config):
    made["optimizer"] = real_build(model, config)
    return made["optimizer"]

def init(self, *given):
    made["modules"] = next(each for each in given if isinstance(each, dict))
    real_init(self, *given)

def total(tensors):
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()

def record(self, step, values):
    parts = {name: part.state_dict() for name, part in made["modules"].items() if name != "skipped"}
    parts["optimizer"] = checkpoint.optimizer_tensors(made["optimizer"], made["modules"]["student"])
    told = {"step": step, "world": self.accelerator.num_processes}
    print(json.dumps({**told, "sums": {name: total(part) for name, part in parts.items()}}), file=notes, flush=True)
    real_record(self, step, values)

losses.named_losses, optim.build_optimizer = named_losses, build_optimizer
Journal.__init__, Journal.record = init, record
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def two_processes(script: Path, bad: list[int], notes: Path, command: list[str]) -> list[tuple[int, str]]:
    """Exit status and standard error of both."""
    script.write_text(LAUNCHED)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": small.free_port(), "WORLD_SIZE": "2"}
    place |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    line = [str(script), json.dumps(bad), str(notes), *command]
    both = [small.start(line, **place, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    try:
        told = [process.communicate(timeout=100)[1] for process in both]
    except subprocess.TimeoutExpired:
        for process in both:
            process.kill()
        pytest.fail("a process hangs")
    return [(process.returncode, text) for process, text in zip(both, told, strict=True)]


def test_one_process_of_two(crops, tmp_path):
    """Not finite on the second process alone at step 2, and from step 6 on: then the run stops on both at step 8."""
    out, notes = tmp_path / "run", tmp_path / "notes"
    settings = ["schedules.epochs=1.5", "checkpoint.every_epochs=0.5", "centering.kind=centre", "health.max_skipped=2"]
    bad = [2, *range(6, 40)]
    command = small.arguments("pretrain/run.py", out, crops, *settings)
    for status, told in two_processes(tmp_path / "launched.py", bad, notes, command):
        assert status == 2, told[-3000:]
        assert told.count("error: step 8: 3 steps in a row were skipped, more than health.max_skipped = 2") == 1
        assert "(loss, loss_cls, loss_patch, grad_norm)" in told
        assert "Traceback" not in told
    first, second = ([json.loads(line) for line in Path(f"{notes}{rank}").read_text().splitlines()] for rank in "01")
    assert first == second, "bit by bit the same on both"
    assert {note["world"] for note in first} == {2}
    assert [note["step"] for note in first] == list(range(9))
    for before, after in itertools.pairwise(first):
        same = {part for part in KINDS if before["sums"][part] == after["sums"][part]}
        assert same == (KINDS if after["step"] in bad else set()), after["step"]
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
