"""P×K batches: their composition, their number, and that they are a function of (seed, epoch)."""

from collections import Counter

import numpy as np
import pytest

from finetune.sampling import SamplingConfig, epoch_batches, shard_batch
from recipes.errors import UserError


def labels_of(counts: dict[int, int]) -> np.ndarray:
    """Labels in scattered order with the given number of images each."""
    return np.random.default_rng(0).permutation(np.repeat(list(counts), list(counts.values())))


@pytest.mark.parametrize("seed", range(4))
def test_every_batch_is_p_identities_times_k_images(seed):
    labels = labels_of({label: 2 + label % 9 for label in range(30)})
    batches = epoch_batches(labels, 6, 4, seed, epoch=0)
    assert batches.dtype == np.int64
    for batch in batches:
        rows = labels[batch].reshape(6, 4)
        assert (rows == rows[:, :1]).all()
        assert len(set(rows[:, 0])) == 6


def test_no_image_twice_unless_its_identity_is_short():
    labels = labels_of({0: 12, 1: 9, 2: 8, 3: 3, 4: 1})
    batches = epoch_batches(labels, 2, 4, seed=1, epoch=0)
    uses = Counter(batches.ravel().tolist())
    groups = Counter(labels[batches[:, ::4]].ravel().tolist())
    assert all(uses[row] <= 1 for row in np.flatnonzero(labels < 3))
    # groups that exist: 12 // 4, 9 // 4 (one image left out), 8 // 4, and one each for the short ones
    assert all(groups[label] <= most for label, most in {0: 3, 1: 2, 2: 2, 3: 1, 4: 1}.items())
    single = int(np.flatnonzero(labels == 4)[0])
    assert uses[single] in (0, 4)


def test_number_of_batches_by_hand():
    # P = 2 of exactly 2 identities with 3 groups each: both are in every batch, 3 batches
    assert epoch_batches(labels_of({5: 12, 9: 14}), 2, 4, 0, 0).shape == (3, 8)
    # one identity has 1 group: after its batch only one is open, and the other's 2 groups are left out
    assert epoch_batches(labels_of({5: 12, 9: 4}), 2, 4, 0, 0).shape == (1, 8)
    # 4 identities of one group each, P = 3: one batch, one identity left out
    assert epoch_batches(labels_of(dict.fromkeys(range(4), 4)), 3, 4, 0, 0).shape == (1, 12)
    # all equal and P divides: nothing is left out when every round takes all
    assert epoch_batches(labels_of(dict.fromkeys(range(8), 8)), 8, 4, 0, 0).shape == (2, 32)


