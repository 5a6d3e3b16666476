"""R11: when one process of a run dies or hangs, the others name it and leave, and the launcher's restart goes on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file

from pretrain.ranks import REQUEUE

LONG = ["schedules.epochs=20", "checkpoint.every_epochs=100", "views.local_count=1", "ranks.beat_s=0.2"]


def pair(command: list[str]) -> list[subprocess.Popen]:
    """Two processes of one run."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": small.free_port(), "WORLD_SIZE": "2"}
    place |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    return [small.start(command, **place, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def wait_for_lines(out: Path, both: list[subprocess.Popen], lines: int) -> None:
    deadline = time.monotonic() + 120
    while len(small.complete_lines(out)) < lines:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in both), [process.communicate() for process in both]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


def survivor(out: Path, crops: Path, whom: int, how: int, *more: str) -> tuple[float, str]:
    """Send `how` to process `whom` of two; seconds until the other one has left, and what it told."""
    both = pair(small.arguments("pretrain/run.py", out, crops, *LONG, *more))
    try:
        wait_for_lines(out, both, 12)
        start = time.monotonic()
        both[whom].send_signal(how)
        _, told = both[1 - whom].communicate(timeout=60)
        took = time.monotonic() - start
        assert both[1 - whom].returncode == REQUEUE, told[-2000:]
    finally:
        for process in both:
            process.kill()
            process.communicate()
    return took, told


@pytest.mark.row("R11")
def test_a_killed_process_is_named_by_the_other(crops, tmp_path, figures):
    took, told = survivor(tmp_path / "run", crops, 1, signal.SIGKILL)
    assert "error: rank 1 on " in told
    assert "gives no sign of life, the last was at step" in told
    assert took < 20
    figures("R11", injected="SIGKILL to rank 1 of 2", times=1, lost=0, wrong=0, note=f"named after {took:.1f} s")


@pytest.mark.row("R11")
def test_a_process_that_hangs_is_named_after_the_timeout(crops, tmp_path, figures):
    took, told = survivor(tmp_path / "run", crops, 1, signal.SIGSTOP, "ranks.timeout_s=3")
    assert "error: no step for 3 s: rank 1 on " in told
    assert took < 3 + 5
    figures(
        "R11", injected="SIGSTOP to rank 1 of 2", times=1, lost=0, wrong=0, note=f"timeout 3 s, left after {took:.1f} s"
    )


@pytest.mark.soak
@pytest.mark.row("R11")
def test_the_first_process_may_be_the_lost_one(crops, tmp_path, figures):
    took, told = survivor(tmp_path / "run", crops, 0, signal.SIGKILL)
    assert "error: rank 0, in whose process or on whose host the processes met, is gone" in told
    figures("R11", injected="SIGKILL to rank 0 of 2", times=1, lost=0, wrong=0, note=f"named after {took:.1f} s")


def children_of(pid: int) -> list[int]:
    """Processes that this one started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.soak
@pytest.mark.row("R11")
def test_the_launcher_starts_both_anew_and_the_run_ends_the_same(crops, tmp_path, figures):
    settings = ["schedules.epochs=5", "checkpoint.every_epochs=0.5", "views.local_count=1", "ranks.beat_s=0.2"]

    def launched(out: Path) -> subprocess.Popen:
        port = ["--master_port", small.free_port()]
        prefix = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "3", *port]
        return small.start(
            [*prefix, *small.arguments("pretrain/run.py", out, crops, *settings)], ACCELERATE_USE_CPU="true"
        )

    alone, out = tmp_path / "alone", tmp_path / "run"
    undisturbed = launched(alone)
    assert undisturbed.wait(timeout=200) == 0
    undisturbed.communicate()
    process, kills = launched(out), 0
    try:
        for lines, whom in ((8, 1), (20, 0)):
            wait_for_lines(out, [process], lines)
            workers = sorted(pid for pid in children_of(process.pid))
            os.kill(workers[whom], signal.SIGKILL)
            kills += 1
            before = len(small.json_of(out / "environment.json")["earlier"])
            deadline = time.monotonic() + 120
            while len(small.json_of(out / "environment.json")["earlier"]) == before:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        _, told = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, told[-3000:]
    assert "gives no sign of life" in told or "is gone" in told
    assert small.repeatable(small.metrics(out)) == small.repeatable(small.metrics(alone))
    ours, theirs = (load_file(run / "teacher" / "model.safetensors") for run in (out, alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    figures(
        "R11", injected="SIGKILL under torchrun --max-restarts", times=kills, lost=0, wrong=0, note="ended bit-equal"
    )
