"""R15: a spike of the loss sends the run back, and its batches are left out: as if they had never been in the data."""

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import small
import together
import torch
from forked import Prepare, Run, Server
from safetensors.torch import load_file

from pretrain import checkpoint, gaps
from pretrain.gaps import Gaps
from shards.order import Order, OrderConfig
from shards.reader import ShardReader

BATCH = 16
# 64 steps, 8 an epoch; a state every 4 steps
LONG = [
    *("schedules.epochs=8", "checkpoint.every_epochs=0.5", "checkpoint.keep=4", "checkpoint.teacher_every_epochs=1"),
    *("log_every=4", "views.local_count=1", "health.on_spike=roll_back", "pictures.images=0"),  # no lines but these
    *("health.spike_warmup=8", "health.spike_steps=2", "health.spike_before=1"),
]
FACTOR = 40.0  # of the spoilt logits: the loss is about ten times as high


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


def rows(crops: Path, batch: int) -> list[int]:
    """The rows of a batch of the data, in the order of the run."""
    order = Order(ShardReader([crops], "unlabeled").shard_sizes, 0, OrderConfig())
    return [order(position)[1] for position in range(batch * BATCH, (batch + 1) * BATCH)]


def spoilt(crops: Path, batches: list[int]) -> Prepare:
    return [("injected", "spoil", {"batches": [rows(crops, batch) for batch in batches], "factor": FACTOR})]


