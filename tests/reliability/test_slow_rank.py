"""R12: a process that holds up the others is named within 20 steps, with its host and what takes it so long."""

import re
import socket
from pathlib import Path

import pytest
import small
import together
from forked import Prepare, Server

SETTINGS = ["views.local_count=1", "checkpoint.every_epochs=10"]  # 8 steps an epoch
STEP_S = 0.05  # about; the networks are tiny
WARNING = re.compile(r"warning: step (\d+): rank (\d+) on (\S+) is slow in phase (\w+): ")
Warnings = list[tuple[int, int, str]]  # step, rank, phase


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


def warnings(forks: Server, crops: Path, out: Path, ranks: int, prepare: Prepare, *more: str) -> Warnings:
    """What a run by so many processes tells about slow ones."""
    command = small.arguments("pretrain/run.py", out, crops, *SETTINGS, *more)
    runs = together.start(forks, command, ranks, prepare)
    assert together.wait(runs) == {0}, "\n".join(one.told() for one in runs)
    assert not any(WARNING.search(one.told()) for one in runs[1:]), "the main process tells it"
    found = WARNING.findall(runs[0].told())
    assert all(host == socket.gethostname() for _, _, host, _ in found)
    return [(int(step), int(rank), phase) for step, rank, _, phase in found]


def judged(found: Warnings, rank: int, phase: str) -> tuple[int, int, int]:
    """Whether it was not named in time (0 or 1), how many others were, and the step at which it was."""
    steps = [step for step, *who in found if who == [rank, phase]]
    others = sum(who != [rank, phase] for _, *who in found)
    return int(not steps or steps[0] > 20), others + max(len(steps) - 1, 0), min(steps, default=0)


@pytest.mark.row("R12")
def test_a_process_that_waits_five_steps_for_its_loader_is_named(forks, crops, tmp_path, figures):
    late = ("lateness", "be_late", {"phase": "data", "rank": 1, "seconds": 5 * STEP_S})
    found = warnings(forks, crops, tmp_path / "run", 2, [late], "schedules.epochs=1.75")
    lost, wrong, step = judged(found, 1, "data")
    figures("R12", injected="sleep in the loader of rank 1", times=1, lost=lost, wrong=wrong, note=f"at step {step}")
    assert (lost, wrong) == (0, 0)


CASES = {  # processes, the phase and the one that is late, settings; a sleep of five steps in each step
    "data, rank 0 of 2": (2, "data", 0, ()),
    "data, in a worker of rank 1": (2, "data", 1, ("loader.workers=1",)),
    "data, rank 2 of 4": (4, "data", 2, ()),
    "compute, rank 1 of 2": (2, "compute", 1, ()),
    "compute, rank 3 of 4": (4, "compute", 3, ()),
    "compute, micro-batches": (2, "compute", 0, ("loader.batch_per_device=4",)),
    "checkpoint, rank 0 of 2": (2, "checkpoint", 0, ()),
}


@pytest.mark.soak
@pytest.mark.row("R12")
def test_every_phase_of_any_process(forks, crops, tmp_path, figures):
    total_lost, total_wrong, steps = 0, 0, []
    for number, (ranks, phase, rank, more) in enumerate(CASES.values()):
        late = ("lateness", "be_late", {"phase": phase, "rank": rank, "seconds": 5 * STEP_S})
        settings = ("schedules.epochs=3.125", *more)
        found = warnings(forks, crops, tmp_path / f"run-{number}", ranks, [late], *settings)
        lost, wrong, step = judged(found, rank, phase)
        total_lost, total_wrong, steps = total_lost + lost, total_wrong + wrong, [*steps, step]
    note = f"named at steps {min(steps)} to {max(steps)}"
    figures("R12", injected="; ".join(CASES), times=len(CASES), lost=total_lost, wrong=total_wrong, note=note)
    assert (total_lost, total_wrong) == (0, 0)


@pytest.mark.soak
@pytest.mark.row("R12")
def test_nobody_is_named_where_nobody_is_late(forks, crops, tmp_path, figures):
    # all are late alike, so that the noise of a busy machine is small against a step
    late = [("lateness", "be_late", {"phase": "data", "rank": rank, "seconds": 0.1}) for rank in range(2)]
    settings = "schedules.epochs=3.125"
    found = [warnings(forks, crops, tmp_path / f"run-{number}", 2, late, settings) for number in range(3)]
    wrong = sum(map(len, found))
    figures("R12", injected="nobody late", times=3, lost=0, wrong=wrong, note=f"{wrong} false warnings in 75 steps")
    assert wrong == 0
