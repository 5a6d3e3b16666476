"""R11: when one process of a run dies or hangs, the others name it and leave, and the launcher's restart goes on."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small
import together
from forked import Server
from killing import compare, until

from pretrain import checkpoint
from pretrain.ranks import REQUEUE

PRETRAIN = ["views.local_count=1", "ranks.beat_s=0.2"]  # 8 steps an epoch
TIMEOUT_S = 3.0
WHY = f"no step for {TIMEOUT_S:g} s: "
NAMES = (
    # without torchrun the processes meet in that of rank 0
    "rank 0, in whose process or on whose host the processes met, is gone",
    r"rank 1 on \S+ \(process \d+\) gives no sign of life, the last was at step \d+, phase [a-z]+",
)


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


def lose(forks: Server, command: list[str], out: Path, whom: int, how: int, workers: bool = True) -> float:
    """Start two processes and take one of them away after two more steps; seconds until the other one has left, which
    names it. workers: those of its loader are killed with it."""
    runs, before = together.start(forks, command, 2), len(small.complete_lines(out))
    assert until(runs[0], lambda: len(small.complete_lines(out)) >= before + 2), runs[0].told()
    start = time.monotonic()
    (os.killpg if workers else os.kill)(runs[whom].pid, how)
    try:
        assert runs[1 - whom].wait(60) == REQUEUE, runs[1 - whom].told()
        took = time.monotonic() - start
    finally:
        runs[whom].kill()  # as a launcher does with one that hangs
    told = runs[1 - whom].told()
    # loader workers that outlive their parent hold its connections for some seconds
    why = WHY if how == signal.SIGSTOP else "" if workers else f"(?:{WHY})?"
    assert re.search(f"^error: {why}{NAMES[whom]}", told, re.MULTILINE), told
    assert f"Rank {1 - whom} stops; the same command goes on from the last checkpoint" in told
    note = small.json_of(out / "stopped.json")
    assert note["lost"].startswith(f"rank {whom}")
    assert note["told_by"] == 1 - whom
    return took


@pytest.mark.row("R11")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_lost_process_is_named_by_the_other(name, forks, crops, tmp_path, figures):
    given = [*PRETRAIN, "schedules.epochs=20", "checkpoint.every_epochs=100", f"ranks.timeout_s={TIMEOUT_S}"]
    out, how = tmp_path / "run", getattr(signal, name)
    took = lose(forks, small.arguments("pretrain/run.py", out, crops, *given), out, 1, how)
    figures("R11", injected=f"{name} to rank 1 of 2", times=1, lost=0, wrong=0, note=f"named after {took:.1f} s")
    assert took < TIMEOUT_S + 5


TURNS = [  # who, how, loader workers, whether these are killed with it
    *((1, signal.SIGKILL, 0, True), (0, signal.SIGKILL, 0, True), (1, signal.SIGSTOP, 0, True)),
    *((0, signal.SIGSTOP, 0, True), (1, signal.SIGKILL, 2, True), (1, signal.SIGKILL, 2, False)),
    *((0, signal.SIGKILL, 2, False), (0, signal.SIGSTOP, 1, True), (1, signal.SIGSTOP, 1, False)),
]


@pytest.mark.soak
@pytest.mark.row("R11")
def test_any_process_may_be_lost_and_the_run_ends_the_same(forks, crops, tmp_path, figures):
    given, took = [*PRETRAIN, "schedules.epochs=10", "checkpoint.every_epochs=0.25"], []
    alone, out = tmp_path / "alone", tmp_path / "run"
    assert together.wait(together.start(forks, small.arguments("pretrain/run.py", alone, crops, *given), 2)) == {0}
    for whom, how, workers, killed in TURNS:
        more = [*given, f"ranks.timeout_s={TIMEOUT_S}", f"loader.workers={workers}"]
        took.append(lose(forks, small.arguments("pretrain/run.py", out, crops, *more), out, whom, how, killed))
    assert len(small.metrics(out)) < 80, "lost before the end"
    assert together.wait(together.start(forks, small.arguments("pretrain/run.py", out, crops, *given), 2)) == {0}
    last = checkpoint.states(alone / "checkpoints")[-1].relative_to(alone)
    lost, wrong = compare(out, alone, ["teacher/model.safetensors", f"{last}/{checkpoint.TENSORS}"])
    note = f"named after {min(took):.1f} to {max(took):.1f} s, the run ended bit-equal"
    figures("R11", injected="SIGKILL, SIGSTOP to either of 2", times=len(took), lost=lost, wrong=wrong, note=note)
    assert (lost, wrong) == (0, 0)
    assert max(took) < TIMEOUT_S + 5


def launched(crops: Path, out: Path) -> subprocess.Popen:
    """Two processes by torchrun, which starts them again when one is lost."""
    settings = [*PRETRAIN, "schedules.epochs=5", "checkpoint.every_epochs=0.5", "loader.workers=1"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "3"]
    launch += ["--master_port", small.free_port()]
    command = small.arguments("pretrain/run.py", out, crops, *settings)
    return small.start([*launch, *command], ACCELERATE_USE_CPU="true")


def launches(out: Path) -> int:
    """How often the processes were started."""
    return 1 + len(small.json_of(out / "environment.json").get("earlier", []))


def children_of(pid: int) -> list[int]:
    """Processes that this one started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def wait_until(process: subprocess.Popen, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.soak
@pytest.mark.row("R11")
def test_the_launcher_starts_both_anew_and_the_run_ends_the_same(crops, tmp_path, figures):
    alone, out, whoms = tmp_path / "alone", tmp_path / "run", (1, 0, 1)
    undisturbed = launched(crops, alone)
    undisturbed.communicate(timeout=200)
    assert undisturbed.returncode == 0
    process = launched(crops, out)
    try:
        for turn, whom in enumerate(whoms, start=1):
            target = len(small.complete_lines(out)) + 6
            wait_until(process, lambda lines=target: len(small.complete_lines(out)) >= lines)
            os.kill(sorted(children_of(process.pid))[whom], signal.SIGKILL)
            wait_until(process, lambda starts=turn: launches(out) > starts)
        told = process.communicate(timeout=200)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, told
    lost, wrong = compare(out, alone, ["teacher/model.safetensors"])
    note = "started anew each time, the run ended bit-equal"
    figures("R11", injected="SIGKILL under torchrun", times=len(whoms), lost=lost, wrong=wrong, note=note)
    assert (lost, wrong) == (0, 0)
    for whom in whoms:
        assert re.search(rf"rank {whom} on \S+ \(process \d+\) gives no sign of life", told)
