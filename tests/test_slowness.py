"""Which process of a run is told to be slow, on times worked out by hand."""

import torch

from pretrain.slowness import Slowness

HOSTS = ["a", "b", "c"]


def steps(slow: Slowness, *rows: list[float], times: int = 1) -> list[str]:
    """What is told over so many steps; rows: seconds of data, compute, checkpoint and all, for each process."""
    return [told for _ in range(times) for told in slow.see(torch.tensor(rows, dtype=torch.float64))]


def test_the_process_that_holds_up_the_others_is_named_once():
    slow, row, late = Slowness(0.15, 10, HOSTS), [0.1, 0.5, 0, 1.0], [0.26, 0.5, 0, 1.0]
    assert steps(slow, row, late, row, times=9) == [], "too few steps to judge"
    told = steps(slow, row, late, row, times=20)
    assert told == [
        "rank 1 on b is slow in phase data: 0.26 s a step, the others 0.1 s, of steps of 1 s (docs/several_machines.md)"
    ]
    assert steps(slow, row, row, row, times=20) == []
    assert len(steps(slow, row, late, row, times=20)) == 1, "it begins anew"


def test_a_difference_of_exactly_the_share_is_not_slow():
    assert steps(Slowness(0.25, 4, HOSTS[:2]), [0.0, 0.25, 0, 1.0], [0.0, 0.5, 0, 1.0], times=8) == []
    assert len(steps(Slowness(0.25, 4, HOSTS[:2]), [0.0, 0.25, 0, 1.0], [0.0, 0.5625, 0, 1.0], times=8)) == 1


def test_one_that_wavers_is_told_once():
    slow, row = Slowness(0.2, 2, HOSTS[:2]), [0.0, 0.5, 0, 1.0]
    told = []
    for late in (0.3, 0.15, 0.3, 0.15, 0.3):  # above the share, and above its half
        told += steps(slow, row, [late, 0.5, 0, 1.0], times=2)
    assert len(told) == 1


def test_a_pause_is_no_slowness():
    slow, row = Slowness(0.15, 10, HOSTS[:2]), [0.1, 0.5, 0, 1.0]
    assert steps(slow, row, row, times=10) == []
    assert steps(slow, row, [0.1, 0.5, 60.0, 61.0]) == [], "a save, say"
    assert steps(slow, row, row, times=20) == []


def test_a_host_that_runs_ahead_of_its_gpu_does_not_make_every_difference_large():
    # all: 10 ms, because the host only queues; the forward on the device takes 0.2 s and differs by 5 ms
    assert steps(Slowness(0.15, 10, HOSTS[:2]), [0.0, 0.2, 0, 0.01], [0.0, 0.205, 0, 0.01], times=20) == []
