"""R10: a signal to any process stops all of them after the same step, with a state on disk and an exit code to requeue.

R12: a process that holds up the others is named, with the phase that takes it so long.
"""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file

from pretrain import checkpoint
from pretrain.ranks import REQUEUE

# 8 steps of 16 an epoch; no state is due before the end
LONG = ["schedules.epochs=5", "checkpoint.every_epochs=5", "views.local_count=1"]
SOON_S = 10.0


def pair(command: list[str], before: str = "", folder: Path | None = None) -> list[subprocess.Popen]:
    """Two processes of one run. before: Python that each runs first; `rank` is there."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": small.free_port(), "WORLD_SIZE": "2"}
    place |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    if before:
        script = folder / "launched.py"
        head = "import os, runpy, sys, time\nrank = int(os.environ['RANK'])\nsys.argv = sys.argv[1:]\n"
        script.write_text(f"{head}{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
        command = [str(script), *command]
    return [small.start(command, **place, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def ended(both: list[subprocess.Popen], within: float = 60.0) -> list[tuple[int, str]]:
    """Exit status and standard error of each."""
    try:
        told = [process.communicate(timeout=within)[1] for process in both]
    except subprocess.TimeoutExpired:
        for process in both:
            process.kill()
        pytest.fail(f"a process is still there after {within} s")
    return [(process.returncode, text) for process, text in zip(both, told, strict=True)]


def wait_for_lines(out: Path, both: list[subprocess.Popen], lines: int) -> None:
    """Until the run has written so many lines."""
    deadline = time.monotonic() + 120
    while len(small.complete_lines(out)) < lines:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in both), ended(both)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


def same_teacher(one: Path, other: Path) -> bool:
    a, b = (load_file(out / "teacher" / "model.safetensors") for out in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stopped(crops: Path, out: Path, name: str, whom: int, lines: int) -> float:
    """Start two processes, send one of them the signal after so many lines; seconds until both have left."""
    both = pair(small.arguments("pretrain/run.py", out, crops, *LONG))
    wait_for_lines(out, both, lines)
    start = time.monotonic()
    both[whom].send_signal(getattr(signal, name))
    told = ended(both)
    took = time.monotonic() - start
    steps = [json.loads(line)["step"] + 1 for line in small.complete_lines(out)]
    state = checkpoint.states(out / "checkpoints")[-1]
    assert checkpoint.check_state(state)["samples"] == steps[-1] * 16, "the state of the last step that was done"
    for status, text in told:
        assert status == REQUEUE, text[-2000:]
        assert f"stopped after step {steps[-1]} by {name} to rank {whom} on " in text
    note = small.json_of(out / "stopped.json")
    assert (note["signal"], note["rank"], note["step"]) == (name, whom, steps[-1])
    return took


@pytest.mark.row("R10")
def test_a_signal_to_one_of_two_stops_both(crops, tmp_path, figures):
    took = stopped(crops, tmp_path / "run", "SIGUSR1", 1, 4)
    assert took < SOON_S
    figures("R10", injected="SIGUSR1 to rank 1 of 2", times=1, lost=0, wrong=0, note=f"both left within {took:.1f} s")


@pytest.mark.soak
@pytest.mark.row("R10")
def test_stopped_many_times_and_ended_as_if_never(crops, tmp_path, figures):
    alone, out, took = tmp_path / "alone", tmp_path / "run", []
    assert [status for status, _ in ended(pair(small.arguments("pretrain/run.py", alone, crops, *LONG)), 120)] == [0, 0]
    turns = [("SIGTERM", 1), ("SIGUSR1", 0), ("SIGUSR1", 1), ("SIGTERM", 0)]
    for turn, (name, whom) in enumerate(turns * 2):
        took.append(stopped(crops, out, name, whom, 4 * turn + 4))
        assert len(small.metrics(out)) < 40, "stopped before the end"
    assert max(took) < SOON_S
    told = ended(pair(small.arguments("pretrain/run.py", out, crops, *LONG)), 120)
    assert [status for status, _ in told] == [0, 0], told[0][1][-2000:]
    assert not (out / "stopped.json").exists()
    assert small.repeatable(small.metrics(out)) == small.repeatable(small.metrics(alone))
    assert same_teacher(out, alone)
    note = f"left within {min(took):.1f} to {max(took):.1f} s, the run ended bit-equal"
    figures("R10", injected="SIGTERM, SIGUSR1 to rank 0 or 1 of 2", times=len(took), lost=0, wrong=0, note=note)


@pytest.mark.row("R10")
def test_one_process_stops_too_and_a_second_signal_changes_nothing(crops, tmp_path):
    out = tmp_path / "run"
    process = small.start(small.arguments("pretrain/run.py", out, crops, *LONG))
    wait_for_lines(out, [process], 3)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    ((status, text),) = ended([process])
    assert status == REQUEUE, text[-2000:]
    assert len(checkpoint.states(out / "checkpoints")) == 1


FINETUNE = ["optim.epochs=40", "resume.every_epochs=40", "optim.kind=adamw"]


@pytest.mark.row("R10")
def test_a_fine_tune_stops_inside_its_epoch_and_ends_the_same(tmp_path_factory, tmp_path, figures):
    people = small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)

    def command(out: Path) -> list[str]:
        return small.arguments("finetune/run.py", out, people, *FINETUNE, ckpt="none")

    whole, out, batches = tmp_path / "whole", tmp_path / "run", set()
    assert small.run(command(whole)) == 0
    for lines in (10, 32, 52):
        process = small.start(command(out))
        wait_for_lines(out, [process], lines)
        process.send_signal(signal.SIGTERM)
        ((status, text),) = ended([process])
        assert status == REQUEUE, text[-2000:]
        batches.add(checkpoint.facts_of(checkpoint.states(out / "checkpoints")[-1])["batch"])
    assert small.run(command(out)) == 0
    assert small.metrics(out) == small.metrics(whole)
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    figures("R10", injected="SIGTERM to a fine-tune", times=3, lost=0, wrong=0, note=f"after batches {sorted(batches)}")


# 20 ms a step; the second process is late in one phase
SLEEPS = {
    "data": "from pretrain.loader import ViewMaker as C\nname = '__getitems__'",
    "compute": "from pretrain.student_teacher import Student as C\nname = 'forward'",
}
LATE = """
real, seconds = getattr(C, name), {seconds}

