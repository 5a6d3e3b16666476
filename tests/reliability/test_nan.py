"""R13: whatever is not finite, wherever and on whichever process, costs its step and nothing else; finding out about it
does not make the host wait for the device."""

import itertools
import json
from pathlib import Path

import injected
import numpy as np
import pytest
import small
import together
import torch
from safetensors.torch import load_file
from waiting import Reads

from pretrain import checkpoint
from pretrain.journal import Journal


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


# what reads numbers of tensors that lie on the host on every machine, or on CPUs alone
HOST = {
    "journal.py:waited_for",  # how many samples of a batch were replaced
    "student_teacher.py:update_teacher",  # its branch for CPUs
    "batch.py:collate",
    "views.py:crop",
    "packing.py:kept",  # what is dropped by stochastic depth, of draws on the host
}


@pytest.mark.row("R13")
def test_a_run_reads_nothing_of_the_device_between_its_lines(crops, tmp_path, monkeypatch):
    """As long as no checkpoint is due. Skipped steps and spikes are among them."""
    injected.arm("gradient", [13, 14, 25], patch=monkeypatch.setattr)
    real, stages = Journal.record, []

    def recording(journal: Journal, step: int, *given: object) -> None:
        real(journal, step, *given)
        stages.append(reads.stage)
        reads.stage = "line" if journal.due else "between"

    monkeypatch.setattr(Journal, "record", recording)
    settings = ["schedules.epochs=4", "checkpoint.every_epochs=99", "log_every=16", "views.local_count=1"]
    settings += ["health.spike_warmup=5", "backbone.drop_path=0.3"]
    settings += ["pictures.images=0"]  # a snapshot that is drawn reads the device, and has a line
    with Reads() as reads:
        reads.stage = "begin"
        assert small.run(small.arguments("pretrain/run.py", tmp_path / "run", crops, *settings)) == 0
    assert stages.count("between") == 26, "lines are those of the steps 0, 10, 16, 20, 30, 31"
    assert reads.who("between") <= HOST
    assert {"journal.py:waited_for", "student_teacher.py:update_teacher"} <= reads.who("between"), "reads are seen"
    assert {"journal.py:_read", "journal.py:_stop", "spikes.py:look"} <= reads.who("line")


# 120 steps of 16; a line now and then only
LONG = ["schedules.epochs=15", "checkpoint.every_epochs=2", "centering.kind=centre", "views.local_count=1"]


def last_state(out: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint.states(out / "checkpoints")[-1] / checkpoint.TENSORS)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("skipped.")}


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors of the last states with another bit."""
    a, b = last_state(one), last_state(other)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def told(out: Path) -> dict[int, dict]:
    """The lines of sound steps, without what skipped ones leave in them by right."""
    apart = {"alarms", "skipped_steps"}
    lines = small.repeatable(small.metrics(out))
    return {
        line["step"]: {name: value for name, value in line.items() if name not in apart}
        for line in lines
        if "not_finite" not in line
    }


def runs(server, crops: Path, out: Path, cases: list[tuple[str, list[int]]], bad: list[int], world: int) -> list[Path]:
    """A run for each (place, processes) with faults in the steps `bad`."""
    folders = []
    for place, ranks in cases:
        folders.append(out / f"{place} {ranks}".replace(" ", "-"))
        notes = ("injected", "note", {"file": str(folders[-1].with_suffix(".notes"))})
        fault = ("injected", "arm", {"place": place, "steps": bad, "ranks": ranks})
        command = small.arguments("pretrain/run.py", folders[-1], crops, *LONG)
        processes = together.start(server, command, world, [notes, fault])
        assert together.wait(processes) == {0}, processes[0].told()[-3000:]
    return folders


@pytest.mark.soak
@pytest.mark.row("R13")
@pytest.mark.parametrize("world", [1, 2])
def test_many_faults_everywhere_leave_the_same_bits(forks, crops, tmp_path, figures, world):
    """Every place and process: what is left of a step is nothing, so all these runs end with the same state."""
    rng = np.random.default_rng(world)
    bad = sorted({*rng.choice(119, 30, replace=False).tolist(), 60, 61, 62})
    cases = [(place, [rank]) for place in injected.PLACES for rank in range(world)]
    cases += [("gradient", [0, 1])] * (world == 2)
    folders = runs(forks, crops, tmp_path, cases, bad, world)
    wrong, times = 0, 0
    for folder in folders:
        times += len(bad)
        wrong += len(differing(folder, folders[0])) + (told(folder) != told(folders[0]))
        for rank in range(world):
            notes = Path(f"{folder.with_suffix('.notes')}{rank}").read_text().splitlines()
            sums = [json.loads(line)["sums"] for line in notes]
            unchanged = {step for step, (a, b) in enumerate(itertools.pairwise(sums), 1) if a == b}
            wrong += len(unchanged ^ (set(bad) - {0}))
        assert small.metrics(folder)[-1]["skipped_steps"] == len(bad)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in last_state(folder).values())
    figures(
        "R13",
        injected=f"not finite: 5 places, {world} process(es), each alone",
        times=times,
        lost=0,
        wrong=wrong,
        note="all runs end with the same bits",
    )
    assert not wrong
