"""R24: the evaluation against the rules in plain Python and fractions, on searches in which everything goes wrong."""

from fractions import Fraction

import brute_force
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune import metrics
from finetune.metrics import Protocol, Retrieval, evaluate
from recipes.errors import UserError
from shards.embeddings import EmbeddingTable
from shards.schema import UNKNOWN

CLOSE = 1e-12
MAX_RANK = 10
Search = tuple[EmbeddingTable, EmbeddingTable]


@st.composite
def searches(draw: st.DrawFn) -> Search:
    """A query and a gallery table. Features are small whole numbers, so scores are exact and often equal; there are
    queries without a match, one camera only, junk, distractors, images without labels, and queries in the gallery."""
    dim, cameras = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 4]))
    known = draw(st.sampled_from([[1, 2], [1, 1, 2, 3, 0, -1], [1, 2, 3, 4, 5, UNKNOWN, 0, -1]]))
    cameras = [UNKNOWN] if draw(st.integers(0, 9)) == 0 else list(range(cameras))

    def table(rows: int, pids: list[int], keys: list[str]) -> EmbeddingTable:
        cells = draw(st.lists(st.integers(-2, 2), min_size=rows * dim, max_size=rows * dim))
        labels = draw(st.lists(st.sampled_from(pids), min_size=rows, max_size=rows))
        seen = draw(st.lists(st.sampled_from(cameras), min_size=rows, max_size=rows))
        features = np.array(cells, np.float32).reshape(rows, dim)
        return EmbeddingTable(features, np.array(labels, np.int64), np.array(seen, np.int64), keys)

    queries, images = draw(st.integers(1, 8)), draw(st.integers(1, 40))
    keys = draw(st.permutations([f"g{number}" for number in range(images)]))
    shared = draw(st.integers(0, min(queries, images)))
    asked = [f"g{number}" for number in range(shared)] + [f"q{number}" for number in range(queries - shared)]
    return table(queries, [*known, 99], asked), table(images, known, keys)


def taken(table: EmbeddingTable, rows: np.ndarray) -> EmbeddingTable:
    """These rows of a table."""
    return EmbeddingTable(table.features[rows], table.pids[rows], table.camids[rows], table.keys[rows])


def found(search: Search, same_camera: str, chunk: int) -> Retrieval | None:
    """What the evaluation says; None where no query has a match."""
    try:
        return evaluate(*search, Protocol(same_camera=same_camera), MAX_RANK, chunk)
    except UserError:
        return None


def differing(search: Search, same_camera: str, chunk: int) -> list[str]:
    """Names of the numbers that are not those of brute force, to 1e-12."""
    expected, result = brute_force.search(*search, MAX_RANK, same_camera), found(search, same_camera, chunk)
    counted = [one for one in expected if one]
    if not counted or result is None:
        return [] if not counted and result is None else ["whether any query counts"]
    exact = {
        name: [float(one[name]) if one else skipped for one in expected]
        for name, skipped in (("ap", np.nan), ("inp", np.nan), ("first", 0), ("matches", 0))
    }
    exact["mAP"] = float(sum(one["ap"] for one in counted) / len(counted))
    exact["mINP"] = float(sum(one["inp"] for one in counted) / len(counted))
    hits = zip(*(one["curve"] for one in counted), strict=True)
    exact["cmc"] = [float(Fraction(sum(column), len(counted))) for column in hits]
    exact |= {"valid": len(counted), "skipped": len(expected) - len(counted)}
    return [
        name
        for name, value in exact.items()
        if not np.allclose(getattr(result, name), value, rtol=0, atol=CLOSE, equal_nan=True)
    ]


def moved(search: Search, same_camera: str, seed: int) -> list[str]:
    """The invariants: queries in another order, and a gallery in another order where no scores are equal."""
    query, gallery = search
    rng, wrong = np.random.default_rng(seed), []
    plain = found(search, same_camera, 3)
    order = rng.permutation(len(query))
    other = found((taken(query, order), gallery), same_camera, 5)
    if (plain is None) != (other is None):
        return ["whether any query counts"]
    if plain is not None and not np.array_equal(plain.ap[order], other.ap, equal_nan=True):
        wrong.append("order of the queries")
    # a last number of the features makes all scores of a query differ, by whole numbers still
    ranks = np.arange(len(gallery), dtype=np.float32)[:, None]
    apart = EmbeddingTable(np.hstack([gallery.features * 64, ranks / 64]), gallery.pids, gallery.camids, gallery.keys)
    asked = EmbeddingTable(
        np.hstack([query.features, np.ones((len(query), 1), np.float32)]), query.pids, query.camids, query.keys
    )
    order = rng.permutation(len(gallery))
    one, two = (found((asked, table), same_camera, 4) for table in (apart, taken(apart, order)))
    if (one is None) != (two is None):
        return [*wrong, "whether any query counts"]
    if one is not None and not (np.array_equal(one.ap, two.ap, equal_nan=True) and np.array_equal(one.cmc, two.cmc)):
        wrong.append("order of the gallery")
    return wrong


def many(examples: int) -> dict[str, int]:
    """So many searches, each under both rules and with every way of ranking: numbers compared, and wrong ones."""
    counts = {"times": 0, "wrong": 0, "skipped": 0, "ties": 0}

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(searches(), st.integers(0, 2**32), st.integers(1, 6))
    def check(search: Search, seed: int, chunk: int) -> None:
        query, gallery = search
        scores = query.features @ gallery.features.T
        counts["ties"] += any(len(np.unique(row)) < len(row) for row in scores)
        for same_camera in ("drop", "keep"):
            counts["skipped"] += sum(one is None for one in brute_force.search(query, gallery, 1, same_camera))
            wrong = moved(search, same_camera, seed)
            for limit in (0, 2, 1000):  # by sorting, by either, by passes
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(metrics, "MANY", limit)
                    wrong += differing(search, same_camera, chunk)
            counts["times"] += 1
            counts["wrong"] += bool(wrong)
            assert wrong == []

    check()
    return counts


@pytest.mark.row("R24")
def test_searches_of_every_kind(figures):
    counts = many(40)
    figures("R24", injected="drawn searches", times=counts["times"], lost=0, wrong=counts["wrong"])
    assert counts["wrong"] == 0
    assert counts["skipped"] > 40
    assert counts["ties"] > 20


@pytest.mark.soak
@pytest.mark.row("R24")
def test_many_searches_of_every_kind(figures):
    counts = many(2000)
    note = f"{counts['ties']:,} galleries with equal scores, {counts['skipped']:,} queries without a match; to 1e-12"
    injected = "drawn searches: ties, no match, one camera, permuted"
    figures("R24", injected=injected, times=counts["times"], lost=0, wrong=counts["wrong"], note=note)
    assert counts["wrong"] == 0


@pytest.mark.row("R24")
def test_one_camera_leaves_nothing_to_find():
    """Every gallery image of the person is on the query's camera: no query counts, and that is told."""
    features = np.eye(3, dtype=np.float32)
    pids, camids = np.array([1, 2, 3]), np.zeros(3, np.int64)
    tables = [EmbeddingTable(features, pids, camids, [f"{kind}{n}" for n in range(3)]) for kind in "qg"]
    with pytest.raises(UserError, match="none of the 3 queries"):
        evaluate(*tables)
    assert evaluate(*tables, Protocol(same_camera="keep")).mAP == 1.0
