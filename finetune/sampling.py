"""P×K batches: P identities with K images each, as the batch-hard triplet needs them."""

from typing import TypeVar

import numpy as np
from pydantic import Field

from recipes.errors import UserError
from recipes.load import Section
from shards.seeds import generator

Places = TypeVar("Places", np.ndarray, range)


class SamplingConfig(Section):
    """The shape of the global batch."""

    identities_per_batch: int = Field(16, ge=2)  # P, over all processes
    images_per_identity: int = Field(4, ge=2)  # K


def _groups(labels: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images of each identity, shuffled and cut into groups of `size`.

    The rest of an identity is left out for this epoch; an identity with fewer than `size` images gives one group, drawn
    with replacement. Returns the groups int64 [G, size], those of one identity adjacent, and the number of groups of
    each identity, int64 [C].
    """
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((rng.random(len(labels)), inverse))  # grouped by identity, shuffled inside
    starts = np.cumsum(counts) - counts
    many = np.maximum(counts // size, 1)
    identity = np.repeat(np.arange(len(counts)), many)
    number = np.arange(len(identity)) - np.repeat(np.cumsum(many) - many, many)  # of the group in its identity
    places = (starts[identity] + number * size)[:, None] + np.arange(size)
    short = counts[identity] < size
    drawn = rng.integers(counts[identity][short, None], size=(int(short.sum()), size))
    places[short] = starts[identity][short, None] + drawn
    return order[places], many


def epoch_batches(
    labels: np.ndarray, identities_per_batch: int, images_per_identity: int, seed: int, epoch: int
) -> np.ndarray:
    """The batches of an epoch, a pure function of its arguments.

    Repeatedly draws P = identities_per_batch distinct identities among those that have groups of
    K = images_per_identity left, until fewer than P have; what is left then is left out for this epoch.

    labels: int64 [N], the identity of each image. Returns int64 [batches, P * K] of positions in `labels`, the K images
    of an identity adjacent.
    """
    present = len(np.unique(labels))
    if present < identities_per_batch:
        raise UserError(
            f"a batch of sampling.identities_per_batch = {identities_per_batch} identities cannot be filled: the "
            f"training split has {present}; set sampling.identities_per_batch to at most {present}"
        )
    rng = generator(seed, "sampling", epoch)
    groups, many = _groups(labels, images_per_identity, rng)
    coming = np.cumsum(many) - many  # the next group of each identity
    end = np.cumsum(many)
    open_ids = np.arange(present)  # the first `left` are the identities that have groups
    left = present
    batches = []
    while left >= identities_per_batch:
        picks = rng.choice(left, identities_per_batch, replace=False)
        identities = open_ids[picks]
        batches.append(groups[coming[identities]].reshape(-1))
        coming[identities] += 1
        # the last open identity takes a finished one's place; from the back, so that no pick is moved before its turn
        for pick in np.sort(picks[coming[identities] == end[identities]])[::-1]:
            left -= 1
            open_ids[pick] = open_ids[left]
    return np.stack(batches)


def shard_batch(batch: Places, rank: int, world: int, images_per_identity: int) -> Places:
    """The part of a global P×K batch that process `rank` of `world` takes: P/world identities, K images each.

    batch: int64 [P * K] of epoch_batches, or a range of as many. Returns P * K / world of them. Triplets are mined
    inside the part, so a part needs two identities.
    """
    assert 0 <= rank < world
    assert len(batch) % images_per_identity == 0
    identities = len(batch) // images_per_identity
    if identities % world or identities // world < 2:
        nearest = max(2 * world, -(-identities // world) * world)
        raise UserError(
            f"sampling.identities_per_batch = {identities} cannot be shared by {world} processes: it must be a "
            f"multiple of {world} with at least two identities each, for example {nearest}"
        )
    part = len(batch) // world
    return batch[rank * part : (rank + 1) * part]
