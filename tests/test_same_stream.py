"""One stream for any number of processes and workers, and after kills: rows, crop boxes and masks of every step."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from pretrain.loader import LoaderConfig, MicroBatches, build_loader

BATCH, STEPS = 12, 9  # 108 samples: the set has 53, so the stream crosses two ends of an epoch
RANKS, WORKERS = (1, 2, 3, 4), (0, 1, 2)


def _consume(maker, rank: int, ranks: int, workers: int, first: int, out: Path, pause: float) -> None:
    """A training process: takes its batches and appends, for each step, what every sample of it looks like."""
    config = LoaderConfig(shards=["unused"], batch=BATCH, workers=workers, prefetch=2)
    micro = BATCH // ranks // (2 if ranks < 3 else 1)  # with gradient accumulation in some cases
    sampler = MicroBatches((first, STEPS), BATCH, micro, rank, ranks)
    seen: dict[int, list[list]] = {}
    with out.open("a") as file:
        for number, batch in enumerate(build_loader(maker, sampler, config, pin=False)):
            step = first + number * micro * ranks // BATCH
            for i, row in enumerate(batch.rows.tolist()):
                looks = hashlib.sha256()
                for part in (batch.boxes, batch.masks, batch.global_crops):
                    looks.update(np.ascontiguousarray(part[:, i].numpy()).tobytes())
                seen.setdefault(step, []).append([row, looks.hexdigest()])
            if len(seen[step]) == BATCH // ranks:
                file.write(json.dumps([step, seen[step]]) + "\n")
                file.flush()
            time.sleep(pause)
    os._exit(0)  # as a killed process: no clean-up of what the parent owns


def _start(maker, folder: Path, ranks: int, workers: int, first: int = 0, pause: float = 0.0):
    context = multiprocessing.get_context("fork")
    found = []
    for rank in range(ranks):
        out = folder / f"rank{rank}-of-{ranks}-from-{first}"
        found.append(context.Process(target=_consume, args=(maker, rank, ranks, workers, first, out, pause)))
        found[-1].start()
    return found


def _hashes(folder: Path) -> dict[int, str]:
    """Hash of each global step, whichever process took which sample; a step done again must have come out the same."""
    steps: dict[int, dict[str, None]] = {}
    for path in sorted(folder.iterdir()):
        for line in path.read_text().splitlines():
            step, samples = json.loads(line)
            for row, looks in samples:
                steps.setdefault(step, {})[f"{row} {looks}"] = None
    assert all(len(samples) == BATCH for samples in steps.values()), {s: len(x) for s, x in steps.items()}
    return {step: hashlib.sha256("\n".join(sorted(samples)).encode()).hexdigest() for step, samples in steps.items()}


@pytest.fixture(scope="module")
def expected(make_views, tmp_path_factory) -> dict[int, str]:
    folder = tmp_path_factory.mktemp("one")
    (process,) = _start(make_views(lanes=12), folder, 1, 0)
    process.join(60)
    found = _hashes(folder)
    assert sorted(found) == list(range(STEPS))
    assert len(set(found.values())) == STEPS
    return found


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.row("R4")
def test_any_number_of_processes_and_workers(expected, make_views, tmp_path, ranks, workers):
    processes = _start(make_views(lanes=12), tmp_path, ranks, workers)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert _hashes(tmp_path) == expected


@pytest.mark.row("R4")
def test_two_kills_inside_one_epoch_on_other_numbers_of_processes(expected, make_views, tmp_path):
    """kill -9 in step 1 and 2 of the first epoch (53 samples, 4.4 steps), going on with 3, then 2 processes."""
    maker, first = make_views(lanes=12), 0
    for ranks, workers in ((4, 1), (3, 2)):
        processes = _start(maker, tmp_path, ranks, workers, first, pause=0.4)
        outs = [tmp_path / f"rank{rank}-of-{ranks}-from-{first}" for rank in range(ranks)]
        deadline = time.monotonic() + 60
        while any(not out.exists() or not out.read_text().endswith("\n") for out in outs):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join(10)
        done = [len(out.read_text().split("\n")) - 1 for out in outs]
        first += min(done)  # steps that all processes have completed
        for out, count in zip(outs, done, strict=True):
            lines = out.read_text().split("\n")[:count]
            out.write_text("".join(f"{line}\n" for line in lines[: min(done)]))
    assert 2 <= first <= 4, "both kills fell into the first epoch"
    for process in _start(maker, tmp_path, 2, 0, first):
        process.join(60)
        assert process.exitcode == 0
    assert _hashes(tmp_path) == expected
