"""Attention of CLS against a plain re-computation, and the patches that hold most of it against brute force."""

import itertools
import math

import pytest
import torch

from pretrain.attention import cls_attention, look, strongest


def images(count: int, height: int = 64, width: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def by_hand(backbone, pictures: torch.Tensor) -> list:
    """attention[image][head] = weights over all tokens: one query, one head, one key at a time, with timm's forward."""
    vit, kept = backbone.vit, []
    vit.blocks[-1].register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    with torch.no_grad():
        vit.forward_features(pictures)
        block = vit.blocks[-1]
        found, heads = [], block.attn.num_heads
        for tokens in kept[0]:
            rows = [block.attn.qkv(block.norm1(token)) for token in tokens]
            width = len(rows[0]) // 3
            size = width // heads
            of_image = []
            for head in range(heads):
                own = slice(head * size, (head + 1) * size)
                query = rows[0][:width][own]
                scores = [float(query @ row[width : 2 * width][own]) / math.sqrt(size) for row in rows]
                total = sum(math.exp(score) for score in scores)
                of_image.append([math.exp(score) / total for score in scores])
            found.append(of_image)
    return found


@pytest.mark.parametrize("registers", [0, 3])
def test_the_maps_are_those_of_a_plain_computation(make_backbone, registers):
    backbone = make_backbone(1, masked=False, registers=registers).eval()
    pictures = images(2)
    maps = cls_attention(backbone, pictures)
    assert maps.shape == (2, 2, 8, 4)
    expected = torch.tensor(by_hand(backbone, pictures))
    assert torch.allclose(maps.flatten(2), expected[..., 1 + registers :], atol=1e-6)
    left = 1 - maps.sum((2, 3))
    assert torch.allclose(left, expected[..., : 1 + registers].sum(-1), atol=1e-6), "CLS and registers have the rest"


def test_the_grid_is_that_of_the_images(make_backbone):
    backbone = make_backbone(1, masked=False).eval()
    assert cls_attention(backbone, images(1, 96, 32)).shape == (1, 2, 12, 4)
    assert cls_attention(backbone, images(1, 32, 64)).shape == (1, 2, 4, 8)


def test_rows_and_columns_are_not_exchanged(make_backbone):
    backbone, black = make_backbone(2, masked=False).eval(), torch.zeros(1, 3, 64, 32)
    before = cls_attention(backbone, black)
    with torch.no_grad():  # the token in row 5, column 3 becomes another one
        backbone.vit.pos_embed[0, 1 + 5 * 4 + 3] += torch.randn(32, generator=torch.Generator().manual_seed(0))
    change = (cls_attention(backbone, black) - before).abs()[0].amax(0)
    assert divmod(int(change.argmax()), 4) == (5, 3)


def test_one_look_gives_the_tokens_of_the_forward(make_backbone):
    backbone = make_backbone(4, masked=False, registers=2).eval()
    pictures = images(3)
    tokens, maps = look(backbone, pictures)
    with torch.no_grad():
        expected = backbone(pictures)
    for ours, theirs in zip(tokens, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(maps, cls_attention(backbone, pictures))


def test_what_is_added_to_the_tokens_counts(make_backbone):
    backbone = make_backbone(4, masked=False).eval()
    added = torch.ones(3, 32)
    assert not torch.equal(cls_attention(backbone, images(3), added), cls_attention(backbone, images(3)))
    with torch.no_grad():
        expected = backbone(images(3), added=added).cls
    assert torch.equal(look(backbone, images(3), added)[0].cls, expected)


def test_a_picture_needs_no_gradients(make_backbone):
    assert not cls_attention(make_backbone(0, masked=False).eval(), images(1)).requires_grad


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mass", [0.3, 0.6, 1.0])
def test_the_smallest_set_that_holds_the_mass(seed, mass):
    weights = torch.rand(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = strongest(weights, mass)
    held = float(weights[chosen].sum() / weights.sum())
    assert held >= mass - 1e-12
    flat = weights.flatten().tolist()
    fewer = itertools.combinations(flat, int(chosen.sum()) - 1)
    assert max(sum(some) for some in fewer) < mass * sum(flat), "no smaller set holds it"
    others = itertools.combinations(flat, int(chosen.sum()))
    assert float(weights[chosen].sum()) == pytest.approx(max(sum(some) for some in others))


def test_sets_of_single_maps():
    maps = torch.tensor([[[0.5, 0.3], [0.2, 0.0]], [[0.25, 0.25], [0.25, 0.25]], [[0.0, 0.0], [0.0, 0.0]]])
    chosen = strongest(maps)
    assert chosen.tolist() == [
        [[True, True], [False, False]],
        [[True, True], [True, False]],
        [[True, False], [False] * 2],
    ]
