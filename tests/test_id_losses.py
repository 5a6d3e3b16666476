"""Identity losses against numbers worked out by hand and against loops."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from finetune.id_losses import (
    IdLosses,
    IdLossesConfig,
    batch_hard_triplet,
    gathered,
    pairwise_distances,
    smoothed_cross_entropy,
)

# on a line: identity 0 at 0 and 3, identity 1 at 7 and 8.
# anchor 0: farthest 3, nearest 7; 3: 3, 4; 7: 1, 4; 8: 1, 5
LINE = torch.tensor([[0.0], [3.0], [7.0], [8.0]])
LINE_LABELS = torch.tensor([0, 0, 1, 1])
GAPS = [3 - 7, 3 - 4, 1 - 4, 1 - 5]


def losses_of(config: IdLossesConfig) -> IdLosses:
    """For features of length 1 and three identities."""
    return IdLosses(config, 1, 3)


def by_loops(features: np.ndarray, labels: np.ndarray, margin: float | None) -> float:
    losses = []
    for a in range(len(labels)):
        farthest = [
            math.dist(features[a], features[b]) for b in range(len(labels)) if b != a and labels[b] == labels[a]
        ]
        nearest = [math.dist(features[a], features[b]) for b in range(len(labels)) if labels[b] != labels[a]]
        if farthest and nearest:
            gap = max(farthest) - min(nearest)
            losses.append(math.log1p(math.exp(gap)) if margin is None else max(0.0, gap + margin))
    return sum(losses) / len(losses)


def test_distances_by_hand():
    expected = [[1e-6, 5.0], [5.0, 1e-6]]
    np.testing.assert_allclose(pairwise_distances(torch.tensor([[0.0, 0.0], [3.0, 4.0]])), expected, rtol=1e-6)


def test_soft_margin_by_hand():
    expected = sum(math.log1p(math.exp(gap)) for gap in GAPS) / 4
    assert batch_hard_triplet(LINE, LINE_LABELS).item() == pytest.approx(expected, rel=1e-6)


def test_hard_margin_by_hand():
    # [2 - 4]+ + [2 - 1]+ + [2 - 3]+ + [2 - 4]+ = 1
    assert batch_hard_triplet(LINE, LINE_LABELS, margin=2.0).item() == pytest.approx(1 / 4, rel=1e-6)
    assert batch_hard_triplet(LINE, LINE_LABELS, margin=0.5).item() == 0.0


@pytest.mark.parametrize("margin", [None, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_mining_equals_loops(seed, margin):
    rng = np.random.default_rng(seed)
    # identities of different size, not in order, one with a single row, one row twice as the sampler may give it
    labels = rng.permutation(np.repeat([4, 9, 2, 7], [4, 3, 5, 1]))
    features = rng.normal(size=(13, 6)).astype(np.float32)
    twins = np.flatnonzero(labels == 4)[:2]
    features[twins[1]] = features[twins[0]]
    loss = batch_hard_triplet(torch.from_numpy(features), torch.from_numpy(labels), margin)
    assert loss.item() == pytest.approx(by_loops(features, labels, margin), rel=1e-5)


def test_gradient_by_hand():
    # one anchor pair a = 0, p = 1, n = 3 and margin 10: each term is linear in the coordinates
    # anchor 0: |1-0| - |3-0|; anchor 1: |1-0| - |3-1|; the third has no other row of its identity and does not count
    features = torch.tensor([[0.0], [1.0], [3.0]], requires_grad=True)
    batch_hard_triplet(features, torch.tensor([0, 0, 1]), margin=10.0).backward()
    # d/dx0: (-1 + 1 - 1)/2, d/dx1: (1 + 1 + 1)/2, d/dx2: (-1 - 1)/2
    np.testing.assert_allclose(features.grad, [[-0.5], [1.5], [-1.0]], rtol=1e-6)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_no_triplet_gives_zero_and_a_finite_gradient(labels):
    features = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = batch_hard_triplet(features, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0.0
    np.testing.assert_array_equal(features.grad, np.zeros((3, 4)))


def test_equal_rows_give_a_finite_gradient():
    features = torch.ones(4, 3, requires_grad=True)
    batch_hard_triplet(features, LINE_LABELS).backward()
    assert features.grad.isfinite().all()


def test_distances_stay_in_float32_under_autocast():
    # bfloat16 keeps 8 bits: 100 and 100.25 are the same number there
    features = torch.tensor([[100.0], [100.25]])
    with torch.autocast("cpu", torch.bfloat16):
        assert pairwise_distances(features)[0, 1].item() == pytest.approx(0.25, rel=1e-4)


# logits (ln 2, 0, 0): p = (1/2, 1/4, 1/4)
LOGITS, LABEL = torch.tensor([[math.log(2), 0.0, 0.0]]), torch.tensor([0])


def test_cross_entropy_by_hand():
    losses = losses_of(IdLossesConfig(triplet_weight=0.0, id_weight=2.0))(LOGITS, torch.zeros(1, 1), LABEL)
    assert losses.keys() == {"id"}
    assert losses["id"].item() == pytest.approx(2 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("over", "target"),
    # epsilon = 0.3 over C = 3 classes: the label gets 1 - 0.3 + 0.1, or over the two others: it gets 1 - 0.3
    [("all", 0.8), ("others", 0.7)],
)
def test_label_smoothing_by_hand(over, target):
    config = IdLossesConfig(label_smoothing=0.3, smooth_over=over, triplet_weight=0.0)
    found = losses_of(config)(LOGITS, torch.zeros(1, 1), LABEL)["id"]
    assert found.item() == pytest.approx(target * math.log(2) + (1 - target) * math.log(4), rel=1e-6)


@pytest.mark.parametrize("over", ["all", "others"])
def test_label_smoothing_is_the_entropy_against_the_target(over):
    rng = np.random.default_rng(0)
    logits, labels, epsilon = rng.normal(size=(7, 5)), rng.integers(5, size=7), 0.1
    rest = epsilon / 5 if over == "all" else epsilon / 4
    target = np.full((7, 5), rest)
    target[np.arange(7), labels] += 1 - epsilon if over == "all" else 1 - epsilon - rest
    np.testing.assert_allclose(target.sum(axis=1), 1.0)
    expected = -(target * (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))).sum(axis=1).mean()
    found = smoothed_cross_entropy(torch.from_numpy(logits).float(), torch.from_numpy(labels), epsilon, over)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_no_smoothing_is_plain_in_both_forms():
    for over in ("all", "others"):
        assert smoothed_cross_entropy(LOGITS, LABEL, 0.0, over).item() == pytest.approx(math.log(2), rel=1e-6)


def test_weights_and_margin_reach_the_triplet():
    losses = losses_of(IdLossesConfig(id_weight=0.0, triplet_weight=3.0, margin=2.0))(None, LINE, LINE_LABELS)
    assert losses.keys() == {"triplet"}
    assert losses["triplet"].item() == pytest.approx(3 / 4, rel=1e-6)


def test_config_ranges():
    assert IdLossesConfig().margin is None
    with pytest.raises(ValidationError):
        IdLossesConfig(margin=-0.1)
    with pytest.raises(ValidationError):
        IdLossesConfig(label_smoothing=1.0)
    with pytest.raises(ValidationError):
        IdLossesConfig(mining="batch")


def test_the_defaults_are_the_published_ones():
    config = IdLossesConfig()
    assert (config.id_weight, config.triplet_weight, config.centre_weight) == (1.0, 1.0, 0.0)
    assert (config.margin, config.label_smoothing, config.mining) == (None, 0.0, "local")
    assert not list(losses_of(config).state_dict()), "without centres nothing has to be saved"


def test_centres_move_once_a_step_by_all_images_since_the_last():
    losses = IdLosses(IdLossesConfig(centre_weight=0.5, triplet_weight=0.0, id_weight=0.0), 1, 2)
    losses.centres.centres.copy_(torch.tensor([[1.0], [10.0]]))
    first = losses(None, LINE[:2], LINE_LABELS[:2])["centre"]
    assert first.item() == pytest.approx(0.5 * ((0 - 1) ** 2 + (3 - 1) ** 2) / 2)
    losses(None, LINE[2:], LINE_LABELS[2:])
    assert losses.centres.centres.flatten().tolist() == [1.0, 10.0]
    losses.end_step()
    # each by a quarter of the sum of its distances: (0 - 1) + (3 - 1) and (7 - 10) + (8 - 10)
    assert losses.centres.centres.flatten().tolist() == pytest.approx([1.25, 8.75])
    losses.end_step()
    assert losses.centres.centres.flatten().tolist() == pytest.approx([1.25, 8.75]), "nothing was seen since"
    losses.eval()(None, LINE, LINE_LABELS)
    losses.end_step()
    assert losses.centres.centres.flatten().tolist() == pytest.approx([1.25, 8.75]), "an evaluation moves nothing"


def test_one_process_mines_globally_as_locally():
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4).repeat_interleave(2)
    local, everywhere = (IdLossesConfig(id_weight=0.0, mining=mining) for mining in ("local", "global"))
    found = [IdLosses(config, 3, 4)(None, features, labels)["triplet"] for config in (local, everywhere)]
    assert torch.equal(*found)
    assert torch.equal(gathered(features), features)
