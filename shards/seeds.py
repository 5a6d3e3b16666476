"""The random numbers of a sample: a pure function of a few integers.

Counter-based (Philox 4x64, Salmon et al. 2011), so no state is kept, nothing is restored on resume, and the numbers do
not depend on the process, the worker or what was drawn before.
"""

import zlib

import numpy as np


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """The generator that belongs to (seed, purpose, counters).

    seed: of the run, >= 0. purpose: what the numbers are for ("views", "order", ...); different purposes are
    independent. counters: at most three integers >= 0, usually (epoch, sample, view).
    """
    assert len(counters) <= 3, "Philox has three free counter words beside the one that numpy advances"
    key = np.array([seed, zlib.crc32(purpose.encode())], dtype=np.uint64)
    counter = np.zeros(4, dtype=np.uint64)
    counter[1 : 1 + len(counters)] = counters
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
