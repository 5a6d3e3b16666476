"""The order of an epoch: a permutation, the same for any number of processes, local in the shards, well mixed."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.errors import UserError
from shards.order import EpochOrder, Order, OrderConfig, check_ranks, rank_positions
from shards.seeds import generator


def rows_of(sizes, seed=0, epoch=0, lanes=8, window=16) -> list[int]:
    order = EpochOrder(np.array(sizes), seed, epoch, OrderConfig(lanes=lanes, window=window))
    return [order.row(n) for n in range(order.total)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 24),
    window=st.integers(1, 50),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 2**40),
)
@pytest.mark.row("R6")
def test_an_epoch_is_a_permutation(sizes, lanes, window, seed, epoch):
    assert sorted(rows_of(sizes, seed, epoch, lanes, window)) == list(range(sum(sizes)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), lanes=st.integers(1, 12), position=st.integers(0, 3000)
)
def test_a_position_alone_says_epoch_and_row(sizes, lanes, position):
    config = OrderConfig(lanes=lanes, window=7)
    total = sum(sizes)
    expected = EpochOrder(np.array(sizes), 3, position // total, config).row(position % total)
    order = Order(np.array(sizes), 3, config)
    for before in (position + 1, 0, position + total):  # whatever was asked before
        order(before)
    assert order(position) == (position // total, expected)


def test_consecutive_positions_pass_through_epoch_after_epoch():
    order = Order(np.array([5, 9, 3]), 1, OrderConfig(lanes=4, window=2))
    found = [order(position) for position in range(3 * 17)]
    for epoch in range(3):
        assert sorted(found[epoch * 17 : (epoch + 1) * 17]) == [(epoch, row) for row in range(17)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 6),
    window=st.integers(1, 12),
    position=st.integers(0, 500),
)
def test_shards_near_are_those_of_this_window_and_the_next(sizes, lanes, window, position):
    order = Order(np.array(sizes), 3, OrderConfig(lanes=lanes, window=window))
    ends, total = np.cumsum(sizes), sum(sizes)
    epoch, n = divmod(position, total)
    own = range(n % lanes, total, lanes)  # the positions of this lane
    start = n // lanes // window * window
    rows = [order(epoch * total + m)[1] for m in own[start : start + 2 * window]]
    assert set(order.shards_near([position])) == set(np.searchsorted(ends, rows, side="right").tolist())
    many = order.shards_near(range(position, position + 5))
    assert len(many) == len(set(many))
    assert set(order.shards_near([position])) <= set(many)


def test_epochs_and_seeds_differ():
    sizes = [50] * 20
    orders = [rows_of(sizes, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        # independent permutations agree in one place on average
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 20


@pytest.mark.parametrize("sizes, lanes", [([10] * 8, 1), ([80], 8)])
def test_the_first_place_of_an_epoch_moves_over_the_whole_set(sizes, lanes):
    # with one lane this needs shuffled shards, with one shard shuffled lanes
    firsts = [rows_of(sizes, epoch=epoch, lanes=lanes, window=5)[0] for epoch in range(400)]
    counts = np.bincount(np.array(firsts) // 10, minlength=8)
    assert counts.min() > 25  # 50 expected, standard deviation 6.6


def test_windows_are_shuffled_differently():
    # 4 lanes of 3 windows of 20 rows in one shard, over two epochs
    inside = set()
    for epoch in range(2):
        rows = np.array(rows_of([240], epoch=epoch, lanes=4, window=20))
        for lane in range(4):
            for window in rows[lane::4].reshape(3, 20):
                assert sorted(window - window.min()) == list(range(20)), "a window is a piece of its lane"
                inside.add(tuple(window - window.min()))
    assert len(inside) == 24


def test_a_copy_in_another_process_gives_the_same():
    order = Order(np.array([30, 40]), 5, OrderConfig(lanes=3, window=8))
    copy = pickle.loads(pickle.dumps(order))
    assert [copy(n) for n in range(150)] == [order(n) for n in range(150)]


def test_an_empty_set_is_refused():
    with pytest.raises(UserError, match="no samples"):
        Order(np.array([0, 0]), 0, OrderConfig())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_ranks_take_the_step_apart(ranks):
    parts = [rank_positions(5, 24, rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {24 // ranks}
    assert sorted(position for part in parts for position in part) == list(range(120, 144))
    for rank, part in enumerate(parts):
        assert {position % ranks for position in part} == {rank}


@pytest.mark.parametrize("step", [0, 3, 16, 17])  # 400 samples: step 16 reaches over the end of the epoch
def test_the_samples_of_a_step_do_not_depend_on_the_ranks(step):
    order = Order(np.array([100] * 4), 7, OrderConfig(lanes=12, window=10))
    steps = []
    for ranks in (1, 2, 3, 4):
        parts = [rank_positions(step, 24, rank, ranks) for rank in range(ranks)]
        steps.append(sorted(order(position) for part in parts for position in part))
    assert steps[0] == steps[1] == steps[2] == steps[3]
    assert len(set(steps[0])) == 24


def test_a_rank_opens_few_shards_at_a_time_and_only_its_own():
    lanes, window, ranks, shard, shards = 8, 32, 4, 16, 128
    order = Order(np.array([shard] * shards), 0, OrderConfig(lanes=lanes, window=window))
    own = lanes // ranks
    # w neighbouring samples lie in at most w / shard + 1 shards
    at_a_time = own * (window // shard + 1)
    in_all = own * (shard * shards // lanes // shard + 1)
    visited = []
    for rank in range(ranks):
        touched = [order(n)[1] // shard for n in range(rank, shard * shards, ranks)]
        turns = [touched[start : start + own * window] for start in range(0, len(touched), own * window)]
        assert max(len(set(turn)) for turn in turns) <= at_a_time
        # from front to back: what a window has left behind is not needed again two windows later
        for early, late in itertools.combinations(range(len(turns)), 2):
            assert late - early < 2 or not set(turns[early]) & set(turns[late])
        visited.append(set(touched))
        assert len(visited[-1]) <= in_all
    assert sum(map(len, visited)) <= shards + lanes


def pairs_in_batches(videos: np.ndarray, batch: int) -> int:
    """Pairs of one video inside a batch, over an epoch."""
    total = 0
    for start in range(0, len(videos) - batch + 1, batch):
        _, counts = np.unique(videos[start : start + batch], return_counts=True)
        total += int((counts * (counts - 1) // 2).sum())
    return total


def pair_ratio(permuted: bool) -> float:
    """Same-video pairs in the batches of two epochs, as a share of what a full shuffle has on average."""
    shard, batch = 256, 64
    lengths = generator(0, "test/videos").integers(5, 60, size=400)
    videos = np.repeat(np.arange(400), lengths)[: 40 * shard]
    if permuted:  # as shards/packing.py does
        videos = videos[generator(0, "packing", 0).permutation(len(videos))]
    config = OrderConfig(lanes=16, window=128)
    found = sum(pairs_in_batches(videos[rows_of([shard] * 40, 0, e, **config.model_dump())], batch) for e in (0, 1))
    counts = np.bincount(videos)
    share = (counts * (counts - 1)).sum() / (len(videos) * (len(videos) - 1))  # of all pairs, those of one video
    return found / (2 * (len(videos) // batch) * batch * (batch - 1) / 2 * share)


def test_neighbours_of_a_video_meet_as_rarely_as_in_a_full_shuffle():
    assert 0.8 < pair_ratio(permuted=True) < 1.2


def test_without_the_permutation_of_packing_they_would_meet_often():
    assert pair_ratio(permuted=False) > 2


def test_processes_that_do_not_divide_are_told_the_nearest_number():
    for ranks in (1, 2, 4, 8, 64):
        check_ranks(ranks, 1024, 192)
    with pytest.raises(UserError) as caught:
        check_ranks(7, 1024, 192)
    assert str(caught.value) == (
        "7 processes do not divide the global batch loader.batch=1024 and order.lanes=192; "
        "the nearest number of processes that does is 8"
    )
    with pytest.raises(UserError, match=r"nearest number of processes that does is 2$"):
        check_ranks(3, 1024, 192)  # divides the lanes only
    with pytest.raises(UserError, match=r"nearest number of processes that does is 64$"):
        check_ranks(128, 1024, 192)  # divides the batch only