def state(out: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.states(out / "checkpoints")[-1] / checkpoint.TENSORS)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs by a bit: lines, tensors of the last state, names and weights of the teachers."""
    found = [] if small.repeatable(small.metrics(one)) == small.repeatable(small.metrics(other)) else ["lines"]
    pairs = [(state(one), state(other))]
    teachers = [sorted(path.name for path in (out / "teachers").iterdir()) for out in (one, other)]
    found += ["teachers"] * (teachers[0] != teachers[1])
    for name in ("teacher", *(f"teachers/{each}" for each in teachers[0])):
        pairs.append(tuple(load_file(out / name / "model.safetensors") for out in (one, other)))
    for a, b in pairs:
        assert a.keys() == b.keys()
        found += [name for name in a if not torch.equal(a[name], b[name])]
    return found


def undisturbed(forks: Server, crops: Path, out: Path, spans: list[list[int]], ranks: int = 1) -> Path:
    """A sound run whose data never had these batches."""
    prepare = [("injected", "leave_out", {"spans": spans})]
    runs = together.start(forks, small.arguments("pretrain/run.py", out, crops, *LONG), ranks, prepare)
    assert together.wait(runs) == {0}, runs[0].told()[-3000:]
    return out


@pytest.mark.row("R15")
def test_a_run_goes_back_and_ends_as_if_the_batches_had_never_been_there(forks, crops, tmp_path, figures):
    out = tmp_path / "run"
    run = forks.start(small.arguments("pretrain/run.py", out, crops, *LONG), spoilt(crops, [21, 22]))
    assert run.wait() == 0, run.told()[-3000:]
    told = run.told()
    assert re.search(r"alarm loss_spike at step 24: loss \d\d\.\d+ in steps 21 to 22, where \d\.\d+ \+- ", told)
    assert "; going on from step 20, without the batches of the steps 20 to 22 (" in told
    (entry,) = small.json_of(out / gaps.SKIPPED)["skipped"]
    assert entry["batches"] == [20, 23]
    lost = set(entry["rows"]) ^ {row for batch in (20, 21, 22) for row in rows(crops, batch)}
    wrong = differences(out, undisturbed(forks, crops, tmp_path / "sound", [[20, 23]]))
    note = "went back from step 24 to 20; the ids of 48 samples are written down"
    figures("R15", injected="a spike of 2 steps", times=1, lost=len(lost), wrong=len(wrong), note=note)
    assert not lost
    assert wrong == []


@pytest.mark.row("R15")
def test_a_spike_that_comes_back_stops_the_run(forks, crops, tmp_path):
    out = tmp_path / "run"
    most = [*LONG, "health.max_roll_backs=1"]
    run = forks.start(small.arguments("pretrain/run.py", out, crops, *most), spoilt(crops, list(range(21, 60))))
    assert run.wait() == 2
    assert re.search(
        r"\nerror: the loss has spiked: loss [\d.]+ in steps \d+ to \d+, where [\d.]+ \+- [\d.]+ is usual; this run "
        r"went back 1 times already, and health\.max_roll_backs = 1\. Lower ",
        run.told(),
    )
    assert len(Gaps.read(out)) == 1
    assert not (out / "teacher").exists()


def kill_at(run: Run, out: Path, when: str) -> None:
    """SIGKILL when a run reaches a moment of its roll-back; it may have ended before."""
    while run.poll() is None:
        there = {
            "line": lambda: any("spike" in line for line in small.metrics(out)),
            "written": lambda: (out / gaps.SKIPPED).exists(),
            "again": lambda: (out / gaps.SKIPPED).exists() and len(small.metrics(out)) > 9,
        }
        if there[when]():
            run.kill()
            return
        time.sleep(0.002)
    assert run.wait() == 0


def ended(runs: list[Run]) -> int:
    """Kill what is left; how many kills that were: 0 where the first process had come to its end."""
    for run in runs:
        run.kill()
    return int(runs[0].status == -signal.SIGKILL)


@pytest.mark.soak
@pytest.mark.row("R15")
@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_around_a_roll_back_change_nothing(forks, crops, tmp_path, figures, ranks):
    """Two spikes, the second when the first has shifted the batches. Killed as the roll-back is decided, between its
    parts, when it is written down, later on, and at random."""
    alone, wrong, kills = tmp_path / "alone", [], 0
    bad = spoilt(crops, [21, 22, 37, 38, 39])
    runs = together.start(forks, small.arguments("pretrain/run.py", alone, crops, *LONG), ranks, bad)
    assert together.wait(runs) == {0}, runs[0].told()[-3000:]
    spans = [one["batches"] for one in small.json_of(alone / gaps.SKIPPED)["skipped"]]
    assert spans == [[20, 23], [36, 40]], "a batch before each spike as well"
    wrong += differences(alone, undisturbed(forks, crops, tmp_path / "sound", spans, ranks))
    rng = np.random.default_rng(ranks)
    for turn in range(8 // ranks):
        out = tmp_path / str(turn)
        command = small.arguments("pretrain/run.py", out, crops, *LONG)
        for when in ("line", "written", "again"):
            runs = together.start(forks, command, ranks, bad)
            kill_at(runs[0], out, when)
            kills += ended(runs)
        for call in range(3):
            runs = together.start(forks, command, ranks, [*bad, ("injected", "die_in_roll_back", {"call": call})])
            runs[0].wait()
            kills += ended(runs)
        for _ in range(2):
            runs = together.start(forks, command, ranks, bad)
            lines = len(small.complete_lines(out)) + int(rng.integers(1, 5))
            while runs[0].poll() is None and len(small.complete_lines(out)) < lines:
                time.sleep(0.002)
            runs[0].kill()
            kills += ended(runs)
        runs = together.start(forks, command, ranks, bad)
        assert together.wait(runs) == {0}, runs[0].told()[-3000:]
        wrong += differences(out, alone)
        if (out / gaps.SKIPPED).read_bytes() != (alone / gaps.SKIPPED).read_bytes():
            wrong.append("skipped batches")
    assert kills > 20 // ranks
    figures(
        "R15",
        injected=f"two spikes and SIGKILLs around the roll-backs, {ranks} process(es)",
        times=kills,
        lost=0,
        wrong=len(wrong),
        note="equal to a run whose data never had those batches",
    )
    assert wrong == []


@pytest.mark.row("R15")
def test_a_spike_is_only_told_where_the_recipe_says_so(forks, crops, tmp_path):
    out = tmp_path / "run"
    run = forks.start(
        small.arguments("pretrain/run.py", out, crops, *LONG, "health.on_spike=warn"), spoilt(crops, [21, 22])
    )
    assert run.wait() == 0, run.told()[-3000:]
    assert run.told().count("alarm loss_spike at step 24: ") == 1
    assert not (out / gaps.SKIPPED).exists()
    (line,) = [json.loads(line) for line in small.complete_lines(out) if "spike" in json.loads(line)]
    assert (line["step"], line["spike"]["first"], line["spike"]["last"]) == (24, 21, 22)