@pytest.mark.parametrize("seed", range(6))
def test_stops_only_when_fewer_than_p_have_groups(seed):
    counts = {label: 4 * (1 + label % 5) for label in range(20)}
    labels = labels_of(counts)
    batches = epoch_batches(labels, 6, 4, seed, 0)
    used = Counter(labels[batches[:, ::4]].ravel().tolist())
    assert sum(used[label] < counts[label] // 4 for label in counts) < 6


def batches_by_loops(counts: dict[int, int], people: int, images: int, rng: np.random.Generator) -> int:
    """How many batches the published sampler gives, with lists and loops."""
    groups = {label: max(count // images, 1) for label, count in counts.items()}
    batches = 0
    while len(groups) >= people:
        for label in rng.choice(sorted(groups), people, replace=False).tolist():
            groups[label] -= 1
            if not groups[label]:
                del groups[label]
        batches += 1
    return batches


def test_as_many_batches_as_the_published_sampler_gives():
    # uneven identities, so that the number depends on who is drawn when
    counts = {label: 1 + 3 * label for label in range(30)}
    labels, rng = labels_of(counts), np.random.default_rng(0)
    ours = [len(epoch_batches(labels, 16, 4, 0, epoch)) for epoch in range(150)]
    theirs = [batches_by_loops(counts, 16, 4, rng) for _ in range(150)]
    assert np.std(theirs) > 0
    # the difference of two means over 150 epochs; 5 deviations
    deviation = np.sqrt((np.var(ours) + np.var(theirs)) / 150)
    assert abs(np.mean(ours) - np.mean(theirs)) < 5 * deviation


def test_the_defaults_are_the_published_ones():
    config = SamplingConfig()
    assert (config.identities_per_batch, config.images_per_identity) == (16, 4)


def test_an_epoch_is_a_function_of_seed_and_epoch():
    labels = labels_of(dict.fromkeys(range(10), 9))
    first = epoch_batches(labels, 4, 2, seed=3, epoch=5)
    np.testing.assert_array_equal(first, epoch_batches(labels, 4, 2, seed=3, epoch=5))
    for seed, epoch in ((3, 6), (4, 5)):
        other = epoch_batches(labels, 4, 2, seed=seed, epoch=epoch)
        assert other.shape != first.shape or (other != first).mean() > 0.5


def test_images_and_identities_are_drawn_evenly():
    # 6 identities with 5 images, K = 4: each epoch leaves one image of each out, P = 3 takes all or three identities
    labels = labels_of(dict.fromkeys(range(6), 5))
    uses = np.zeros(30)
    epochs = 600
    for epoch in range(epochs):
        batches = epoch_batches(labels, 3, 4, 0, epoch)
        assert batches.shape == (2, 12)
        uses[batches.ravel()] += 1
    # each image is used with probability 4/5: deviation sqrt(600 * .16) = 9.8 around 480; 5 deviations
    assert abs(uses - 480).max() < 49


def test_the_company_in_a_batch_is_drawn():
    # 4 identities with one group each, P = 3: each is the one left out with probability 1/4
    labels = labels_of(dict.fromkeys(range(4), 4))
    left_out = np.zeros(4)
    for epoch in range(400):
        left_out[list(set(range(4)) - set(labels[epoch_batches(labels, 3, 4, 0, epoch)].ravel().tolist()))] += 1
    # deviation sqrt(400 * 3/16) = 8.7 around 100; 5 deviations
    assert left_out.sum() == 400
    assert abs(left_out - 100).max() < 44


def test_short_identity_is_drawn_with_replacement():
    # 2 of 3 images: 4 draws hit all values of 3^4; the number of distinct ones must vary and repeats must occur
    labels = labels_of({0: 3, 1: 4})
    distinct = Counter(
        len({row for row in epoch_batches(labels, 2, 4, 0, epoch).ravel().tolist() if labels[row] == 0})
        for epoch in range(200)
    )
    # by counting surjections: 1 distinct 3/81, 2 distinct 42/81, 3 distinct 36/81; 5 deviations of 200 draws
    assert set(distinct) == {1, 2, 3}
    assert abs(distinct[2] - 200 * 42 / 81) < 36


def test_too_few_identities_is_an_error_that_says_what_to_set():
    with pytest.raises(UserError, match=r"has 3; set sampling\.identities_per_batch to at most 3"):
        epoch_batches(labels_of({0: 4, 1: 4, 2: 4}), 4, 4, 0, 0)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_are_a_partition_into_smaller_batches(world):
    labels = labels_of(dict.fromkeys(range(12), 8))
    for batch in epoch_batches(labels, 8, 4, 0, 0):
        parts = [shard_batch(batch, rank, world, images_per_identity=4) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts), batch)
        for part in parts:
            assert sorted(Counter(labels[part].tolist()).values()) == [4] * (8 // world)


def test_shards_that_do_not_divide_are_refused():
    batch = np.arange(24)  # P = 6, K = 4
    with pytest.raises(UserError, match=r"= 6 cannot be shared by 4 processes.*for example 8"):
        shard_batch(batch, 0, 4, images_per_identity=4)
    with pytest.raises(UserError, match="two identities each, for example 12"):
        shard_batch(batch, 0, 6, images_per_identity=4)
