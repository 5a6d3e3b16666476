"""The parts of MDPR by hand: circle softmax, attention, bilinear pooling, diversity, distillation, fusion."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.attention_diversity import attention_diversity
from finetune.attention_maker import AttentionMaker, AttentionMakerConfig, AttentionPooling, shares
from finetune.branch_heads import HardContent, StreamHead
from finetune.circle_softmax import CircleSoftmax, CircleSoftmaxConfig, circle_logits
from finetune.convolutions import Summed, embedding, fused
from finetune.distillation import MutualDistillation
from finetune.fusion import FusionConfig, FusionTree
from finetune.necks import GeM

PUBLISHED = CircleSoftmaxConfig()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_circle_logits_are_the_golden_numbers():
    """Target at cosine 1: 64 * 0.35 * 0.35 = 7.84; another class at 0: -7.84; by hand 0.5: 64 * 0.85 * (0.5 -+ ...)."""
    found = circle_logits(torch.tensor([[1.0, 0.0, 0.5], [0.5, -0.4, -1.0]]), torch.tensor([0, 0]), PUBLISHED)
    expected = [[7.84, -7.84, 64 * 0.85 * 0.15], [64 * 0.85 * (0.5 - 0.65), 0.0, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_factors_of_circle_logits_have_no_gradient():
    """d logit / d c is s times the factor alone: 64 * 0.85 for the label's class at 0.5, 64 * 0.35 for another at 0."""
    cosines = torch.tensor([[0.5, 0.0]], requires_grad=True)
    for place, expected in ((0, 64 * 0.85), (1, 64 * 0.35)):
        (slope,) = torch.autograd.grad(circle_logits(cosines, torch.tensor([0]), PUBLISHED)[0, place], cosines)
        assert slope[0, place] == pytest.approx(expected)
        assert slope[0, 1 - place] == 0


def test_circle_softmax_sees_directions_only():
    classifier = CircleSoftmax(PUBLISHED, 8, 5)
    features, labels = drawn(4, 8), torch.tensor([0, 1, 2, 4])
    first = classifier(features, labels)
    with torch.no_grad():
        classifier.weight *= torch.rand(5, 1) + 0.5
    torch.testing.assert_close(classifier(7 * features, labels), first)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(features, labels), classifier(features, labels.clone()))
        assert classifier(features.bfloat16(), labels).dtype == torch.float32


def test_generalised_mean_is_golden_and_does_not_underflow():
    pool = GeM()
    assert pool.p.requires_grad
    assert pool.p.item() == 3
    assert pool(torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)).item() == pytest.approx(12 ** (1 / 3))  # 2.2894
    maps = torch.cat([torch.zeros(1, 1, 4, 2), 1e-7 * torch.ones(1, 1, 4, 2)], dim=1).requires_grad_()
    with torch.no_grad():
        pool.p.fill_(9.0)  # (1e-6)^9 is no float32
    found = pool(maps)
    found.sum().backward()
    torch.testing.assert_close(found, torch.full((1, 2), 1e-6))
    assert bool(torch.isfinite(pool.p.grad))
    assert bool(torch.isfinite(maps.grad).all())


def test_generalised_mean_has_the_gradient_of_the_formula():
    maps = (drawn(2, 3, 4, 2).abs().double() + 0.1).requires_grad_()
    power = torch.tensor(3.3, dtype=torch.float64, requires_grad=True)
    plain = maps.flatten(2).pow(power).mean(dim=2).pow(1 / power)
    expected = torch.autograd.grad(plain.square().sum(), [maps, power])
    pool = GeM()
    with torch.no_grad():
        pool.p.fill_(3.3)
    found = torch.autograd.grad(pool(maps).square().sum(), [maps, pool.p])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-4, atol=1e-5)


def test_maps_share_each_place_with_a_background_that_is_dropped():
    scores = drawn(2, 3, 4, 2)
    found = shares(scores)
    assert found.shape == (2, 2, 4, 2)
    torch.testing.assert_close(found, torch.softmax(scores, 1)[:, :2])
    torch.testing.assert_close(found.sum(1) + torch.softmax(scores, 1)[:, 2], torch.ones(2, 4, 2))
    assert bool((found.sum(1) < 1).all())


def test_what_makes_the_maps_is_both_convolutions_summed():
    block = Summed(5, 3).eval()
    maps = drawn(2, 5, 6, 4)
    expected = F.conv2d(maps, block.point.weight) + F.conv2d(maps, block.square.weight, padding=1)
    expected = expected / math.sqrt(1 + block.norm.eps)
    torch.testing.assert_close(block(maps), F.relu(expected), rtol=1e-4, atol=1e-5)
    assert [name for name, _ in block.named_parameters() if "bias" in name] == ["norm.bias"]


def test_guidance_gives_the_mid_level_the_scores_of_the_last_one():
    guided = AttentionMaker(AttentionMakerConfig(maps=2), (5, 7)).eval()
    alone = AttentionMaker(AttentionMakerConfig(maps=2, guidance=False), (5, 7)).eval()
    assert (guided.mid.point.in_channels, alone.mid.point.in_channels) == (5 + 3, 5)
    mid, last, other = drawn(2, 5, 8, 4), drawn(2, 7, 8, 4, seed=1), drawn(2, 7, 8, 4, seed=2)
    for maker, differs in ((guided, True), (alone, False)):
        one, two = maker(mid, last), maker(mid, other)
        assert not torch.equal(one.last, two.last)
        assert torch.equal(one.mid, two.mid) != differs
    coarse = guided(mid, last[:, :, ::2, ::2])
    assert (coarse.last.shape, coarse.mid.shape) == ((2, 2, 4, 2), (2, 2, 8, 4))


