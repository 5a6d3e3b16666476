"""Identity losses and the neck against numbers worked out by hand and against loops."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from finetune.id_losses import IdLosses, IdLossesConfig, batch_hard_triplet, pairwise_distances
from finetune.necks import BNNeck, NecksConfig

# on a line: identity 0 at 0 and 3, identity 1 at 7 and 8.
# anchor 0: farthest 3, nearest 7; 3: 3, 4; 7: 1, 4; 8: 1, 5
LINE = torch.tensor([[0.0], [3.0], [7.0], [8.0]])
LINE_LABELS = torch.tensor([0, 0, 1, 1])
GAPS = [3 - 7, 3 - 4, 1 - 4, 1 - 5]


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


def test_cross_entropy_and_smoothing_by_hand():
    # logits (ln 2, 0, 0): p = (1/2, 1/4, 1/4). Plain: ln 2. epsilon = 0.3 over C = 3: target weights 0.8, 0.1, 0.1
    logits, labels = torch.tensor([[math.log(2), 0.0, 0.0]]), torch.tensor([0])
    plain = IdLosses(IdLossesConfig(triplet_weight=0.0))(logits, torch.zeros(1, 2), labels)
    assert plain.keys() == {"id"}
    assert plain["id"].item() == pytest.approx(math.log(2), rel=1e-6)
    smooth = IdLosses(IdLossesConfig(label_smoothing=0.3, id_weight=2.0))(logits, torch.zeros(1, 2), labels)
    expected = 2.0 * (0.8 * math.log(2) + 0.2 * math.log(4))
    assert smooth["id"].item() == pytest.approx(expected, rel=1e-6)


def test_weights_and_margin_reach_the_triplet():
    losses = IdLosses(IdLossesConfig(id_weight=0.0, triplet_weight=3.0, margin=2.0))(None, LINE, LINE_LABELS)
    assert losses.keys() == {"triplet"}
    assert losses["triplet"].item() == pytest.approx(3 / 4, rel=1e-6)


def test_config_ranges():
    assert IdLossesConfig().margin is None
    with pytest.raises(ValidationError):
        IdLossesConfig(margin=-0.1)
    with pytest.raises(ValidationError):
        IdLossesConfig(label_smoothing=1.0)


def test_neck_starts_as_published():
    torch.manual_seed(0)
    neck = BNNeck(NecksConfig(), dim=64, classes=500)
    assert {name for name, p in neck.named_parameters() if p.requires_grad} == {"norm.weight", "classifier.weight"}
    assert (neck.norm.weight == 1).all()
    assert (neck.norm.bias == 0).all()
    # 32,000 draws: the sample deviation is within 0.4 % of sigma (1 sigma), so 2 % is safe
    assert neck.classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)


def test_neck_by_hand():
    neck = BNNeck(NecksConfig(), dim=1, classes=2)
    with torch.no_grad():
        neck.classifier.weight.copy_(torch.tensor([[1.0], [-2.0]]))
    # mean 3, biased deviation 1 -> normalised -1 and 1
    logits = neck(torch.tensor([[2.0], [4.0]]))
    np.testing.assert_allclose(logits.detach(), [[-1.0, 2.0], [1.0, -2.0]], atol=1e-4)


def test_neck_embeds_either_side():
    features = torch.tensor([[3.0, 4.0]])
    before, after = BNNeck(NecksConfig(), 2, 2).eval(), BNNeck(NecksConfig(feature="after"), 2, 2).eval()
    for neck in (before, after):
        neck.norm.running_mean.copy_(torch.tensor([3.0, 0.0]))
    np.testing.assert_allclose(before.embed(features), [[0.6, 0.8]], atol=1e-6)
    np.testing.assert_allclose(after.embed(features).detach(), [[0.0, 1.0]], atol=1e-6)
