"""R10: a signal to any process stops all of them after the same step, with a state on disk and an exit code to requeue.

Launchers and job systems send it to whole groups of processes, so the workers of the loader get it, too.
"""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import small
import together
from forked import Run
from killing import compare, until

from pretrain import checkpoint
from pretrain.ranks import REQUEUE

# 8 steps of 16 an epoch; no state is due before the end
PRETRAIN = ["checkpoint.every_epochs=20", "views.local_count=1"]
FINETUNE = ["resume.every_epochs=40", "optim.kind=adamw", "benchmark.strips=0"]  # 3 steps an epoch
SOON_S = 10.0
MODELS = {"pretrain": "teacher/model.safetensors", "finetune": "model/model.safetensors"}


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)


def send(run: Run, name: str, group: bool) -> None:
    """The signal to a process of a run, or to it and its loader workers."""
    (os.killpg if group else os.kill)(run.pid, getattr(signal, name))


def stopped(runs: Sequence[Run], out: Path, name: str, whom: int, group: bool = False) -> float:
    """Send the signal to one of the processes when two more steps are done; seconds until all have left.

    Asserts that they left after the same step, that its state is saved, and what they tell.
    """
    before = len(small.complete_lines(out))
    assert until(runs[0], lambda: len(small.complete_lines(out)) >= before + 2), runs[0].told()
    start = time.monotonic()
    send(runs[whom], name, group)
    assert together.wait(runs) == {REQUEUE}, "\n".join(run.told() for run in runs)
    took = time.monotonic() - start
    steps = small.metrics(out)[-1]["step"] + 1
    facts = checkpoint.check_state(checkpoint.states(out / "checkpoints")[-1])
    assert facts.get("step", facts["samples"] // 16) == steps, "the state of the last step that was done"
    told = f"stopped after step {steps} by {name} to " + (f"rank {whom} on " if len(runs) > 1 else "process ")
    assert all(told in run.told() for run in runs)
    note = small.json_of(out / "stopped.json")
    assert (note["signal"], note["rank"], note["step"]) == (name, whom, steps)
    assert all(run.gone() for run in runs), "no loader worker is left"
    return took


def ended(runs: Sequence[Run], out: Path, alone: Path, kind: str) -> tuple[int, int]:
    """Let a run go on to its end; lines and files that it lacks, and that differ from those of an undisturbed one."""
    assert together.wait(runs) == {0}, "\n".join(run.told() for run in runs)
    assert not (out / "stopped.json").exists()
    last = checkpoint.states(alone / "checkpoints")[-1].relative_to(alone)
    return compare(out, alone, [MODELS[kind], f"{last}/{checkpoint.TENSORS}"])


@pytest.mark.row("R10")
def test_a_signal_to_one_of_two_and_its_workers_stops_both(forks, crops, tmp_path, figures):
    out = tmp_path / "run"
    command = small.arguments("pretrain/run.py", out, crops, *PRETRAIN, "schedules.epochs=20", "loader.workers=1")
    took = stopped(together.start(forks, command, 2), out, "SIGTERM", 1, group=True)
    figures("R10", injected="SIGTERM to rank 1 of 2", times=1, lost=0, wrong=0, note=f"both left in {took:.1f} s")
    assert took < SOON_S


@pytest.mark.row("R10")
def test_more_signals_change_nothing(forks, crops, tmp_path):
    out = tmp_path / "run"
    run = forks.start(small.arguments("pretrain/run.py", out, crops, *PRETRAIN, "schedules.epochs=20"))
    assert until(run, lambda: len(small.complete_lines(out)) >= 2), run.told()
    while run.poll() is None:
        run.send(signal.SIGTERM)  # also while it saves and leaves
        time.sleep(0.001)
    assert run.wait() == REQUEUE, run.told()
    assert len(checkpoint.states(out / "checkpoints")) == 1


def test_a_signal_before_the_training_ends_it_at_once(forks, crops, tmp_path):
    out = tmp_path / "run"
    slow = [("lateness", "be_late", {"phase": "plan", "rank": 0, "seconds": 30.0})]
    run = forks.start(small.arguments("pretrain/run.py", out, crops, *PRETRAIN), slow)
    assert until(run, lambda: run.output.exists() and "late in plan" in run.told()), run.told()
    run.send(signal.SIGTERM)
    assert run.wait(20) == REQUEUE
    assert "stopped by SIGTERM; the same command goes on" in run.told()


@pytest.mark.row("R10")
def test_a_fine_tune_stops_inside_its_epoch_and_ends_the_same(forks, people, tmp_path, figures):
    alone, out, settings = tmp_path / "alone", tmp_path / "run", [*FINETUNE, "optim.epochs=8"]
    command, whole = (small.arguments("finetune/run.py", to, people, *settings, ckpt="none") for to in (out, alone))
    assert forks.start(whole).wait() == 0
    took = stopped([forks.start(command)], out, "SIGUSR1", 0)
    lost, wrong = ended([forks.start(command)], out, alone, "finetune")
    figures("R10", injected="SIGUSR1 to a fine-tune", times=1, lost=lost, wrong=wrong, note=f"left in {took:.1f} s")
    assert (lost, wrong) == (0, 0)


WAYS = list(itertools.product(("SIGTERM", "SIGUSR1"), (0, 1), (False, True)))  # signal, rank, with its workers


@pytest.mark.soak
@pytest.mark.row("R10")
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_stopped_in_all_ways_and_ended_as_if_never(kind, forks, crops, people, tmp_path, figures):
    alone, out, took = tmp_path / "alone", tmp_path / "run", []

    def start(to: Path, workers: int) -> list[Run]:
        if kind == "pretrain":
            more = [*PRETRAIN, "schedules.epochs=16", f"loader.workers={workers}"]
            return together.start(forks, small.arguments("pretrain/run.py", to, crops, *more), 2)
        more = [*FINETUNE, "optim.epochs=40", f"benchmark.workers={workers}"]
        return together.start(forks, small.arguments("finetune/run.py", to, people, *more, ckpt="none"), 2)

    assert together.wait(start(alone, 0)) == {0}
    for name, whom, group in WAYS + WAYS[::-1]:
        took.append(stopped(start(out, 2 if group else 0), out, name, whom, group))
    assert len(small.metrics(out)) < len(small.metrics(alone)), "stopped before the end"
    lost, wrong = ended(start(out, 1), out, alone, kind)
    note = f"all left in {min(took):.1f} to {max(took):.1f} s, the run ended bit-equal"
    figures("R10", injected=f"{kind}, any signal to any of 2", times=len(took), lost=lost, wrong=wrong, note=note)
    assert (lost, wrong) == (0, 0)
    assert max(took) < SOON_S


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    "accelerate launch": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"),
        "--main_process_port",
    ],
}


