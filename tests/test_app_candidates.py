"""The nearest images that a filter lets through, with any index, and re-ranking a few: against brute force."""

import faiss
import numpy as np
import pytest

from finetune.app_candidates import config_for, nearest, reranked, vectors
from finetune.rerank import RerankConfig, Reranked
from finetune.vector_index import VectorIndex


def unit(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF4,Flat", "IVF4,PQ4", "SQ8", "PCA8,IVF4,Flat"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.02])
def test_candidates_are_the_nearest_that_are_allowed(factory, share):
    stored, ids = unit(300, 16), np.arange(300, dtype=np.int64) * 3 + 5
    index = VectorIndex.build(factory, ids, stored, silent=True)
    index.nprobe = 4  # all cells
    allowed = np.random.default_rng(1).random(300) < share
    query = unit(1, 16, seed=2)[0]
    scores, found, complete = nearest(index, query, 20, allowed)
    truth = np.flatnonzero(allowed)[np.argsort(-(stored @ query)[allowed], kind="stable")][:20]
    if factory == "HNSW32":  # a walk through a graph does not come everywhere
        truth = truth[np.isin(ids[truth], found)]
        assert complete == (len(found) == min(20, allowed.sum()))
        assert len(found) >= (0.8 * 20 if share > 0.1 else 1)
    else:
        assert complete
    np.testing.assert_array_equal(found, ids[truth])
    np.testing.assert_allclose(scores, (stored @ query)[truth], atol=1e-5)
    np.testing.assert_allclose(vectors(index, found), stored[truth], atol=1e-6)


def test_an_index_that_does_not_look_everywhere_says_so():
    stored, ids = unit(300, 16), np.arange(300, dtype=np.int64)
    index = VectorIndex.build("IVF16,Flat", ids, stored, silent=True)
    index.nprobe = 1
    query = unit(1, 16, seed=2)[0]
    cells = index.cells
    cell = cells.quantizer.search(query[None], 1)[1][0, 0]
    there = faiss.rev_swig_ptr(cells.invlists.get_ids(int(cell)), cells.invlists.list_size(int(cell)))
    allowed = np.zeros(300, bool)
    allowed[there[:3]] = allowed[np.setdiff1d(ids, there)[:50]] = True
    scores, found, complete = nearest(index, query, 20, allowed)
    assert set(found) == set(there[:3])
    assert (np.diff(scores) <= 0).all()
    assert not complete


def test_nobody_is_allowed():
    index = VectorIndex.build("Flat", np.arange(5, dtype=np.int64), unit(5, 8), silent=True)
    scores, found, complete = nearest(index, unit(1, 8)[0], 3, np.zeros(5, bool))
    assert [len(scores), len(found), complete] == [0, 0, True]


def test_reranking_is_that_of_the_paper_on_the_candidates():
    query, candidates = unit(1, 16, seed=3)[0], unit(200, 16, seed=4)
    order, distances, used = reranked(query, candidates)
    assert [used.k1, used.k2, used.lam] == [20, 6, 0.3], "the published sizes"
    expected = -Reranked(query[None], candidates, RerankConfig(k1=20, k2=6, lam=0.3)).scores(slice(0, 1))[0]
    np.testing.assert_array_equal(order, np.argsort(expected, kind="stable"))
    np.testing.assert_allclose(distances, np.sort(expected))
    assert [(config_for(n).k1, config_for(n).k2) for n in (1, 10, 60, 100, 5000)] == [
        *[(1, 1), (1, 1), (6, 2), (10, 3), (20, 6)]
    ]
    for count in (1, 2, 3):
        assert sorted(reranked(query, candidates[:count])[0]) == list(range(count))
