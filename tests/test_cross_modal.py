"""Losses between images and sentences, pairs, search both ways and the second look: numbers by hand and loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.cross_modal import CrossModalConfig, SecondLook, Side, both_ways, nearest, overlap, search, sentence
from finetune.cross_modal_losses import (
    CrossModalLossesConfig,
    SharedIdentities,
    alignment,
    info_nce,
    similarity_distribution,
)
from finetune.pair_sampling import pair_batches
from recipes.errors import UserError

LOSSES = CrossModalLossesConfig()


def directions(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_alignment_by_hand():
    """Two people, cosines [[.6, .4], [.4, .6]]: every exponent is 0, so 2/2 (2 ln 2 + 2 ln 2) = 2.7726."""
    images = torch.eye(2)
    texts = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
    assert alignment(images, texts, torch.tensor([0, 1]), LOSSES).item() == pytest.approx(4 * math.log(2), abs=1e-6)
    assert 4 * math.log(2) == pytest.approx(2.7726, abs=1e-4)


def test_alignment_is_the_loop_over_pairs():
    images, texts, labels = directions(6, 8, seed=0), directions(6, 8, seed=1), torch.tensor([0, 0, 1, 2, 1, 0])
    total = 0.0
    for a in range(6):
        for b in range(6):
            s = float(images[a] @ texts[b])
            same = labels[a] == labels[b]
            total += math.log1p(math.exp(-10 * (s - 0.6)) if same else math.exp(40 * (s - 0.4)))
    assert alignment(images, texts, labels, LOSSES).item() == pytest.approx(2 / 6 * total, rel=1e-5)


def test_info_nce_by_hand():
    """Own key at cosine 0.8, negatives at 0.6 and 0.0, one key of the same person that does not count, T = 0.1."""
    queries, keys = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, 0.6]])
    queue = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    found = info_nce(queries, keys, queue, torch.tensor([True, False, True]), 0.1).item()
    assert found == pytest.approx(math.log(1 + math.exp(-2) + math.exp(-8)), abs=1e-6)
    assert info_nce(queries, keys, queue, torch.zeros(3, dtype=torch.bool), 0.1).item() == 0
    with_own = info_nce(queries, keys, queue, torch.ones(3, dtype=torch.bool), 0.1).item()
    assert with_own > 2, "or the mask does nothing"


def test_only_the_query_of_info_nce_gets_a_gradient_worth_having():
    queries, keys, queue = directions(3, 4, seed=0), directions(3, 4, seed=1), directions(5, 4, seed=2)
    queries.requires_grad_()
    info_nce(queries, keys, queue, torch.tensor([True, False, False, False, False]), 0.07).backward()
    moved = torch.zeros(3)
    for row in range(3):  # the gradient is a mixture of the own key and the one negative
        basis = torch.stack([keys[row], queue[0]]).T
        moved[row] = (queries.grad[row] - basis @ torch.linalg.lstsq(basis, queries.grad[row]).solution).norm()
    torch.testing.assert_close(moved, torch.zeros(3), atol=1e-5, rtol=0)


def test_similarity_distribution_by_hand():
    """Two people, cosines c on and -c off the diagonal: p = sigmoid(2c / T), and KL((p, 1-p) || (1, 0)) both ways."""
    c, temperature = 0.01, 0.02
    images, texts = torch.eye(2), torch.tensor([[c, -c], [-c, c]])
    p = 1 / (1 + math.exp(-2 * c / temperature))
    one = p * math.log(p / (1 + 1e-8)) + (1 - p) * math.log((1 - p) / 1e-8)
    found = similarity_distribution(images, texts, torch.tensor([0, 1]), temperature).item()
    assert found == pytest.approx(2 * one, rel=1e-5)
    alike = similarity_distribution(images, torch.full((2, 2), 0.3), torch.tensor([4, 4]), temperature).item()
    assert alike == pytest.approx(0, abs=1e-6), "one person: each has half"


def test_identities_are_told_apart_by_one_matrix_of_directions():
    torch.manual_seed(0)
    shared, features, labels = SharedIdentities(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    logits = features @ (shared.directions / shared.directions.norm(dim=1, keepdim=True)).T
    smooth = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
    wanted = -(smooth * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(shared(features, labels, 0.1), wanted)
    with torch.no_grad():
        shared.directions.mul_(7)
    torch.testing.assert_close(shared(features, labels, 0.1), wanted, msg="the length of a column does not matter")
    assert not torch.allclose(shared(2 * features, labels, 0.1), wanted), "that of a feature does"


def test_pairs_keep_a_sentence_with_its_image():
    labels = np.array([0, 0, 1, 1, 2, 2, 3])
    owners = np.array([0, 0, 1, 2, 2, 3, 3, 4, 5, 5])  # image 6 has no sentence
    found = pair_batches(labels, owners, (3, 2), seed=1, epoch=0)
    assert found.images.shape == found.sentences.shape == (1, 6)
    np.testing.assert_array_equal(owners[found.sentences], found.images)
    people = labels[found.images].reshape(-1, 3, 2)
    assert (people[:, :, 0] == people[:, :, 1]).all()
    assert all(len(set(batch[:, 0])) == 3 for batch in people)
    again = pair_batches(labels, owners, (3, 2), seed=1, epoch=0)
    np.testing.assert_array_equal(again.sentences, found.sentences)
    others = [pair_batches(labels, owners, (3, 2), 1, epoch).sentences.tolist() for epoch in range(1, 5)]
    assert found.sentences.tolist() not in others
    with pytest.raises(UserError, match="the training split has 3"):
        pair_batches(labels, owners, (4, 2), seed=1, epoch=0)


def test_all_sentences_come_in_the_long_run():
    labels, owners = np.repeat(np.arange(8), 3), np.repeat(np.arange(24), 2)
    seen = {int(s) for epoch in range(12) for s in pair_batches(labels, owners, (4, 4), 0, epoch).sentences.ravel()}
    assert seen == set(range(48))


def side(features: list[list[float]], pids: list[int]) -> Side:
    rows = np.array(features, np.float32)
    return Side(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.array(pids))


def test_both_ways_by_hand():
    """Images of persons 1, 1, 2 at 0, 40 and 80 degrees; captions of 1 at 10 and of 2 at 30."""
    angles = np.radians([0, 40, 80])
    images = side(np.stack([np.cos(angles), np.sin(angles)], axis=1).tolist(), [1, 1, 2])
    angles = np.radians([10, 30])
    texts = side(np.stack([np.cos(angles), np.sin(angles)], axis=1).tolist(), [1, 2])
    told = both_ways(images, texts, CrossModalConfig())
    # caption of 1: 0 (right), 40 (right), 80; caption of 2: 40, 0, 80 (right)
    assert told["t2i"]["rank1"] == told["t2i"]["rank1"] == pytest.approx(1 / 2)
    assert told["t2i"]["rank5"] == told["t2i"]["rank10"] == 1
    assert told["t2i"]["mAP"] == pytest.approx((1 + 1 / 3) / 2)
    # image at 0: caption 1 first; at 40: caption 2 first, wrong; at 80: caption 2 first
    assert told["i2t"]["rank1"] == pytest.approx(2 / 3)
    assert told["i2t"]["mAP"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert (told["images"], told["captions"]) == (3, 2)
    assert "t2i_second" not in told
    assert "text to image: rank 1/5/10 50.00 / 100.00 / 100.00, mAP 66.67" in sentence(told)


def test_the_overlap_by_hand():
    """Neighbours {1..5} and {3..7}: three shared of seven; 0.05 times that is 0.0214."""
    found = overlap(np.array([[1, 2, 3, 4, 5]]), np.array([[3, 4, 5, 6, 7], [1, 2, 3, 4, 5], [8, 9, 10, 11, 12]]), 13)
    np.testing.assert_allclose(found, [[3 / 7, 1, 0]], rtol=1e-6)
    assert 0.05 * found[0, 0] == pytest.approx(0.0214, abs=5e-5)


def slow_second_look(asked: np.ndarray, there: np.ndarray, k: int, alpha: float) -> np.ndarray:
    """The published way: a loop over all pairs with sets."""
    ours = [set(np.argsort(-(row @ there.T), kind="stable")[:k].tolist()) for row in asked]
    theirs = [set(np.argsort(-(row @ there.T), kind="stable")[:k].tolist()) for row in there]
    scores = np.empty((len(asked), len(there)))
    for a, mine in enumerate(ours):
        for b, other in enumerate(theirs):
            scores[a, b] = asked[a] @ there[b] + alpha * len(mine & other) / len(mine | other)
    return scores


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), asked=st.integers(1, 9), there=st.integers(5, 12), k=st.integers(1, 5))
def test_the_second_look_is_the_loop_over_pairs(seed, asked, there, k):
    a, b = (directions(count, 6, seed=seed + n).numpy() for n, count in enumerate((asked, there)))
    look = SecondLook(a, b, CrossModalConfig(k=k, alpha=0.05))
    np.testing.assert_allclose(look.scores(slice(0, asked)), slow_second_look(a, b, k, 0.05), atol=1e-6)
    np.testing.assert_allclose(look.scores(slice(asked - 1, asked)), look.scores(slice(0, asked))[-1:], atol=1e-6)


def toward(axis: int, *degrees: float) -> np.ndarray:
    """Directions that lean from the first axis toward another one, float32 [N, 3]."""
    rows = np.zeros((len(degrees), 3), np.float32)
    rows[:, 0], rows[:, axis] = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return rows


def test_the_second_look_by_hand():
    """The image nearest to the caption, at 15 degrees, has its neighbours elsewhere (overlap 1/5); those of the images
    at 20 to 22 degrees are the caption's own (2/4), which outweighs 0.9659 - 0.9397 with alpha = 0.1, not with 0.05."""
    images = Side(np.concatenate([toward(1, 15, 25, 30), toward(2, 20, 21, 22)]), np.array([2, 2, 2, 1, 1, 1]))
    texts = Side(toward(1, 0), np.array([1]))
    for alpha, best in ((0.05, 0), (0.1, 3)):
        look = SecondLook(texts.features, images.features, CrossModalConfig(k=3, alpha=alpha))
        np.testing.assert_allclose(
            look.scores(slice(0, 1))[0, [0, 3]], [0.9659 + alpha / 5, 0.9397 + alpha / 2], atol=1e-4
        )
        assert search(texts, images, ("caption", "image"), look.scores).rank1 == (best == 3)


def test_more_neighbours_than_rows_are_refused():
    with pytest.raises(UserError, match=r"cross_modal\.k = 31"):
        SecondLook(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), CrossModalConfig(k=31))


def test_nearest_in_parts_is_nearest_at_once(monkeypatch):
    asked, there = directions(20, 5, seed=1).numpy(), directions(15, 5, seed=2).numpy()
    whole = nearest(asked, there, 4)
    monkeypatch.setattr("finetune.cross_modal.BLOCK_BYTES", 1)
    np.testing.assert_array_equal(nearest(asked, there, 4), whole)
    assert (np.diff(whole, axis=1) > 0).all()
