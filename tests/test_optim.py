"""Groups, clipping and frozen prototypes by hand; AdamW against its equations."""

import math

import pytest
import torch
from torch import nn

from pretrain.optim import OptimConfig, build_optimizer, clip_gradients, freeze_last_layer, set_values


def two_tensors() -> nn.Module:
    """A weight with a gradient of length 5 and a bias with one of length 12: 13 together."""
    module = nn.Linear(2, 2)
    module.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    module.bias.grad = torch.tensor([0.0, -12.0])
    return module


def test_clipping_by_parameter():
    module = two_tensors()
    assert clip_gradients(module, OptimConfig(clip=6.0)).item() == pytest.approx(13)
    assert torch.equal(module.weight.grad, torch.tensor([[3.0, 0.0], [0.0, 4.0]])), "5 is below 6"
    assert torch.allclose(module.bias.grad, torch.tensor([0.0, -6.0]))


def test_the_norm_of_each_parameter_is_that_before():
    module, each = two_tensors(), {"left over": torch.ones(())}
    clip_gradients(module, OptimConfig(clip=6.0), each)
    assert {name: norm.item() for name, norm in each.items()} == pytest.approx({"weight": 5, "bias": 12})
    module.weight.grad = None
    clip_gradients(module, OptimConfig(clip=None), each)
    assert {name: norm.item() for name, norm in each.items()} == pytest.approx({"bias": 6})


def test_clipping_together():
    module = two_tensors()
    assert clip_gradients(module, OptimConfig(clip=6.5, clip_by="global")).item() == pytest.approx(13)
    assert torch.allclose(module.weight.grad, torch.tensor([[1.5, 0.0], [0.0, 2.0]]))
    assert torch.allclose(module.bias.grad, torch.tensor([0.0, -6.0]))
    same = two_tensors()
    clip_gradients(same, OptimConfig(clip=13.1, clip_by="global"))
    assert torch.equal(same.bias.grad, torch.tensor([0.0, -12.0]))


def test_no_clipping_and_gradients_that_are_absent():
    module = two_tensors()
    module.bias.grad = None
    assert clip_gradients(module, OptimConfig(clip=None)).item() == pytest.approx(5)
    assert torch.equal(module.weight.grad, torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    clip_gradients(module, OptimConfig(clip=2.5))
    assert torch.allclose(module.weight.grad, torch.tensor([[1.5, 0.0], [0.0, 2.0]]))
    assert module.bias.grad is None


def test_norms_and_biases_are_not_decayed_and_embeddings_are(make_student):
    student = make_student(shared=False)
    names = {parameter: name for name, parameter in student.named_parameters()}
    decay, plain = ({names[p] for p in g["params"]} for g in build_optimizer(student, OptimConfig()).param_groups)
    assert decay | plain == set(names.values())
    assert not decay & plain
    blocks = [f"backbone.vit.blocks.{n}" for n in range(2)]
    linears = [f"{block}.{layer}" for block in blocks for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    linears += ["backbone.vit.patch_embed.proj", "head.mlp.0", "head.mlp.2", "head.mlp.4"]
    norms = [f"{block}.{norm}" for block in blocks for norm in ("norm1", "norm2")] + ["backbone.vit.norm"]
    tokens = {"backbone.vit.cls_token", "backbone.vit.pos_embed", "backbone.mask_embedding"}
    prototypes = {
        f"head.{layer}.{part}" for layer in ("last_layer", "last_layer2") for part in ("weight_v", "weight_g")
    }
    assert decay == {f"{name}.weight" for name in linears} | tokens | prototypes
    assert plain == {f"{name}.bias" for name in linears + norms} | {f"{name}.weight" for name in norms}


def test_fixed_parameters_are_left_out(make_student):
    student = make_student()
    student.backbone.requires_grad_(False)
    groups = build_optimizer(student, OptimConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(student.head.parameters()))


def test_set_values_decays_the_first_group_only(make_student):
    optimizer = build_optimizer(make_student(), OptimConfig())
    set_values(optimizer, 0.3, 0.2)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.3, 0.2), (0.3, 0.0)]


def test_steps_follow_the_equations_of_adamw():
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(2.0)
        module.bias.fill_(-1.0)
    optimizer = build_optimizer(module, OptimConfig(betas=(0.8, 0.9), eps=1e-3))
    values, decays, moments = [2.0, -1.0], [0.1, 0.0], [[0.0, 0.0], [0.0, 0.0]]
    for step, (rate, gradients) in enumerate([(0.1, (0.5, -3.0)), (0.05, (-1.0, 2.0)), (0.2, (0.25, 0.0))], start=1):
        set_values(optimizer, rate, 0.1)
        module.weight.grad, module.bias.grad = torch.tensor([[gradients[0]]]), torch.tensor([gradients[1]])
        optimizer.step()
        for i in range(2):
            m = moments[i][0] = 0.8 * moments[i][0] + 0.2 * gradients[i]
            v = moments[i][1] = 0.9 * moments[i][1] + 0.1 * gradients[i] ** 2
            values[i] *= 1 - rate * decays[i]
            values[i] -= rate * (m / (1 - 0.8**step)) / (math.sqrt(v / (1 - 0.9**step)) + 1e-3)
        assert [module.weight.item(), module.bias.item()] == pytest.approx(values, rel=1e-5)


def test_frozen_prototypes_do_not_move_by_gradient_nor_by_decay(make_student):
    student = make_student(shared=False)
    optimizer = build_optimizer(student, OptimConfig())
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    freeze_last_layer(student)
    set_values(optimizer, 0.1, 0.4)
    optimizer.step()
    still = {name for name, p in student.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name in before if name.startswith("head.last_layer")}
    assert len(still) == 4
