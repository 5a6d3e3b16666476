"""The second stage of a search: by brute force, with all candidates and with few, and through the commands."""

import numpy as np
import pytest
import small
import torch
from PIL import Image

from finetune import alignment_picture
from finetune.aligned_distance import all_elements, diagonal, pairwise, shortest
from finetune.rescoring import Rescored, RescoringConfig

Q, G, H, C = 5, 23, 4, 6


def drawn(seed: int = 0):
    random = np.random.default_rng(seed)
    globals_ = [random.normal(size=(n, 8)).astype(np.float32) for n in (Q, G)]
    globals_ = tuple(part / np.linalg.norm(part, axis=1, keepdims=True) for part in globals_)
    locals_ = tuple(random.normal(size=(n, H, C)).astype(np.float16) for n in (Q, G))
    return globals_, locals_


def search(kind: str, candidates: int, weight: float = 0.5, seed: int = 0) -> Rescored:
    config = RescoringConfig(distances=(kind,), candidates=candidates, weight=weight)
    return Rescored(*drawn(seed), pairwise, kind, config)


def expected(kind: str, weight: float = 0.5, seed: int = 0) -> np.ndarray:
    """All distances [Q, G], pair by pair."""
    (query, gallery), locals_ = drawn(seed)
    pairs = all_elements(*(torch.from_numpy(part).float() for part in locals_))
    if kind == "unaligned":
        return diagonal(pairs).numpy()
    local = shortest(pairs).numpy()
    if kind == "local":
        return local
    return np.linalg.norm(query[:, None] - gallery[None], axis=-1) + weight * local


@pytest.mark.parametrize("kind", ["local", "both", "unaligned"])
@pytest.mark.parametrize("candidates", [0, G, 10 * G])
def test_with_all_candidates_it_is_the_whole_distance(kind, candidates):
    scores = search(kind, candidates).scores(slice(0, Q))
    np.testing.assert_allclose(-scores, expected(kind), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["local", "both", "unaligned"])
@pytest.mark.parametrize("candidates", [1, 2, 7, G - 1])
def test_candidates_come_first_by_the_distance_and_the_others_as_before(kind, candidates):
    (query, gallery), _ = drawn(3)
    found, apart = search(kind, candidates, seed=3), expected(kind, seed=3)
    for row in range(Q):
        globally = np.argsort(-(query[row] @ gallery.T), kind="stable")
        chosen, rest = globally[:candidates], globally[candidates:]
        chosen = chosen[np.argsort(apart[row, chosen], kind="stable")]
        assert found.order(row).tolist() == [*chosen.tolist(), *rest.tolist()]


@pytest.mark.parametrize("candidates", [0, 6])
def test_parts_change_nothing(candidates):
    whole, found = search("both", candidates).scores(slice(0, Q)), search("both", candidates)
    parts = np.concatenate([found.scores(slice(i, i + 2)) for i in range(0, Q - 1, 2)] + [found.scores(slice(4, 5))])
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_of_equal_cosines_the_first_rows_are_candidates():
    same = np.ones((9, 1), np.float32)
    local = np.random.default_rng(0).normal(size=(9, H, C)).astype(np.float16)
    config = RescoringConfig(distances=("local",), candidates=4)
    found = Rescored((same[:1], same), (local[:1], local), pairwise, "local", config)
    assert sorted(found.order(0)[:4].tolist()) == [0, 1, 2, 3]
    assert found.order(0)[4:].tolist() == [4, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with local features, searched by all distances."""
    base = tmp_path_factory.mktemp("aligned")
    people = small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)
    line = small.arguments("finetune/run.py", base / "run", people, "method.name=aligned", "method.id_losses={}",
                           "benchmark.rescoring.distances=[local,both]", "benchmark.rescoring.candidates=7",
                           ckpt="none")  # fmt: skip
    assert small.run(line) == 0
    return base / "run", people


def test_a_run_tells_all_distances(trained):
    out, _ = trained
    told = small.json_of(out / "results.json")
    assert [(one["distance"], one["candidates"], one["weight"]) for one in told["rescored"]] == [
        ("local", 7, 1.0), ("both", 7, 1.0)]  # fmt: skip
    assert all(set(one) >= {"mAP", "rank1", "intervals", "cmc", "average_precision"} for one in told["rescored"])
    assert told["rescored"][0]["mAP"] != told["mAP"]
    table = (out / "table.md").read_text()
    assert "first 7 by aligned stripes" in table
    assert "first 7 by global feature and aligned stripes" in table
    assert "![Which stripe is compared with which: 2 queries" in table
    with Image.open(out / "alignment.png") as picture:
        assert picture.size[0] > 2 * 96
    assert "first 7 by aligned stripes" in (out / "report.html").read_text()


def test_an_evaluation_finds_the_same(trained, tmp_path):
    out, people = trained
    line = [str(small.ROOT / "finetune/eval.py"), "--ckpt", str(out), "--data", str(people), "--out", str(tmp_path),
            "benchmark.rescoring.distances=[local,both]", "benchmark.rescoring.candidates=7", "benchmark.strips=0",
            "benchmark.workers=0", "precision=no"]  # fmt: skip
    assert small.run(line) == 0
    first, second = (small.json_of(folder / "results.json")["rescored"] for folder in (out, tmp_path))
    assert first == second
    assert not (tmp_path / "alignment.png").exists()


@pytest.mark.parametrize("ckpt", ["histogram", "none"])
def test_a_model_without_local_features_is_refused(trained, tmp_path, capsys, ckpt):
    line = small.arguments("finetune/eval.py", tmp_path / "out", trained[1], "benchmark.rescoring.distances=[local]",
                           ckpt=ckpt)  # fmt: skip
    assert small.run(line) == 2
    assert "benchmark.rescoring needs a model with local features" in capsys.readouterr().err


@pytest.mark.parametrize(("kinds", "expected"), [("local,unaligned", "local"), ("unaligned,both", "both"),
                                                 ("unaligned", None)])  # fmt: skip
def test_the_picture_is_of_an_aligned_search(tmp_path_factory, tmp_path, monkeypatch, kinds, expected):
    people = small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)
    asked, order = [], Rescored.order
    monkeypatch.setattr(Rescored, "order", lambda self, row: asked.append(self.kind) or order(self, row))
    line = small.arguments("finetune/run.py", tmp_path / "run", people, "method.name=aligned", "method.id_losses={}",
                           f"benchmark.rescoring.distances=[{kinds}]", ckpt="none")  # fmt: skip
    assert small.run(line) == 0
    assert set(asked) == ({expected} if expected else set())
    assert (tmp_path / "run" / alignment_picture.NAME).exists() == bool(expected)
