"""Open-set identification: whether a search finds the person when there, and nobody when not.

Some identities are taken out of the gallery. DIR, the detection and identification rate at rank 1, is the share of the
queries whose person is in the gallery that find that person first, with a cosine of at least the threshold; FAR here is
the share of the other queries that find anybody with such a cosine. Phillips, Grother and Micheals, "Evaluation methods
in face recognition", Handbook of Face Recognition, 2005, chapter 14. Nothing is binned: the thresholds are exact.
"""

from dataclasses import dataclass

import numpy as np

from shards.seeds import generator

ENOUGH = 10  # false accepts that a rate must stand for, else it is not reported


@dataclass(frozen=True)
class Point:
    """What a threshold does."""

    threshold: float  # cosine from which on a pair is accepted
    far: float  # the false accept rate of this threshold; at most the one that was asked for
    rate: float  # TAR of pairs, or DIR in the open set


def take_out(pids: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Identities that leave the gallery, ascending: `share` of those among the queries, rounded; int64.

    pids: int64 [M], of the queries; identities are > 0.
    """
    identities = np.unique(pids[pids > 0])
    chosen = generator(seed, "open set").permutation(len(identities))[: round(share * len(identities))]
    return np.sort(identities[chosen])


@dataclass(frozen=True, eq=False)
class OpenSet:
    """First answers of a search in a gallery that lacks some of the queries' people."""

    share: float  # of the queries' identities that were taken out
    seed: int  # which these are
    best: np.ndarray  # float32 [K], cosine of the first answer to queries whose person is there
    right: np.ndarray  # bool [K], whether that answer is the person
    alone: np.ndarray  # float32 [U], cosine of the first answer to queries whose person is not there

    def at(self, far: float) -> Point | None:
        """The lowest threshold with at most this FAR; None where it would stand for fewer than ENOUGH queries."""
        unknown = len(self.alone)
        if far * unknown < ENOUGH or not len(self.best):
            return None
        allowed = int(np.count_nonzero(np.arange(1, unknown + 1) / unknown <= far))
        highest = np.sort(self.alone)[::-1]
        # just above the best answer that may not be accepted
        threshold = np.nextafter(highest[allowed], np.float32(2)) if allowed < unknown else np.float32(-1)
        reached = np.count_nonzero(self.alone >= threshold) / unknown
        return Point(float(threshold), reached, float(np.mean(self.right & (self.best >= threshold))))