@pytest.mark.soak
@pytest.mark.row("R10")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_to_the_launcher_stops_what_it_launched(launcher, crops, tmp_path, figures):
    out = tmp_path / "run"
    command = small.arguments("pretrain/run.py", out, crops, *PRETRAIN, "schedules.epochs=40", "loader.workers=2")
    launched = small.start(["-m", *LAUNCHERS[launcher], small.free_port(), *command], ACCELERATE_USE_CPU="true")
    try:
        while len(small.complete_lines(out)) < 4:
            assert launched.poll() is None, launched.communicate()
            time.sleep(0.01)
        start = time.monotonic()
        launched.terminate()
        told = launched.communicate(timeout=60)[1]
        took = time.monotonic() - start
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launched.pid, signal.SIGKILL)
        launched.wait()
    assert launched.returncode == 1, "the launcher has its own exit code"
    steps = small.metrics(out)[-1]["step"] + 1
    assert told.count(f"stopped after step {steps} by SIGTERM to rank ") == 2, told
    assert checkpoint.check_state(checkpoint.states(out / "checkpoints")[-1])["samples"] == steps * 16
    assert small.json_of(out / "stopped.json")["step"] == steps
    figures("R10", injected=f"SIGTERM to {launcher}", times=1, lost=0, wrong=0, note=f"all left in {took:.1f} s")
    assert took < SOON_S
