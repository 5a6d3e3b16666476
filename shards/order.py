"""Which sample is the n-th of an epoch: a pure function of (shard sizes, seed, epoch, n).

An epoch's shuffled shards, laid end to end, are cut into C ranges of samples, the lanes, that differ by at most one in
length. Position n belongs to slot n mod C and is the (n div C)-th sample of that slot's lane; inside a lane the order
is shuffled in windows. So every epoch is an exact permutation, any position is found in O(1), and a reader of the
positions n = r (mod R), R dividing C, touches only its own lanes, from front to back.
"""

import functools
from bisect import bisect_right
from collections.abc import Iterable

import numpy as np
from pydantic import Field

from recipes.errors import UserError
from recipes.load import Section
from shards.seeds import generator


class OrderConfig(Section):
    """How an epoch is shuffled."""

    lanes: int = Field(192, ge=1)  # C; the number of processes must divide it
    window: int = Field(1024, ge=1)  # samples shuffled together inside a lane; bounds the shards open at a time


class EpochOrder:
    """The order of one epoch.

    shard_sizes: int [S], samples of each shard; row numbers count the samples through the shards in this order.
    """

    def __init__(self, shard_sizes: np.ndarray, seed: int, epoch: int, config: OrderConfig):
        self.seed, self.epoch, self.lanes, self.window = seed, epoch, config.lanes, config.window
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.total = int(sizes.sum())
        self.shards = generator(seed, "order/shards", epoch).permutation(len(sizes))
        ends = np.cumsum(sizes[self.shards])  # in the shuffled sequence
        # lists, because one number is looked up in them at a time; a row is a place plus the shift of its shard
        self.ends = ends.tolist()
        self.shift = ((np.cumsum(sizes) - sizes)[self.shards] - (ends - sizes[self.shards])).tolist()
        # the slots that hold one sample more are the first ones, so that positions 0..N-1 have no gap
        lengths = self.total // self.lanes + (np.arange(self.lanes) < self.total % self.lanes)
        turn = generator(seed, "order/lanes", epoch).permutation(self.lanes)
        starts = np.empty(self.lanes, dtype=np.int64)
        starts[turn] = np.cumsum(lengths[turn]) - lengths[turn]
        self.lane_start, self.lane_length = starts.tolist(), lengths.tolist()
        self._window = functools.lru_cache(maxsize=2 * self.lanes)(self._shuffle_window)

    def _shuffle_window(self, slot: int, number: int) -> list[int]:
        start = number * self.window
        size = min(self.window, self.lane_length[slot] - start)
        order = generator(self.seed, "order/window", self.epoch, slot, number).permutation(size)
        return (order + (self.lane_start[slot] + start)).tolist()

    def row(self, n: int) -> int:
        """Row number of the n-th sample of the epoch, 0 <= n < total."""
        assert 0 <= n < self.total, f"position {n} outside an epoch of {self.total} samples"
        turn, slot = divmod(n, self.lanes)
        number, inside = divmod(turn, self.window)
        place = self._window(slot, number)[inside]
        return place + self.shift[bisect_right(self.ends, place)]

    def shards_near(self, turn: int, slot: int) -> range:
        """Places, in the shuffled sequence, of the shards from which lane `slot` reads in this window and the next."""
        start = turn // self.window * self.window
        first = self.lane_start[slot] + start
        last = self.lane_start[slot] + min(start + 2 * self.window, self.lane_length[slot]) - 1
        return range(bisect_right(self.ends, first), bisect_right(self.ends, last) + 1)


class Order:
    """The order of a whole run: position (samples consumed so far, by all processes) -> (epoch, row)."""

    def __init__(self, shard_sizes: np.ndarray, seed: int, config: OrderConfig):
        self.sizes, self.seed, self.config = np.asarray(shard_sizes), seed, config
        self.samples = int(self.sizes.sum())
        if self.samples == 0:
            raise UserError("the shard set holds no samples in the chosen splits; choose other splits or pack images")
        # a step may reach over the end of an epoch
        self._epoch = functools.lru_cache(maxsize=2)(lambda epoch: EpochOrder(self.sizes, seed, epoch, config))

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, n = divmod(position, self.samples)
        return epoch, self._epoch(epoch).row(n)

    def shards_near(self, positions: Iterable[int]) -> list[int]:
        """Shards that hold these positions or come next in their lanes: what to fetch, the most urgent ones first."""
        seen: dict[tuple[int, int], None] = {}
        for position in positions:
            epoch, n = divmod(position, self.samples)
            order = self._epoch(epoch)
            turn, slot = divmod(n, order.lanes)
            places = order.shards_near(turn, slot)
            for distance, place in enumerate(places):
                shard = int(order.shards[place])
                if self.sizes[shard]:
                    seen.setdefault((distance, shard))
        return list(dict.fromkeys(shard for _, shard in sorted(seen, key=lambda pair: pair[0])))

    def __getstate__(self) -> tuple:
        return self.sizes, self.seed, self.config

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)


def rank_positions(step: int, batch: int, rank: int, ranks: int) -> range:
    """Positions that process `rank` of `ranks` takes in a step: those = rank (mod ranks) in that step."""
    return range(step * batch + rank, (step + 1) * batch, ranks)


def check_ranks(ranks: int, batch: int, lanes: int) -> None:
    """Refuse a number of processes that does not divide the global batch and the lanes; name the nearest one."""
    if batch % ranks == 0 and lanes % ranks == 0:
        return
    fitting = [n for n in range(1, batch + 1) if batch % n == 0 and lanes % n == 0]
    nearest = min(fitting, key=lambda n: abs(n - ranks))
    raise UserError(
        f"{ranks} processes do not divide the global batch loader.batch={batch} and order.lanes={lanes}; "
        f"the nearest number of processes that does is {nearest}"
    )
