"""Minutes of it: a pretraining that saves after every step is killed at random moments until it is through."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file

SETTINGS = ["loader.batch=8", "schedules.epochs=6", "checkpoint.every_epochs=0.0625", "views.local_count=1"]
STEPS = 96
PATIENCE_S = 120.0


def newest(out: Path) -> str:
    """Name of the newest complete state."""
    return max((path.name for path in out.glob("checkpoints/samples-*")), default="")


def killed(command: list[str], out: Path, after: float) -> bool:
    """Start the command, kill its group `after` seconds past its first new state; False when it was done before."""
    before, process, deadline = newest(out), small.start(command), time.monotonic() + PATIENCE_S
    try:
        while process.poll() is None and newest(out) == before:
            assert time.monotonic() < deadline, "no step was made"
            time.sleep(0.005)
        time.sleep(after)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        _, told = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), told
    return process.returncode != 0


@pytest.mark.soak
def test_killed_again_and_again(tmp_path_factory):
    crops = small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)
    alone, out = tmp_path_factory.mktemp("alone") / "run", tmp_path_factory.mktemp("killed") / "run"
    assert small.run(small.arguments("pretrain/run.py", alone, crops, *SETTINGS)) == 0
    command, moments, kills = small.arguments("pretrain/run.py", out, crops, *SETTINGS), random.Random(0), 0
    while killed(command, out, moments.uniform(0, 1)):
        kills += 1
        assert kills < STEPS, "every start makes at least one step"
    assert kills >= 3
    assert small.repeatable(small.metrics(out)) == small.repeatable(small.metrics(alone))
    ours, theirs = (load_file(run / "teacher" / "model.safetensors") for run in (out, alone))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert len(list((out / "checkpoints").iterdir())) == 2, (
        "the two that checkpoint.keep asks for, nothing half-written"
    )