def late(self, *given, **named):
    if rank == 1:
        time.sleep(seconds)
    return real(self, *given, **named)

setattr(C, name, late)
"""


@pytest.mark.row("R12")
@pytest.mark.parametrize("phase", SLEEPS)
def test_a_slow_process_is_named_within_20_steps(crops, tmp_path, figures, phase):
    out = tmp_path / "run"
    command = small.arguments("pretrain/run.py", out, crops, "schedules.epochs=2.5", "views.local_count=1")
    told = ended(pair(command, SLEEPS[phase] + LATE.format(seconds=0.3), tmp_path))
    assert [status for status, _ in told] == [0, 0], told[0][1][-2000:]
    warnings = [line for line in told[0][1].splitlines() if "is slow in phase" in line]
    assert len(warnings) == 1, told[0][1][-2000:]
    step, _, rest = warnings[0].removeprefix("warning: step ").partition(": ")
    assert int(step) <= 20
    assert rest.startswith("rank 1 on ")
    assert f"is slow in phase {phase}" in rest
    assert "is slow" not in told[1][1], "the main process tells it"
    figures(
        "R12", injected=f"0.3 s of sleep a step on rank 1, {phase}", times=1, lost=0, wrong=0, note=f"at step {step}"
    )


@pytest.mark.row("R12")
def test_equal_processes_are_not_named(crops, tmp_path):
    command = small.arguments("pretrain/run.py", tmp_path / "run", crops, "schedules.epochs=2.5", "views.local_count=1")
    for status, text in ended(pair(command)):
        assert status == 0
        assert "is slow in phase data" not in text