def test_attention_pooling_by_hand():
    """Each map has weights of its own and sees the features times its attention."""
    pooling = AttentionPooling(2, 4, 3).eval()
    maps, attention = drawn(2, 4, 3, 2), torch.rand(2, 2, 3, 2)
    found = pooling(maps, attention)
    assert found.shape == (2, 2, 3)
    for place, embed in enumerate(pooling.embeddings):
        seen = embed(maps * attention[:, place : place + 1]).clamp(min=1e-6)
        torch.testing.assert_close(found[:, place], seen.pow(3).mean(dim=(2, 3)).pow(1 / 3))
    changed = attention.clone()
    changed[:, 1] = 0.5
    assert torch.equal(pooling(maps, changed)[:, 0], found[:, 0])
    assert not torch.equal(pooling(maps, changed)[:, 1], found[:, 1])


def test_diversity_by_hand():
    """Two images, three maps: cosines of the first image 1, 0, 0, of the second 0, 0, 1; attention sums to 6 in all."""
    a, b = [1.0, 0.0], [0.0, 2.0]
    features = torch.tensor([[a, [3.0, 0.0], b], [a, b, b]])
    attention = torch.full((2, 3, 2, 1), 0.5)
    assert attention_diversity(features, attention, 0.0).item() == pytest.approx((1 + 1) / 2)
    assert attention_diversity(features, attention, 0.001).item() == pytest.approx(1 + 0.001 * 6 / 2)
    assert attention_diversity(features[:, :1], attention[:, :1], 0.0).item() == 0


def test_distillation_is_the_mean_of_two_cosines_and_stops_at_the_other_branch():
    distil = MutualDistillation(6)
    first, second = drawn(8, 6).requires_grad_(), drawn(8, 6, seed=1).requires_grad_()
    p, q = (predict(z) for predict, z in zip(distil.predictors, (first, second), strict=True))
    by_hand = -0.5 * (F.cosine_similarity(p, second).mean() + F.cosine_similarity(q, first).mean())
    loss = distil(first, second)
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert -1 <= loss.item() <= 1
    (own,) = torch.autograd.grad(loss, first, retain_graph=True)
    (alone,) = torch.autograd.grad(-0.5 * F.cosine_similarity(p, second.detach()).mean(), first)
    torch.testing.assert_close(own, alone)  # nothing of P2's cosine, whose target is the first branch
    with torch.no_grad():
        for predict in distil.predictors:
            assert [type(layer) for layer in predict] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
            assert predict[0].bias is None
    perfect = MutualDistillation(6)
    perfect.predictors = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert perfect(first, first).item() == pytest.approx(-1)


def test_parts_are_equal_pieces_from_head_to_foot_with_weights_of_their_own():
    content, maps = HardContent(5, 3, 2).eval(), drawn(2, 5, 8, 4)
    whole, parts = content(maps)
    assert [part.shape for part in (whole, *parts)] == [(2, 3, 8, 4), (2, 3, 4, 4), (2, 3, 4, 4)]
    torch.testing.assert_close(parts[1], content.parts[1](maps[:, :, 4:]))
    assert not torch.equal(content.parts[0](maps[:, :, 4:]), parts[1])
    uneven = HardContent(5, 3, 3).eval()(maps)[1]
    assert [part.shape[2] for part in uneven] == [3, 3, 2]


@pytest.mark.parametrize(("width", "dim"), [(None, 48), (20, 20), (8, 8)])
def test_fusion_joins_all_maps_and_its_width_is_a_knob(width, dim):
    tree = FusionTree(FusionConfig(width=width), 12).eval()
    whole, last, mid = (drawn(2, 12, 6, 2, seed=seed).abs() for seed in range(3))
    parts = list(drawn(2, 12, 6, 2, seed=4).abs().split(3, dim=2))
    found = tree(whole, parts, last, mid)
    assert found.shape == (2, dim, 6, 2)
    assert tree.dim == dim
    for place in range(4):
        given = [whole, parts, last, mid]
        given[place] = [0 * part for part in parts] if place == 1 else 0 * given[place]
        assert not torch.equal(tree(*given), found)


def test_fusion_has_the_published_size():
    """65.5 of 164 million weights: 3 x 3 and 1 x 1 convolutions without bias at 512, 1024, 1024 and 2048 channels."""
    with torch.device("meta"):
        tree = FusionTree(FusionConfig(), 512)
    assert weights(tree) == sum(10 * c * c + 2 * c for c in (512, 1024, 1024, 2048))
    assert round(weights(tree) / 1e6, 1) == 65.5
    assert weights(fused(4, 6)) == 4 * 6 + 9 * 36 + 12
    assert weights(embedding(4, 6)) == 4 * 6 + 12


def test_a_head_compares_after_a_norm_whose_bias_stays():
    head = StreamHead(PUBLISHED, 6, 4)
    assert not head.norm.bias.requires_grad
    maps = drawn(5, 6, 4, 2).abs()
    found = head.feature(maps)
    pooled = maps.pow(3).mean(dim=(2, 3)).pow(1 / 3)
    expected = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + head.norm.eps).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    plain = StreamHead(PUBLISHED, 6, 4, pools=False).eval()
    assert not [name for name, _ in plain.named_parameters() if name.startswith("pool")]
    assert plain.feature(pooled).shape == (5, 6)
