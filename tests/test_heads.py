"""The projection head: its formula by hand, what is shared, what is fixed, float32 whatever surrounds it."""

import math

import pytest
import torch

from pretrain.heads import Head, HeadsConfig, Prototypes, logits

SMALL = {"out_dim": 6, "hidden_dim": 5, "bottleneck_dim": 3}


def head(patches: bool = True, **given) -> Head:
    torch.manual_seed(0)
    return Head(4, HeadsConfig(**SMALL | given), patches)


def cls_logits(model: Head, z: torch.Tensor) -> torch.Tensor:
    return logits(z, model.prototypes()[0])


def patch_logits(model: Head, z: torch.Tensor) -> torch.Tensor:
    return logits(z, model.prototypes()[1])


@pytest.fixture
def tokens():
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(1))


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def unit(x: list[float]) -> list[float]:
    return [value / math.sqrt(sum(v * v for v in x)) for value in x]


@torch.no_grad()
def test_logits_by_hand(tokens):
    model = head()
    for parameter in model.parameters():  # biases and lengths must count
        parameter.normal_(generator=torch.Generator().manual_seed(2))
    for token, found in zip(tokens, cls_logits(model, model.bottleneck(tokens)), strict=True):
        x = token.tolist()
        linears = [layer for layer in model.mlp if isinstance(layer, torch.nn.Linear)]
        assert len(linears) == 3
        for number, layer in enumerate(linears):
            x = [
                sum(w * v for w, v in zip(row, x, strict=True)) + b
                for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            ]
            x = [gelu(value) for value in x] if number < 2 else unit(x)
        rows, lengths = model.last_layer.weight_v.tolist(), model.last_layer.weight_g.flatten().tolist()
        expected = [g * sum(a * b for a, b in zip(unit(v), x, strict=True)) for v, g in zip(rows, lengths, strict=True)]
        assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


def test_sizes_are_the_published_ones():
    with torch.device("meta"):
        shared, own = Head(384, HeadsConfig()), Head(384, HeadsConfig(shared=False))
    mlp = 384 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert sum(p.numel() for p in shared.parameters()) == mlp + 8192 * 256 + 8192
    assert sum(p.numel() for p in own.parameters()) == mlp + 2 * (8192 * 256 + 8192)


def test_shared_prototypes_are_one_layer(tokens):
    model = head(shared=True)
    z = model.bottleneck(tokens)
    assert model.last_layer2 is None
    assert torch.equal(cls_logits(model, z), patch_logits(model, z))


def test_own_prototypes_differ_and_the_trunk_does_not(tokens):
    model = head(shared=False)
    z = model.bottleneck(tokens)
    assert not torch.allclose(cls_logits(model, z), patch_logits(model, z), atol=1e-2)
    patch_logits(model, z).sum().backward()
    assert model.last_layer.weight_v.grad is None
    assert model.last_layer2.weight_v.grad.any()
    assert model.mlp[0].weight.grad.any()


def test_without_patches_there_are_no_second_prototypes():
    assert head(patches=False, shared=False).last_layer2 is None


def test_norm_last_layer_fixes_the_lengths(tokens):
    fixed, free = head(norm_last_layer=True), head(norm_last_layer=False)
    assert "last_layer.weight_g" not in dict(fixed.named_parameters())
    assert "last_layer.weight_g" in dict(free.named_parameters())
    assert "last_layer.weight_g" in fixed.state_dict()
    with torch.no_grad():
        for model in (fixed, free):
            model.last_layer.weight_v.mul_(7)  # only the direction counts
    assert torch.allclose(cls_logits(fixed, fixed.bottleneck(tokens)), cls_logits(free, free.bottleneck(tokens)))
    assert cls_logits(fixed, fixed.bottleneck(tokens)).abs().max() <= 1 + 1e-6


def test_prototypes_are_linear():
    # the centre of the patches rests on this: the mean logit is the logit of the mean
    torch.manual_seed(0)
    layer = Prototypes(16, 50, fixed_length=False)
    z = torch.nn.functional.normalize(torch.randn(300, 16), dim=-1)
    assert torch.allclose(logits(z, layer.weight()).mean(0), logits(z.mean(0), layer.weight()), atol=1e-6)


@pytest.mark.parametrize(
    "layers, linears", [(1, [(4, 3)]), (2, [(4, 5), (5, 3)]), (4, [(4, 5), (5, 5), (5, 5), (5, 3)])]
)
def test_depth_of_the_trunk(layers, linears):
    model = head(layers=layers)
    found = [(part.in_features, part.out_features) for part in model.mlp if isinstance(part, torch.nn.Linear)]
    assert found == linears
    assert isinstance(model.mlp[-1], torch.nn.Linear)


def test_under_autocast_only_the_mlp_has_16_bits(tokens):
    model = head(shared=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, z = model.mlp(tokens), model.bottleneck(tokens)
        found = cls_logits(model, z), patch_logits(model, z)
    assert x.dtype == torch.bfloat16
    assert torch.equal(z, torch.nn.functional.normalize(x.float(), dim=-1))
    assert torch.allclose(z.norm(dim=-1), torch.ones(7), atol=1e-6), "bfloat16 would be off by a hundredth"
    for ours, which in zip(found, (cls_logits, patch_logits), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, which(model, z))
    assert torch.allclose(z, model.bottleneck(tokens), atol=0.03)


def test_a_teacher_shares_only_what_a_student_has():
    with pytest.raises(ValueError, match="teacher_shared: false needs shared: false"):
        HeadsConfig(teacher_shared=False)
    assert HeadsConfig(shared=False, teacher_shared=True).teacher_shared
