"""An index finds what exact search finds and tells true cosines; vectors keep their ids when others come and go."""

import json
import subprocess
import sys

import faiss
import numpy as np
import pytest
import small

from finetune.vector_index import VectorIndex, default_factory, exact_neighbours
from recipes.errors import UserError

FACTORIES = ["Flat", "IVF8,Flat", "IVF8,PQ4x4", "HNSW8", "HNSW8_SQ8", "SQ8", "PCA16,Flat", "OPQ4_16,IVF8,PQ4x4"]


def people(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Unit vectors in groups of ten."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((-(-count // 10), dim)).repeat(10, 0)[:count]
    vectors = centres + 0.4 * rng.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def built(factory: str, vectors: np.ndarray, first: int = 0) -> VectorIndex:
    return VectorIndex.build(factory, np.arange(first, first + len(vectors)), vectors, silent=True)


@pytest.mark.parametrize("factory", FACTORIES)
def test_any_index_gives_true_cosines_keeps_ids_and_forgets(factory, tmp_path):
    vectors = people(620)
    index = built(factory, vectors[:500], first=100)
    index.add(np.arange(600, 700), vectors[500:600], vectors[:600], silent=True)
    kept = np.ones(600, bool)
    kept[[0, 7, 250, 599]] = False
    index.remove(kept, vectors[:600][kept], silent=True)
    ids = np.arange(100, 700)[kept]
    index.save(tmp_path / "index")
    stored = None if index.exact else vectors[:600][kept]
    index = VectorIndex.load(tmp_path / "index", factory, ids, stored, nprobe=8)
    index.add(np.arange(700, 720), vectors[600:], None if stored is None else vectors[np.r_[ids - 100, 600:620]], True)
    np.testing.assert_array_equal(index.ids, [*ids, *range(700, 720)])
    queries = people(40, seed=1)
    scores, found = index.search(queries, 5)
    assert found.shape == scores.shape == (40, 5)
    assert set(found.ravel().tolist()) <= set(index.ids.tolist())
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, vectors[found - 100]), atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    own = index.search(vectors[[1, 300, 598, 619]], 1)[1][:, 0]
    np.testing.assert_array_equal(own, [101, 400, 698, 719])
    exact = np.argsort(-(queries @ vectors[index.ids - 100].T), axis=1)[:, :5]
    right = np.mean([len(np.intersect1d(a, index.ids[b])) for a, b in zip(found, exact, strict=True)]) / 5
    assert right == 1 if factory in ("Flat", "IVF8,Flat", "PCA16,Flat") else right > 0.8


def test_only_what_holds_the_vectors_counts_as_exact():
    vectors = people(300)
    exact = {factory: built(factory, vectors).exact for factory in FACTORIES}
    assert [factory for factory, is_exact in exact.items() if is_exact] == ["Flat", "IVF8,Flat", "HNSW8"]


def test_exact_neighbours_are_those_of_brute_force():
    vectors = people(200)
    vectors[50] = vectors[20]  # equal vectors: each finds the other, not itself
    rows = np.array([0, 20, 50, 199])
    scores = vectors[rows] @ vectors.T
    scores[np.arange(4), rows] = -2
    found = exact_neighbours(vectors, rows, 5)
    np.testing.assert_array_equal(np.sort(found), np.sort(np.argsort(-scores, axis=1)[:, :5]))
    assert found[1, 0] == 50
    assert found[2, 0] == 20


def test_nprobe_is_the_smallest_that_reaches_the_recall():
    vectors = people(2000)
    index = built("IVF64,Flat", vectors)
    told = index.tune(vectors, sample=200)
    rows = np.unique(np.linspace(0, 1999, 200).astype(int))
    scores = vectors[rows] @ vectors.T
    scores[np.arange(len(rows)), rows] = -2
    truth = np.argsort(-scores, axis=1)[:, :10]

    def recall(nprobe: int) -> float:
        found = index.search(vectors[rows], 11, nprobe)[1]
        return float(np.mean([len(np.intersect1d(np.setdiff1d(f, [r]), t)) / 10
                              for f, r, t in zip(found, rows, truth, strict=True)]))  # fmt: skip

    assert told["nprobe"] == index.nprobe > 1
    assert told["recall"] == pytest.approx(recall(index.nprobe), abs=1e-9)
    assert recall(index.nprobe) >= 0.95 > recall(index.nprobe // 2)
    assert built("Flat", vectors).tune(vectors) is None
    assert built("SQ8", vectors).tune(vectors)["recall"] > 0.95


def test_nprobe_stops_where_more_gains_little(monkeypatch):
    vectors = people(600)
    index = built("IVF64,Flat", vectors)
    recalls = {1: 0.3, 2: 0.7, 4: 0.8, 8: 0.803, 16: 0.804}
    monkeypatch.setattr(index, "recall", lambda *given: recalls[given[-1]])
    told = index.tune(vectors)
    assert [told["nprobe"], told["recall"], index.nprobe] == [4, 0.8, 4]


def test_cells_that_hold_too_few_give_fewer_answers():
    index = built("IVF8,Flat", people(80))
    scores, ids = index.search(people(5, seed=3), 60, nprobe=1)
    assert (ids < 0).any()
    assert (scores[ids < 0] == -np.inf).all()
    assert (ids[:, 0] >= 0).all()


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        ("Flatt", "'Flatt' is nothing that faiss can make of 16 numbers"),
        ("IVF8,PQ5", "'IVF8,PQ5' is nothing that faiss"),
        ("IDMap,Flat", "leave IDMap away"),
        ("IVF64,Flat", "cannot be trained on 30 images"),
    ],
)
def test_an_index_that_cannot_be_is_told(factory, told):
    with pytest.raises(UserError, match=told):
        built(factory, people(30))


def test_flat_up_to_a_million():
    assert default_factory(1_000_000, 384) == "Flat"
    assert default_factory(1_000_001, 384) == "IVF4096,PQ48"
    assert default_factory(10_000_000, 768) == "IVF16384,PQ96"
    codes = default_factory(2_000_000, 100)
    assert faiss.index_factory(100, codes).d == 100, "the bytes of a code divide the numbers of a vector"


def test_the_bench_ends_with_its_line():
    command = [
        sys.executable,
        str(small.ROOT / "bench/search.py"),
        "--vectors",
        "3000",
        "--dim",
        "64",
        "--queries",
        "100",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=small.environment(), timeout=100)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    flat = told["lines"][0]
    assert [told["name"], flat["factory"], flat["recall"]] == ["search", "Flat", 1]
    chosen = [line for line in told["lines"] if line["factory"] == "IVF256,PQ8" and line["chosen"]]
    assert told["ratio"] == pytest.approx(chosen[0]["rate"] / flat["rate"], abs=0.01)
    alone = next(line["recall"] for line in told["lines"] if line["factory"].endswith("alone"))
    assert alone < chosen[0]["recall"] <= 1
