"""R6: shards of any sizes: all processes have the same number of steps, and every sample comes once an epoch."""

import multiprocessing
import queue
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.batch import Views
from pretrain.loader import LoaderConfig, MicroBatches, build_loader
from shards.order import Order, OrderConfig

COUNTS, LANES = (1, 3, 7), 12
PATIENCE_S = 30.0  # for all that one example does
FORK = multiprocessing.get_context("fork")


class Rows:
    """In the place of ViewMaker: the row of a position, and an image of one pixel."""

    def __init__(self, order: Order):
        self.order = order

    def __len__(self) -> int:
        return self.order.samples

    def __getitem__(self, position: int) -> Views:
        epoch, row = self.order(position)
        pixel, none = np.zeros((2, 1, 1, 3), np.uint8), np.zeros((2, 0), np.float32)
        boxes = np.full((2, 5), epoch, np.int64)  # tells the epoch
        return Views(row, -1, pixel, pixel[:0], boxes, np.zeros((2, 1, 1), bool), none, none[:0])


def _train(rows: Rows, sampler: MicroBatches, workers: int, barrier: Any, answers: Any) -> None:
    """A training process. At the end of each step it waits for the others, as in the all-reduce of the gradients."""
    config = LoaderConfig(shards=("",), batch=sampler.batch, workers=workers)
    seen, steps, taken = [], 0, 0
    for batch in build_loader(rows, sampler, config, pin=False):
        seen += zip(batch.boxes[0, :, 0].tolist(), batch.rows.tolist(), strict=True)
        taken += batch.size
        if taken == sampler.batch // sampler.ranks:
            steps, taken = steps + 1, 0
            barrier.wait()  # BrokenBarrierError where somebody has fewer steps
    answers.put((sampler.rank, steps, seen))


def together(
    sizes: Sequence[int], ranks: int, workers: int, share: int, micro: int, patience_s: float = PATIENCE_S
) -> tuple[list[int], list[tuple]]:
    """Train on shards of these sizes: the steps of each process, and what all of them saw, as (epoch, row).

    share: images of a process in a step, of which `micro` at a time. It goes over the end of the first epoch.
    queue.Empty where they are not done in time.
    """
    order = Order(np.array(sizes), sum(sizes), OrderConfig(lanes=LANES, window=16))
    batch = share * ranks
    steps = sum(sizes) // batch + 2
    barrier, answers = FORK.Barrier(ranks, timeout=patience_s), FORK.Queue()
    samplers = [MicroBatches((0, steps), batch, micro, rank, ranks) for rank in range(ranks)]
    processes = [FORK.Process(target=_train, args=(Rows(order), s, workers, barrier, answers)) for s in samplers]
    for process in processes:
        process.start()
    try:
        found = [answers.get(timeout=patience_s) for _ in processes]
    finally:
        for process in processes:
            process.join(patience_s)
            process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks
    return [steps for _, steps, _ in sorted(found)], [pair for _, _, seen in found for pair in seen]


def counted(sizes: Sequence[int], ranks: int, workers: int, share: int, micro: int) -> tuple[int, int]:
    """Samples that did not come though they must, and those that came too often; all processes have equal steps."""
    steps, seen = together(sizes, ranks, workers, share, micro)
    total, batch = sum(sizes), share * ranks
    assert len(set(steps)) == 1
    assert steps[0] == total // batch + 2
    assert len(seen) == steps[0] * batch, "nothing is padded: a step is full"
    lost = total - len({row for epoch, row in seen if epoch == 0})
    assert max(epoch for epoch, _ in seen) >= 1, "the next epoch begins inside a step"
    return lost, len(seen) - len(set(seen))


SETS = st.sampled_from(COUNTS).flatmap(
    lambda count: st.lists(st.one_of(st.integers(1, 12), st.integers(1, 1000)), min_size=count, max_size=count)
)
CASES = st.tuples(SETS, st.integers(2, 4), st.integers(0, 3), st.sampled_from([(1, 1), (4, 2), (6, 6), (16, 16)]))


def many(examples: int, sets: st.SearchStrategy) -> dict[str, int]:
    """So many examples: how often, samples lost, samples too often."""
    counts = {"times": 0, "lost": 0, "wrong": 0}

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(sets)
    def check(case: tuple) -> None:
        sizes, ranks, workers, (share, micro) = case
        lost, twice = counted(sizes, ranks, workers, share, micro)
        counts["times"], counts["lost"], counts["wrong"] = (
            *(counts["times"] + 1, counts["lost"] + lost, counts["wrong"] + twice),
        )
        assert (lost, twice) == (0, 0)

    check()
    return counts


@pytest.mark.row("R6")
@pytest.mark.parametrize("sizes, ranks, workers", [([1], 2, 0), ([1, 200, 7], 3, 1), ([3, 1, 1, 90, 2, 1, 40], 4, 2)])
def test_each_sample_once_an_epoch(sizes, ranks, workers):
    assert counted(sizes, ranks, workers, 4, 2) == (0, 0)


@pytest.mark.row("R6")
def test_a_process_with_fewer_steps_would_be_seen(monkeypatch):
    """What the tests rest on: the last process loses its last micro-batch, and the others do not wait for ever."""
    whole = MicroBatches.__iter__

    def shorter(sampler: MicroBatches) -> Iterator[list[int]]:
        found = list(whole(sampler))
        return iter(found[:-1] if sampler.rank == sampler.ranks - 1 else found)

    monkeypatch.setattr(MicroBatches, "__iter__", shorter)
    with pytest.raises(queue.Empty):
        together([5, 9], 2, 0, 2, 2, patience_s=0.5)


@pytest.mark.soak
@pytest.mark.row("R6")
def test_many_sets_of_shards(figures):
    counts = many(80, CASES)
    note = "1, 3, 7 shards of 1 to 1,000, 2 to 4 processes in step, 0 to 3 workers; no padding"
    figures("R6", injected="uneven shards", **counts, note=note)
    assert (counts["lost"], counts["wrong"]) == (0, 0)
