"""One forward over crops of two sizes is one forward for each: values, gradients, stochastic depth."""

import pytest
import torch
from torch import Tensor

from pretrain import backbone as module
from pretrain import packing
from pretrain.backbone import Tokens
from pretrain.packing import Span, attention, borders, kept, kernel_for, tokens_of


def crops(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WIDE, NARROW = crops(4, 64, 32), crops(6, 32, 16, seed=1)
DOUBLE = ("cpu", torch.float64)
MASK = torch.rand(4, 8, 4, generator=torch.Generator().manual_seed(2)) < 0.3
PLACES = MASK.flatten().nonzero().squeeze(1)


def gradients(backbone, tokens: list[Tokens]) -> dict[str, Tensor]:
    """Of a sum of all wanted tokens, each with a weight of its own."""
    backbone.zero_grad()
    values = torch.cat([part.flatten() for each in tokens for part in each[:2]])  # registers: with "all" only
    (values * torch.linspace(-1, 1, len(values), dtype=torch.float64)).sum().backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-7 * gradient.norm() + 1e-9, name


@pytest.fixture
def backbone(make_backbone):
    made = make_backbone(drop_path=0.5, depth=3).double()
    torch.nn.init.normal_(made.mask_embedding, generator=torch.Generator().manual_seed(7))
    return made


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("patches", [["all", "all"], [PLACES, "none"], ["none", "none"], ["all", "none"]])
def test_packed_is_one_forward_for_each_size(backbone, monkeypatch, skips, patches):
    drops = [torch.rand(len(c), 6, generator=torch.Generator().manual_seed(3)) for c in (WIDE, NARROW)]
    monkeypatch.setitem(module.SKIPPING_PAYS, DOUBLE, 0.2 if skips else 2.0)
    packed = backbone.packed([WIDE, NARROW], MASK, drops, patches)
    found = gradients(backbone, packed)
    monkeypatch.setitem(module.SKIPPING_PAYS, DOUBLE, 2.0)
    separate = [backbone(WIDE, MASK, drops[0]), backbone(NARROW, None, drops[1])]
    for place, (each, wanted) in enumerate(zip(separate, patches, strict=True)):
        if isinstance(wanted, Tensor):
            separate[place] = Tokens(each.cls, each.patches.flatten(0, 1)[wanted])
        elif wanted == "none":
            separate[place] = Tokens(each.cls, each.patches[:, :0].flatten(0, 1))
        elif patches != ["all", "all"]:  # where only some are wanted, patches come as one list
            separate[place] = Tokens(each.cls, each.patches.flatten(0, 1))
    for ours, theirs in zip(packed, separate, strict=True):
        assert ours.patches.shape == theirs.patches.shape
        assert torch.allclose(ours.cls, theirs.cls, atol=1e-7)
        assert torch.allclose(ours.patches, theirs.patches, atol=1e-7)
    assert_close(found, gradients(backbone, separate))


def test_no_patch_is_wanted_where_no_mask_was_drawn(backbone):
    nothing = torch.zeros(0, dtype=torch.int64)
    tokens = backbone.packed([WIDE, NARROW], MASK & False, None, [nothing, "none"])
    assert tokens[0].patches.shape == (0, 32)
    assert torch.allclose(tokens[0].cls, backbone(WIDE).cls, atol=1e-7)


def test_samples_that_are_dropped_are_not_computed(backbone, monkeypatch):
    seen = []
    monkeypatch.setattr(packing, "attention", lambda attn, x, *rest: seen.append(len(x)) or attention(attn, x, *rest))
    draws = torch.full((4, 6), 0.9)
    draws[:3, 4] = 0.1  # attention of the last block, rate 0.5: three of four images are dropped
    backbone(WIDE, drops=draws)
    assert seen == [4 * 33, 4 * 33, 33]


def test_all_samples_dropped_at_one_place(backbone):
    draws = torch.full((4, 6), 0.9)
    draws[:, 2] = 0.0
    tokens = backbone(WIDE, drops=draws)
    found = gradients(backbone, [tokens])
    assert not found["vit.blocks.1.attn.qkv.weight"].any(), "the parameter is part of the graph and gets zeros"


def test_kept_lists_the_tokens_of_the_kept_sequences():
    layout = (Span(2, 3), Span(3, 2))
    depth = kept(torch.tensor([0.6, 0.1, 0.5, 0.2, 0.9]), 0.5, layout, torch.device("cpu"))
    assert depth.rows.tolist() == [0, 1, 2, 6, 7, 10, 11]
    assert depth.layout == (Span(1, 3), Span(2, 2))
    assert depth.scale == 2
    assert borders(layout, torch.device("cpu")).tolist() == [0, 3, 6, 8, 10, 12]
    assert tokens_of(layout) == 12


@pytest.mark.parametrize("kernel", ["plain", "fused"])
@pytest.mark.parametrize("cls_only", [False, True])
def test_attention_stays_inside_a_sequence(backbone, kernel, cls_only):
    attn = backbone.vit.blocks[0].attn
    layout = (Span(2, 5, cls_only), Span(3, 4))
    x = torch.randn(22, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found, expected, start = attention(attn, x, layout, kernel), [], 0
    for count, length, only in layout:
        for _ in range(count):
            q, k, v = (part.unflatten(-1, (2, 16)) for part in attn.qkv(x[start : start + length]).chunk(3, dim=-1))
            share = torch.einsum("ihd,jhd->hij", q, k).div(4).softmax(-1)
            answer = torch.einsum("hij,jhd->ihd", share, v).flatten(1)
            expected.append(answer[:1] if only else answer)
            start += length
    assert torch.allclose(found, torch.cat(expected), atol=1e-7)


def test_variable_length_attention_is_asked_for_the_same(backbone, monkeypatch):
    """Its kernel needs a GPU; here a stand-in that follows torch's documented contract takes its place."""

    def varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k):
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert longest_q == starts_q.diff().max()
        assert longest_k == starts_k.diff().max()
        answers = []
        for i in range(len(starts_k) - 1):
            own, keys = slice(*starts_q[i : i + 2].tolist()), slice(*starts_k[i : i + 2].tolist())
            scores = torch.einsum("ihd,jhd->hij", q[own], k[keys]) / q.shape[-1] ** 0.5
            answers.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[keys]))
        return torch.cat(answers)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    x = torch.randn(22, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    attn = backbone.vit.blocks[0].attn
    for layout in ((Span(2, 5), Span(3, 4)), (Span(2, 5), Span(3, 4, True)), (Span(2, 5, True), Span(3, 4, True))):
        found, expected = attention(attn, x, layout, "varlen"), attention(attn, x, layout, "plain")
        assert torch.allclose(found, expected, atol=1e-7)


def test_a_cpu_takes_plain_products():
    assert kernel_for(torch.device("cpu"), torch.bfloat16) == "plain"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_packed_bf16_is_near_float32(backbone):
    expected = backbone.packed([WIDE, NARROW], MASK, None, [PLACES, "none"])
    there = backbone.float().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        found = there.packed([WIDE.float().cuda(), NARROW.float().cuda()], MASK.cuda(), None, [PLACES.cuda(), "none"])
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.cls.double().cpu() - theirs.cls).norm() < 0.02 * theirs.cls.norm()
