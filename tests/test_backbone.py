"""The backbone is timm's ViT: sizes as published, the same tokens, masks before positions, drop path by given draws."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.backbone import Backbone, BackboneConfig, create_vit, init_linear, timm_arguments
from recipes.errors import UserError


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name, size, parameters, grid",
    [
        ("vit_small_patch16_224", (256, 128), 21_639_552, (16, 8)),
        ("vit_base_patch16_224", (256, 128), 85_746_432, (16, 8)),
    ],
)
def test_sizes_are_the_published_ones(name, size, parameters, grid):
    with torch.device("meta"):
        backbone = Backbone(timm_arguments(BackboneConfig(name=name), size))
        masked = Backbone(timm_arguments(BackboneConfig(name=name), size), masked=True)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert sum(p.numel() for p in masked.parameters()) == parameters + backbone.dim
    assert backbone.grid == grid
    assert backbone.vit.pos_embed.shape == (1, 129, backbone.dim)


@torch.no_grad()
def test_tokens_are_those_of_timm(make_backbone, images):
    backbone = make_backbone().eval()
    plain = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        img_size=(64, 32),
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        dynamic_img_size=True,
    ).eval()
    plain.load_state_dict(backbone.vit.state_dict())
    tokens, expected = backbone(images), plain.forward_features(images)
    assert torch.allclose(tokens.cls, expected[:, 0], atol=1e-5)
    assert torch.allclose(tokens.patches, expected[:, 1:], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"])
def test_the_variants_of_timm_are_computed_as_timm_does(name):
    # layer scale, registers, positions without a place for CLS
    arguments = {"model_name": name, "num_classes": 0, "img_size": [32, 16], "patch_size": 8, "dynamic_img_size": True}
    backbone = Backbone({**arguments, "depth": 2, "embed_dim": 32, "num_heads": 2}).eval()
    for parameter in backbone.vit.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1)
    crops = torch.randn(2, 3, 32, 16, generator=torch.Generator().manual_seed(5))
    expected, tokens = backbone.vit.forward_features(crops), backbone(crops)
    assert torch.allclose(tokens.cls, expected[:, 0], atol=1e-5)
    assert torch.allclose(tokens.patches, expected[:, backbone.vit.num_prefix_tokens :], atol=1e-5)


def by_hand(backbone: Backbone, images: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """All tokens after the norm, step by step."""
    vit = backbone.vit
    x = F.conv2d(images, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=8)
    positions = vit.pos_embed
    if grid != backbone.grid:
        square = positions[:, 1:].unflatten(1, backbone.grid).permute(0, 3, 1, 2)
        scale = [(new + 0.1) / old for new, old in zip(grid, backbone.grid, strict=True)]
        square = F.interpolate(square, scale_factor=scale, mode="bicubic")
        positions = torch.cat([positions[:, :1], square.flatten(2).transpose(1, 2)], dim=1)
    sequences = []
    for b in range(len(images)):
        patches = [
            backbone.mask_embedding[0] if mask[b, r, c] else x[b, :, r, c]
            for r in range(grid[0])
            for c in range(grid[1])
        ]
        sequences.append(torch.stack([vit.cls_token[0, 0], *patches]) + positions[0])
    return vit.norm(vit.blocks(torch.stack(sequences)))


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 32), (32, 16), (48, 32)])
def test_masked_patches_are_replaced_before_positions_are_added(make_backbone, images, size):
    backbone = make_backbone().eval()
    backbone.mask_embedding.normal_(generator=torch.Generator().manual_seed(2))
    grid = (size[0] // 8, size[1] // 8)
    mask = torch.rand(3, *grid, generator=torch.Generator().manual_seed(3)) < 0.4
    crops = images[:, :, : size[0], : size[1]]
    tokens, expected = backbone(crops, mask), by_hand(backbone, crops, mask, grid)
    assert torch.allclose(tokens.cls, expected[:, 0], atol=1e-5)
    assert torch.allclose(tokens.patches, expected[:, 1:], atol=1e-5)
    assert tokens.patches.shape == (3, grid[0] * grid[1], 32)


@torch.no_grad()
def test_what_lies_under_the_mask_cannot_be_seen(make_backbone, images):
    backbone = make_backbone().eval()
    mask = torch.zeros(3, 8, 4, dtype=torch.bool)
    mask[:, 2:5, 1:3] = True
    other = images.clone()
    other[:, :, 16:40, 8:24] = 0.3
    hidden, shown = backbone(images, mask), backbone(other, mask)
    assert torch.equal(hidden.cls, shown.cls)
    assert torch.equal(hidden.patches, shown.patches)
    assert not torch.allclose(backbone(images).cls, backbone(other).cls, atol=1e-3)


@torch.no_grad()
def test_an_empty_mask_is_no_mask(make_backbone, images):
    backbone = make_backbone().eval()
    assert torch.equal(backbone(images, torch.zeros(3, 8, 4, dtype=torch.bool)).cls, backbone(images).cls)


def test_a_backbone_without_mask_embedding_takes_no_mask(make_backbone, images):
    with pytest.raises(AssertionError, match="without a mask embedding"):
        make_backbone(masked=False)(images, torch.ones(3, 8, 4, dtype=torch.bool))


def test_drop_rates_grow_linearly_with_depth(make_backbone):
    assert make_backbone(drop_path=0.3, depth=4).drops == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    assert make_backbone(drop_path=0.3, depth=1).drops == [0, 0]


@torch.no_grad()
def test_each_draw_belongs_to_its_branch(make_backbone, images):
    backbone, vit = make_backbone(drop_path=0.5), make_backbone(drop_path=0.5).vit
    for places in ([2], [3], [2, 3]):
        draws = torch.full((3, 4), 0.9)
        draws[:, places] = 0.1  # below 0.5: dropped. The first block has rate 0
        x = vit.blocks[0](vit._pos_embed(vit.patch_embed(images)))
        block = vit.blocks[1]
        x = x if 2 in places else x + 2 * block.attn(block.norm1(x))
        x = x if 3 in places else x + 2 * block.mlp(block.norm2(x))
        assert torch.allclose(backbone(images, drops=draws).cls, vit.norm(x)[:, 0], atol=1e-5)


@torch.no_grad()
def test_a_sample_is_dropped_alike_in_any_company(make_backbone, images):
    backbone = make_backbone(drop_path=0.5)
    draws = torch.rand(3, 4, generator=torch.Generator().manual_seed(4))
    together = backbone(images, drops=draws).cls
    turned = backbone(images.flip(0), drops=draws.flip(0)).cls.flip(0)
    alone = torch.cat([backbone(images[b : b + 1], drops=draws[b : b + 1]).cls for b in range(3)])
    assert torch.allclose(together, turned, atol=1e-6)
    assert torch.allclose(together, alone, atol=1e-6)
    assert not torch.allclose(together, backbone(images).cls, atol=1e-3)


@torch.no_grad()
def test_draws_hold_for_one_forward_only(make_backbone, images):
    backbone = make_backbone(drop_path=0.5)
    whole = backbone(images).cls
    backbone(images, drops=torch.zeros(3, 4))
    assert torch.equal(backbone(images).cls, whole)


def test_fresh_weights_are_truncated_normal():
    torch.manual_seed(0)
    backbone = Backbone(timm_arguments(BackboneConfig(embed_dim=192, depth=2, num_heads=3), (64, 32)), masked=True)
    backbone.initialise("truncated_normal")
    # a normal distribution that is cut at two standard deviations has 0.8796 of its deviation left
    for weight in (
        backbone.vit.blocks[0].attn.qkv.weight,
        backbone.vit.blocks[1].mlp.fc2.weight,
        backbone.vit.pos_embed,
    ):
        assert weight.std().item() == pytest.approx(0.02 * 0.8796, rel=0.05)
        assert weight.abs().max() <= 0.04
    assert backbone.vit.cls_token.std().item() == pytest.approx(0.02 * 0.8796, rel=0.25)
    assert not any(p.any() for n, p in backbone.named_parameters() if n.endswith(".bias") and "patch_embed" not in n)
    assert not backbone.mask_embedding.any()


def test_fan_in_keeps_the_size_of_a_signal():
    torch.manual_seed(0)
    layer = nn.Linear(400, 300)
    init_linear(layer, "fan_in")
    assert layer.weight.std().item() == pytest.approx(0.8796 / math.sqrt(400), rel=0.02)
    assert layer.weight.abs().max() <= 2 / math.sqrt(400)
    assert not layer.bias.any()


def test_names_that_timm_does_not_know_are_told():
    with pytest.raises(UserError, match=r"backbone\.name = 'vit_smal' is no timm model"):
        create_vit({"model_name": "vit_smal"})
    with pytest.raises(UserError, match="'resnet18' is not a plain Vision Transformer"):
        create_vit({"model_name": "resnet18", "num_classes": 0})


def test_sizes_that_timm_refuses_are_told():
    with pytest.raises(UserError, match="timm refuses to build 'vit_tiny_patch16_224' with"):
        create_vit({"model_name": "vit_tiny_patch16_224", "embed_dim": 33, "num_heads": 2, "depth": 1})
