"""Pairs of images counted by their cosine: false and true accept rates of every threshold in the memory of a table.

The pairs of MSMT17 are 958 million, so they are counted in cells of 2^-18 (3.8e-6) of the cosine and not kept.
Thresholds lie on the edges of the cells. Nothing else is rounded: the rates stated for a threshold are the exact ones
of that threshold.
"""

from dataclasses import dataclass

import numpy as np

from finetune.open_set import ENOUGH, Point

CELLS = 1 << 18  # of a length of 1 of the cosine; a power of two, so that the cell of a float32 is found exactly
LAST = 2 * CELLS + 1  # cell of a cosine of 1; cell 1 begins at -1, cell 0 holds what is left out
LEFT_OUT = -1 - 1 / CELLS  # falls into cell 0
CURVE = 100  # points of a stored ROC curve


def cells(cosines: np.ndarray) -> np.ndarray:
    """Cell of each cosine, int64; cosines: float32 in -1..1 or LEFT_OUT."""
    # scaling by a power of two is exact, and so is the floor; adding before the floor would round
    return np.floor(cosines * np.float32(CELLS)).astype(np.int64) + (CELLS + 1)


def edge(cell: int) -> float:
    """Smallest cosine of a cell; of LAST + 1 a threshold that nothing reaches."""
    return (cell - 1) / CELLS - 1


@dataclass(frozen=True, eq=False)
class Pairs:
    """How many pairs fall into each cell of the cosine."""

    same: np.ndarray  # int64 [LAST + 1], pairs of one person
    different: np.ndarray  # int64 [LAST + 1], pairs of different people

    def rates(self) -> tuple[np.ndarray, np.ndarray]:
        """FAR and TAR of a threshold at the edge of each cell; float64 [LAST + 2] from the cells 0 .. LAST + 1."""
        far, tar = (
            np.append(np.cumsum(counts[::-1])[::-1], 0) / max(counts.sum(), 1) for counts in (self.different, self.same)
        )
        return far, tar

    def at(self, far: float) -> Point | None:
        """The lowest threshold with at most this FAR; None where it would stand for fewer than ENOUGH pairs."""
        if far * self.different.sum() < ENOUGH:
            return None
        reached, tar = self.rates()
        cell = max(1, int(np.argmax(reached <= far)))
        return Point(edge(cell), float(reached[cell]), float(tar[cell]))

    def equal_error(self) -> tuple[float, float]:
        """Mean of FAR and 1 - TAR where they are nearest to each other, and that threshold, the middle of equals."""
        far, tar = (values[1:] for values in self.rates())
        gap = np.abs(far + tar - 1)
        equals = np.flatnonzero(gap == gap.min())
        cell = int(equals[len(equals) // 2])
        return float(far[cell] + 1 - tar[cell]) / 2, edge(cell + 1)

    def curve(self, points: int = CURVE) -> list[list[float]]:
        """[threshold, FAR, TAR] at FARs evenly spaced in the logarithm, from 1 to that of a single pair."""
        far, tar = self.rates()
        wanted = np.geomspace(1, 1 / max(self.different.sum(), 1), points)
        found = sorted({max(1, int(np.argmax(far <= value))) for value in wanted})
        return [[edge(cell), float(far[cell]), float(tar[cell])] for cell in found]

    def histogram(self, bins: int = 256) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges float64 [bins + 1] over -1..1, and pairs of one person and of different people, int64 [bins].

        bins: a power of two up to 2^19. A cosine of exactly 1 is in the last bin.
        """
        assert (2 * CELLS) % bins == 0, bins
        counted = []
        for counts in (self.same, self.different):
            summed = counts[1:LAST].reshape(bins, -1).sum(axis=1)
            summed[-1] += counts[LAST]
            counted.append(summed)
        return np.linspace(-1, 1, bins + 1), *counted
