"""R20: many steps in one process: memory, open files, workers, and every sample in its order."""

import json
import signal
import time
from pathlib import Path

import killing
import numpy as np
import pytest
import small
from forked import Run, Server

from shards.order import Order, OrderConfig
from shards.reader import ShardReader

BATCH = 2
SMALL = ["loader.batch=2", "views.local_count=1", "log_every=1000", "loader.workers=1", "backbone.depth=1"]
SMALL += ["backbone.embed_dim=16", "backbone.num_heads=1", "heads.out_dim=16", "heads.bottleneck_dim=16"]
EVERY = 100  # steps between two measurements
WARM = 0.2  # share of the steps that is left out of the slopes
SLOPE = 1.0  # MB in 1,000 steps


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def start(forks: Server, folder: Path, crops: Path, steps: int, *more: str) -> Run:
    """So many steps of two images, a state every 1,024 of them; stream and measurements are written to the folder."""
    settings = [*SMALL, f"schedules.epochs={steps * BATCH / 128}", "checkpoint.every_epochs=16", *more]
    told = [("streams", "stream", {"file": str(folder / "stream")})]
    told += [("streams", "measure", {"file": str(folder / "measured"), "every": EVERY})]
    return forks.start(small.arguments("pretrain/run.py", folder / "run", crops, *settings), told)


def lost_and_wrong(folder: Path, crops: Path, steps: int) -> tuple[int, int]:
    """Samples that no step was given, and those that the order has not at their place."""
    order = Order(ShardReader([crops], "unlabeled").shard_sizes, 0, OrderConfig())
    expected = [order(position)[1] for position in range(steps * BATCH)]
    given = {line["step"]: line["rows"] for line in lines(folder / "stream")}
    rows = [row for step in sorted(given) for row in given[step]]
    wrong = sum(row != other for row, other in zip(rows, expected, strict=False))
    return max(0, len(expected) - len(rows)), wrong + max(0, len(rows) - len(expected))


def slope(measured: list[dict], values: list[float]) -> float:
    """MB in 1,000 steps, by least squares after the warm-up."""
    warm = int(WARM * len(values))
    return float(1000 * np.polyfit([line["step"] for line in measured[warm:]], values[warm:], 1)[0])


@pytest.mark.row("R20")
def test_some_hundred_steps(forks, crops, tmp_path):
    run = start(forks, tmp_path, crops, 300)
    assert run.wait() == 0, run.told()
    assert run.gone(), "its worker has ended"
    assert lost_and_wrong(tmp_path, crops, 300) == (0, 0)
    measured = lines(tmp_path / "measured")
    assert len({line["files"] for line in measured[1:]}) == 1
    assert measured[-1]["mb"] - measured[1]["mb"] < 30, "MB over 100 steps; the long test holds the slope"


@pytest.mark.soak
@pytest.mark.row("R20")
def test_twenty_thousand_steps(forks, crops, tmp_path, figures):
    steps = 20_000
    run = start(forks, tmp_path, crops, steps)
    assert run.wait(1500) == 0, run.told()
    assert run.gone()
    lost, wrong = lost_and_wrong(tmp_path, crops, steps)
    measured = lines(tmp_path / "measured")
    assert len(measured) == steps // EVERY
    own = slope(measured, [line["mb"] for line in measured])
    worker = slope(measured, [sum(line["workers_mb"]) for line in measured])
    warm = measured[int(WARM * len(measured)) :]
    files = sorted({line["files"] for line in warm})
    grown = measured[-1]["mb"] - warm[0]["mb"]
    note = f"{own:+.2f} MB in 1,000 steps ({grown:+.1f} MB in all), its worker {worker:+.2f}"
    note += f"; {files[0]} to {files[-1]} files open"
    figures("R20", injected=f"steps of {BATCH} images in one process", times=steps, lost=lost, wrong=wrong, note=note)
    assert (lost, wrong) == (0, 0)
    assert own < SLOPE
    assert worker < SLOPE
    assert files[-1] - files[0] <= 1, "a state is being written at times"
    assert {len(line["workers_mb"]) for line in measured} == {1}


def interrupted(run: Run, out: Path) -> int:
    """Ctrl-C to the script's own process once it makes steps."""
    assert killing.until(run, lambda: len(small.complete_lines(out)) > 3), run.told()
    run.send(signal.SIGINT)
    return run.wait(30)


@pytest.mark.row("R20")
@pytest.mark.parametrize("cause", ["error", "Ctrl-C", pytest.param("SIGKILL", marks=pytest.mark.soak)])
def test_workers_end_with_their_run(cause, forks, crops, tmp_path, figures):
    """An error of ours, KeyboardInterrupt, and death: no process is left of a run with two workers."""
    settings = ["loader.batch=4", "views.local_count=1", "schedules.epochs=300", "loader.workers=2"]
    told = [("streams", "fail", {"step": 5})] if cause == "error" else []
    run = forks.start(small.arguments("pretrain/run.py", tmp_path / "run", crops, *settings), told)
    if cause == "error":
        assert run.wait() == 1
        assert "planted at step 5" in run.told()
    elif cause == "Ctrl-C":
        assert interrupted(run, tmp_path / "run") != 0
    else:
        assert killing.until(run, lambda: len(small.complete_lines(tmp_path / "run")) > 3), run.told()
        assert run.kill(workers=False) == -signal.SIGKILL
    began = time.monotonic()
    assert run.gone(30), "a worker outlived its run"
    note = f"no process left after {time.monotonic() - began:.1f} s"
    figures("R20", injected=f"{cause} with two workers", times=1, lost=0, wrong=0, note=note)
