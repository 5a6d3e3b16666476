"""FAISS on a gallery of a million images: time to build, recall@10 and queries a second of flat, IVF and IVF-PQ.

    python bench/search.py                         1,000,000 x 384: some minutes, 4 GB of memory, 1.5 GB in --scratch
    python bench/search.py --vectors 50000         smaller

Synthetic vectors with what features of people have: identities of 8 images within groups of similar people, most of
the variance in few directions, length 1; cosines of about 0.6 for one identity, 0.2 within a group, 0 else. How much an
approximate index finds depends on such numbers: a real gallery measures its own recall when it is built. The queries
are further images of the same identities. Everything is searched by finetune/vector_index.py, as finetune/search.py
does: the codes of IVF-PQ give candidates, which are ordered by the cosine of the vectors on disk; the row "codes alone"
is without that. recall@10: share of the true ten nearest.

The line of JSON compares the exhaustive search with the default index above a million images at the nprobe that the
build chose itself.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
import pairs
from rich.console import Console
from rich.table import Table

from finetune.vector_index import VectorIndex, default_factory
from recipes.progress import Meter

IMAGES = 8  # of an identity: two of the ten nearest are others
GROUPS = 300  # of similar people
BLOCK = 50_000  # vectors
STEPS = (1, 4, 16, 64, 256)  # nprobe
ALONE = 100  # queries that are searched one by one


class Line(NamedTuple):
    """A row of the table."""

    factory: str
    build_s: float
    mb: float  # what the index holds in memory
    nprobe: int
    chosen: bool  # by the build itself
    recall: float
    rate: float  # queries a second, all at once
    single_ms: float  # median of a query on its own


class People:
    """Draws unit vectors of identities; the same for the same seed."""

    def __init__(self, identities: int, dim: int):
        self.identities, self.dim = identities, dim
        rng = np.random.default_rng(0)
        self.spread = (1 / np.sqrt(1 + np.arange(dim) / 8)).astype(np.float32)  # standard deviation by direction
        self.groups = self._normal(rng, GROUPS)
        self.people = 0.5 * self.groups[rng.integers(GROUPS, size=identities)] + 0.7 * self._normal(rng, identities)

    def _normal(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.standard_normal((count, self.dim), dtype=np.float32) * self.spread

    def draw(self, who: np.ndarray, seed: int) -> np.ndarray:
        """One image each of some identities, float32 [n, D]. who: int64 [n]."""
        vectors = self.people[who] + 0.7 * self._normal(np.random.default_rng([1, seed]), len(who))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def gallery(people: People, count: int, path: Path) -> np.ndarray:
    """`count` images in a file, mapped, float32 [N, D]."""
    with open(path, "wb") as file, Meter(count, "draw", "vectors") as meter:
        for start in range(0, count, BLOCK):
            who = np.arange(start, min(start + BLOCK, count)) % people.identities
            file.write(people.draw(who, start).tobytes())
            meter.advance(len(who))
    return np.memmap(path, np.float32, "r", shape=(count, people.dim))


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the true neighbours that were found. Both int64 [M, k]."""
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]) / truth.shape[1])


def measured(search, queries: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Recall@10, queries a second, ms of a single query. search: queries -> ids [M, 10]."""
    search(queries[:ALONE])  # what is needed for the first time only
    start = time.perf_counter()
    found = search(queries)
    rate = len(queries) / (time.perf_counter() - start)
    single = []
    for row in range(min(ALONE, len(queries))):
        start = time.perf_counter()
        search(queries[row : row + 1])
        single.append(time.perf_counter() - start)
    return recall(found, truth), rate, 1000 * float(np.median(single))


def lines_of(factory: str, vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> list[Line]:
    """Build one index and search it with every nprobe. truth: rows of the ten nearest, int64 [M, 10]."""
    start = time.perf_counter()
    index = VectorIndex.build(factory, np.arange(len(vectors)), vectors)
    build_s = time.perf_counter() - start
    mb = code_mb(index)
    if index.cells is None:
        return [Line(factory, build_s, mb, 0, True, *measured(lambda q: index.search(q, 10)[1], queries, truth))]
    chosen = index.tune(vectors)["nprobe"]
    lines = []
    for nprobe in sorted({*(step for step in STEPS if step <= index.cells.nlist), chosen}):
        found = measured(lambda q, n=nprobe: index.search(q, 10, n)[1], queries, truth)
        lines.append(Line(factory, build_s, mb, nprobe, nprobe == chosen, *found))
    if not index.exact:
        index.cells.nprobe = chosen
        found = measured(lambda q: index.index.search(q, 10)[1], queries, truth)
        lines.append(Line(f"{factory}, codes alone", build_s, mb, chosen, False, *found))
    return lines


def code_mb(index: VectorIndex) -> float:
    """Memory of the codes and ids, MiB; cells and tables beside them are some MB."""
    inner = index.index.index if isinstance(index.index, faiss.IndexIDMap) else index.index
    return index.index.ntotal * (inner.sa_code_size() + 8) / 2**20


def table(lines: list[Line], title: str) -> Table:
    """For the terminal."""
    found = Table(title=title, title_justify="left")
    for name in ("index", "build", "memory", "nprobe", "recall@10", "queries/s", "one query"):
        found.add_column(name, justify="left" if name == "index" else "right")
    for line in lines:
        nprobe = "" if not line.nprobe else f"{line.nprobe}{' (chosen)' if line.chosen else ''}"
        found.add_row(line.factory, f"{line.build_s:.1f} s", f"{line.mb:,.0f} MB", nprobe, f"{line.recall:.3f}",
                      f"{line.rate:,.0f}", f"{line.single_ms:.2f} ms")  # fmt: skip
    return found


def main() -> None:
    """Build, search, print the table and the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--scratch", type=Path, help="folder for the vectors; default: that of temporary files")
    given = parser.parse_args()
    people = People(-(-given.vectors // IMAGES), given.dim)
    queries = people.draw(np.random.default_rng(2).integers(people.identities, size=given.queries), 10**9)
    quantised = default_factory(max(given.vectors, 1_000_001), given.dim)
    if given.vectors < 1_000_000:
        cells = 2 ** round(np.log2(4 * np.sqrt(given.vectors)))
        quantised = f"IVF{cells},{quantised.partition(',')[2]}"
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="search-") as scratch:
        vectors = gallery(people, given.vectors, Path(scratch, "vectors.f32"))
        truth = faiss.knn(queries, vectors, 10, metric=faiss.METRIC_INNER_PRODUCT)[1]
        lines = lines_of("Flat", vectors, queries, truth)
        for factory in (f"{quantised.partition(',')[0]},Flat", quantised):
            lines += lines_of(factory, vectors, queries, truth)
    size = f"{given.vectors:,} x {given.dim}, {given.queries:,} queries, 10 answers"
    Console(width=120).print(table(lines, size))
    flat, ours = lines[0], next(line for line in lines if line.factory == quantised and line.chosen)
    numbers = {"ratio": round(ours.rate / flat.rate, 2), "ours": round(1000 / ours.rate, 4),
               "textbook": round(1000 / flat.rate, 4)}  # fmt: skip
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    rows = [{key: round(value, 4) if isinstance(value, float) else value for key, value in line._asdict().items()}
            for line in lines]  # fmt: skip
    pairs.report("search", numbers, "ms a query", pairs.peak_mb(), threads, size=size, lines=rows)


if __name__ == "__main__":
    main()
