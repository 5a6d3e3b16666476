"""Poolings and BNNeck against numbers worked out by hand."""

import numpy as np
import pytest
import torch

from finetune import backbones
from finetune.backbones import BackboneConfig
from finetune.necks import BNNeck, NecksConfig, Pooling, generalised_mean
from pretrain.backbone import Tokens
from recipes.errors import UserError

# one image, D = 2, eight patches, two part tokens
PATCHES = torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 8], [0, 1], [0, 1], [0, 1], [2, 2]])[None]
TOKENS = Tokens(torch.tensor([[10.0, 20.0]]), PATCHES, torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]))


def pooled(kind: str | None, tokens: Tokens = TOKENS) -> list[float]:
    pooling = Pooling(NecksConfig(pooling=kind), 2)
    found = pooling(tokens)
    assert found.shape == (len(tokens.cls), pooling.dim)
    assert found.dtype == torch.float32
    return found[0].tolist()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (None, [10, 20]),
        ("cls", [10, 20]),
        ("avg", [12 / 8, 13 / 8]),
        ("max", [4, 8]),
        ("avg_max", [(4 + 2) / 2, (8 + 2) / 2]),  # of the first and of the last four patches
        ("cls_parts", [10, 20, 2, 4]),
        # cubes: 1 + 8 + 27 + 64 + 8 = 108 and 512 + 3 + 8 = 523, over eight patches
        ("gem", [(108 / 8) ** (1 / 3), (523 / 8) ** (1 / 3)]),
        ("cls_gem", [10 + (108 / 8) ** (1 / 3), 20 + (523 / 8) ** (1 / 3)]),
    ],
)
def test_poolings_by_hand(kind, expected):
    assert pooled(kind) == pytest.approx(expected, rel=1e-5)


def test_gem_golden_number():
    # p = 3 of (1, 2, 3): the third root of 12
    assert generalised_mean(torch.tensor([[[1.0], [2.0], [3.0]]]), 3.0).item() == pytest.approx(2.2894, abs=1e-4)


def test_gem_lies_between_mean_and_maximum_and_learns_its_power():
    patches = torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(generalised_mean(patches, 1.0), patches.mean(dim=1))
    assert (generalised_mean(patches, 200.0) - patches.amax(dim=1)).abs().max() < 0.02
    pooling = Pooling(NecksConfig(pooling="gem"), 3)
    assert pooling.p.item() == 3.0
    pooling(Tokens(torch.zeros(2, 3), patches)).sum().backward()
    assert pooling.p.grad.item() > 0  # a higher power gives a higher mean
    assert not list(Pooling(NecksConfig(pooling="cls_gem"), 3).parameters()), "3 for good, as published"


def test_gem_refuses_signed_features_in_training_only():
    signed = Tokens(TOKENS.cls, PATCHES - 1)
    with pytest.raises(UserError, match="signed, and half of them would be lost"):
        pooled("gem", signed)
    # as published on signed tokens: what is below counts as 1e-6
    expected = 10 + ((1 + 8 + 27 + 1) / 8) ** (1 / 3)
    assert pooled("cls_gem", signed)[0] == pytest.approx(expected, rel=1e-5)
    Pooling(NecksConfig(pooling="gem"), 2).eval()(signed)  # an exported graph must not branch on values


def test_gem_takes_the_features_of_a_resnet_and_refuses_those_of_a_vit():
    images = torch.randn(2, 3, 64, 32)
    for name, works in (("resnet18", True), ("vit_tiny_patch16_224", False)):
        config = BackboneConfig(name=name, drop_path=0.0)
        backbone = backbones.build(backbones.arguments_of(config, (64, 32))).eval()
        pooling = Pooling(NecksConfig(pooling="gem"), backbone.dim)
        with torch.no_grad():
            tokens = backbone(images)
        if works:
            assert pooling(tokens).shape == (2, 512)
        else:
            with pytest.raises(UserError, match="signed"):
                pooling(tokens)


def test_part_tokens_are_registers_of_the_backbone():
    images = torch.randn(2, 3, 64, 32)
    config = BackboneConfig(name="vit_tiny_patch16_224", depth=2, registers=3, drop_path=0.0)
    backbone = backbones.build(backbones.arguments_of(config, (64, 32))).eval()
    pooling = Pooling(NecksConfig(pooling="cls_parts"), backbone.dim)
    with torch.no_grad():
        tokens = backbone(images)
        whole = backbone.vit.forward_features(images)
    expected = torch.cat([whole[:, 0], whole[:, 1:4].mean(dim=1)], dim=1)
    torch.testing.assert_close(pooling(tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("registers", [None, torch.zeros(1, 0, 2)])
def test_parts_without_part_tokens_are_an_error(registers):
    with pytest.raises(UserError, match=r"backbone\.registers=3"):
        pooled("cls_parts", TOKENS._replace(registers=registers))


def test_groups_that_do_not_come_out_are_an_error():
    with pytest.raises(UserError, match="7 are no multiple"):
        pooled("avg_max", TOKENS._replace(patches=PATCHES[:, :7]))


def test_half_precision_tokens_pool_in_float32():
    found = pooled("avg", Tokens(*(part.bfloat16() for part in TOKENS)))
    assert found == pytest.approx([12 / 8, 13 / 8])


def test_neck_starts_as_published():
    torch.manual_seed(0)
    neck = BNNeck(NecksConfig(), dim=64, classes=500)
    assert {name for name, p in neck.named_parameters() if p.requires_grad} == {"norm.weight", "classifier.weight"}
    assert (neck.norm.weight == 1).all()
    assert (neck.norm.bias == 0).all()
    assert neck.classifier.bias is None
    # 32,000 draws: the sample deviation is within 0.4 % of sigma (1 sigma), so 2 % is safe
    assert neck.classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)


def test_neck_by_hand():
    neck = BNNeck(NecksConfig(), dim=1, classes=2)
    with torch.no_grad():
        neck.classifier.weight.copy_(torch.tensor([[1.0], [-2.0]]))
    # mean 3, biased deviation 1 -> normalised -1 and 1
    logits = neck(torch.tensor([[2.0], [4.0]]))
    np.testing.assert_allclose(logits.detach(), [[-1.0, 2.0], [1.0, -2.0]], atol=1e-4)


def test_neck_works_in_float32_under_autocast():
    torch.manual_seed(0)
    neck, features = BNNeck(NecksConfig(), dim=8, classes=5), torch.randn(6, 8)
    plain = neck(features)
    with torch.autocast("cpu", torch.bfloat16):
        found = neck(features)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)


def test_neck_embeds_either_side():
    features = torch.tensor([[3.0, 4.0]])
    before, after = BNNeck(NecksConfig(), 2, 2).eval(), BNNeck(NecksConfig(feature="after"), 2, 2).eval()
    for neck in (before, after):
        neck.norm.running_mean.copy_(torch.tensor([3.0, 0.0]))
    np.testing.assert_allclose(before.embed(features), [[0.6, 0.8]], atol=1e-6)
    np.testing.assert_allclose(after.embed(features).detach(), [[0.0, 1.0]], atol=1e-6)


def test_the_bias_of_the_neck_does_not_move():
    neck = BNNeck(NecksConfig(), dim=4, classes=3)
    optimizer = torch.optim.SGD([p for p in neck.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(neck(torch.randn(6, 4)), torch.tensor([0, 0, 1, 1, 2, 2])).backward()
        optimizer.step()
    assert (neck.norm.bias == 0).all()
    assert (neck.norm.weight != 1).any()
