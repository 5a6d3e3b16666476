"""Fine-tuning's rates against the published table; its groups by name."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from finetune import backbones
from finetune.backbones import BackboneConfig
from finetune.methods import build
from finetune.methods.base import Method, Parts
from finetune.optim import OptimConfig, build_optimizer, learning_rate, set_rate
from finetune.sampling import SamplingConfig
from recipes.errors import UserError

# epochs counted from 1, base rate 4e-4, 20 epochs of warm-up, 120 in all
PUBLISHED = {
    1: 4.0e-6,
    2: 2.38e-5,
    10: 1.822e-4,
    20: 3.802e-4,
    21: 3.733e-4,
    40: 3.047e-4,
    60: 2.056e-4,
    80: 1.052e-4,
    100: 3.02e-5,
    120: 8.7e-7,
}


@pytest.fixture
def module():
    return nn.ModuleDict({"fc": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "bias_free": nn.Linear(2, 2, bias=False)})


@pytest.mark.parametrize("epoch, rate", PUBLISHED.items())
def test_rates_are_the_published_ones(module, epoch, rate):
    config = OptimConfig()
    optimizer = build_optimizer(module, config)
    digits = 0.5 * 10 ** (-len(f"{rate:.9g}".replace(".", "").partition("e")[0]) + 1)
    assert set_rate(optimizer, epoch - 1, config) == pytest.approx(rate, rel=max(digits, 1e-3))
    assert optimizer.param_groups[0]["lr"] == learning_rate(epoch - 1, 4e-4, config)


@pytest.mark.parametrize(("epoch", "rate"), [(1, 2e-4), (150, 2e-4), (151, 2e-4 * 0.001 ** (1 / 150)), (300, 2e-7)])
def test_rates_of_the_reproduction_of_aligned_reid(module, epoch, rate):
    config = OptimConfig(kind="adam", lr=2e-4, bias_lr_factor=1, epochs=300, warmup_epochs=0, schedule="tail")
    assert set_rate(build_optimizer(module, config), epoch - 1, config) == pytest.approx(rate)


def test_each_step_has_its_factor(module):
    config = OptimConfig(lr=3e-4, epochs=200, warmup_epochs=0, schedule="steps", steps=(60, 120), gamma=(1 / 3, 0.1))
    optimizer = build_optimizer(module, config)
    assert [set_rate(optimizer, at, config) for at in (59, 60, 120)] == pytest.approx([3e-4, 1e-4, 1e-5])


@pytest.mark.parametrize(("given", "told"), [
    ({"gamma": (0.1, 0.1, 0.1)}, "3 factors for 2 steps"),
    ({"gamma": 0.0}, "gamma must lie in"),
    ({"gamma": (0.1, 2.0)}, "gamma must lie in"),
    ({"schedule": "tail", "epochs": 150}, "must come before the end"),
])  # fmt: skip
def test_settings_that_do_not_fit(given, told):
    with pytest.raises(ValueError, match=told):
        OptimConfig(**given)


def test_biases_start_alike_and_then_go_twice_as_high(module):
    config = OptimConfig()
    optimizer = build_optimizer(module, config)
    set_rate(optimizer, 0, config)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([4.0e-6, 4.0e-6])
    set_rate(optimizer, 10, config)  # half of the warm-up: the middle between 4e-6 and 4e-4 or 8e-4
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2.02e-4, 4.02e-4])
    set_rate(optimizer, 60, config)  # half of all: the middle between the end, 8e-7, and 4e-4 or 8e-4
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2.004e-4, 4.004e-4])


def test_the_rate_never_reaches_its_base():
    rates = [learning_rate(step / 100, 4e-4, OptimConfig()) for step in range(12_000)]
    assert max(rates) < 4e-4
    # the published steps are whole epochs, where the highest is 0.95 of the base
    assert max(rates[::100]) == pytest.approx(0.95 * 4e-4, rel=1e-3)


def test_the_rate_changes_each_epoch_or_each_step(module):
    by_epoch, by_step = OptimConfig(), OptimConfig(by="step")
    optimizer = build_optimizer(module, by_epoch)
    assert set_rate(optimizer, 9.99, by_epoch) == set_rate(optimizer, 9, by_epoch) == pytest.approx(1.822e-4, rel=1e-3)
    assert set_rate(optimizer, 9.5, by_step) == pytest.approx((1.822e-4 + 2.02e-4) / 2, rel=1e-3)


def test_groups_go_by_the_name(module):
    module["norm"].weight.requires_grad_(False)
    for kind, optimizer_class in (
        ("sgd", torch.optim.SGD),
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
    ):
        optimizer = build_optimizer(module, OptimConfig(kind=kind))
        assert type(optimizer) is optimizer_class
        names = {parameter: name for name, parameter in module.named_parameters()}
        found = [{names[p] for p in group["params"]} for group in optimizer.param_groups]
        # any name that contains "bias", as published
        assert found == [{"fc.weight"}, {"fc.bias", "norm.bias", "bias_free.weight"}]
        assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)


def test_momentum_steps_by_hand(module):
    config = OptimConfig(lr=0.1, warmup_epochs=0, end_factor=1.0, weight_decay=0.01)
    optimizer = build_optimizer(module, config)
    weight = module["fc"].weight
    value, velocity = weight.detach().clone(), torch.zeros(2, 2)
    for gradient in (0.5, -0.2, 1.0):
        set_rate(optimizer, 0, config)
        weight.grad = torch.full((2, 2), gradient)
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 0.01 * value
        value = value - 0.1 * velocity
        assert torch.allclose(weight, value, atol=1e-6)


def test_five_epochs_of_warm_up_start_the_cosine_higher():
    # PersonViT's ViT-B on Market-1501: warm-up over 5 epochs, then the same unshifted cosine
    config = OptimConfig(warmup_epochs=5)
    rates = [learning_rate(epoch, 4e-4, config) for epoch in range(120)]
    assert rates[0] == pytest.approx(4e-6)
    assert rates[4] == pytest.approx(4e-6 + 4 / 5 * (4e-4 - 4e-6))
    assert max(rates) == rates[5] == pytest.approx(8e-7 + 0.5 * (4e-4 - 8e-7) * (1 + 0.99144486), rel=1e-6)
    assert rates[20:] == [learning_rate(epoch, 4e-4, OptimConfig()) for epoch in range(20, 120)]


# fast-reid's BoT on ResNet-50: Adam, 3.5e-4 after about ten epochs from a tenth, a tenth at 40 and at 90 epochs
STEPS = OptimConfig(
    kind="adam", lr=3.5e-4, bias_lr_factor=1, weight_decay=5e-4, schedule="steps", warmup_factor=0.1, warmup_epochs=10
)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 3.5e-5), (5, 1.925e-4), (10, 3.5e-4), (39, 3.5e-4), (40, 3.5e-5), (89, 3.5e-5), (90, 3.5e-6), (119, 3.5e-6)],
)
def test_steps_by_hand(module, epoch, rate):
    assert set_rate(build_optimizer(module, STEPS), epoch, STEPS) == pytest.approx(rate)


def test_steps_must_grow():
    for steps in ((90, 40), (40, 40), (0, 40)):
        with pytest.raises(ValidationError, match="growing"):
            OptimConfig(steps=steps)


def test_adam_puts_the_decay_into_the_gradient():
    config = STEPS.model_copy(update={"warmup_epochs": 0.0, "weight_decay": 0.125})
    weight = nn.Linear(1, 1, bias=False)
    nn.init.constant_(weight.weight, 0.5)
    optimizer = build_optimizer(weight, config)
    set_rate(optimizer, 0, config)
    weight.weight.grad = torch.tensor([[-0.125 * 0.5]])  # gradient and decay cancel
    optimizer.step()
    assert weight.weight.item() == 0.5


def method(name: str, **more) -> Method:
    """BoT for three people on a backbone of that name."""
    config = BackboneConfig(name=name, drop_path=0.0, **more)
    backbone = backbones.build(backbones.arguments_of(config, (64, 32)))
    return build({"name": "bot"}, Parts(backbone, 3, 0, SamplingConfig(), 0))


def rates(model: nn.Module, config: OptimConfig, epoch: float = 60) -> dict[str, float]:
    """Rate of each parameter."""
    optimizer = build_optimizer(model, config)
    set_rate(optimizer, epoch, config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    return found


def test_layer_decay_of_a_vit_is_that_of_beit():
    config = OptimConfig(kind="adamw", layer_decay=0.5, bias_lr_factor=2.0)
    found = rates(method("vit_tiny_patch16_224", patch_size=8, depth=3, registers=1), config)
    full, biases = learning_rate(60, 4e-4, config), learning_rate(60, 8e-4, config)
    levels = {
        "neck.classifier.weight": 0,
        "neck.norm.weight": 0,
        "backbone.vit.norm.weight": 0,
        "backbone.vit.blocks.2.attn.qkv.weight": 1,
        "backbone.vit.blocks.1.mlp.fc1.weight": 2,
        "backbone.vit.blocks.0.norm1.weight": 3,
        "backbone.vit.cls_token": 4,
        "backbone.vit.reg_token": 4,
        "backbone.vit.pos_embed": 4,
        "backbone.vit.patch_embed.proj.weight": 4,
    }
    for name, level in levels.items():
        assert found[name] == pytest.approx(full * 0.5**level), name
    assert found["backbone.vit.blocks.1.attn.qkv.bias"] == pytest.approx(biases * 0.5**2)
    assert len(build_optimizer(method("vit_tiny_patch16_224", depth=3), config).param_groups) == 2 * 5


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        (
            "resnet18",
            {"layer4.1.conv1.weight": 1, "layer4.0.conv1.weight": 2, "layer1.0.bn1.weight": 8, "conv1.weight": 9},
        ),
        ("convnext_atto", {"head.norm.weight": 1, "stem.0.weight": 14}),
    ],
)
def test_layer_decay_of_other_networks_follows_timm(name, levels):
    config = OptimConfig(layer_decay=0.8)
    found = rates(method(name), config)
    full = learning_rate(60, 4e-4, config)
    assert found["neck.classifier.weight"] == pytest.approx(full)
    for key, level in levels.items():
        assert found[f"backbone.model.{key}"] == pytest.approx(full * 0.8**level), key


def test_no_layer_decay_is_two_groups_of_one_rate():
    model = method("vit_tiny_patch16_224", depth=2)
    assert len(build_optimizer(model, OptimConfig()).param_groups) == 2
    found = rates(model, OptimConfig(bias_lr_factor=1.0))
    assert len(set(found.values())) == 1


def test_layer_decay_without_layers_is_refused(monkeypatch):
    model = method("resnet18")
    monkeypatch.setattr(type(model.backbone.model), "group_matcher", property(lambda self: self.missing))
    with pytest.raises(UserError, match=r"timm does not tell the layers of resnet18; set it to 1"):
        build_optimizer(model, OptimConfig(layer_decay=0.9))
    monkeypatch.undo()
    monkeypatch.setattr(type(model.backbone.model), "group_matcher", lambda self, coarse: {"stem": "."})
    with pytest.raises(UserError, match="is one layer"):
        build_optimizer(model, OptimConfig(layer_decay=0.9))


@pytest.mark.parametrize(("epoch", "share"), [
    (0, 0.1), (1 / 50, 0.1 + 0.9 / 2000), (20, 0.55), (39 + 49 / 50, 1 - 0.9 / 2000), (40, 1.0), (40 + 49 / 50, 1.0),
    (50, 0.5), (59, (1 - math.cos(math.pi / 20)) / 2),
])  # fmt: skip
def test_rates_of_mdpr(epoch, share):
    """2,000 steps of warm-up by the step are 40 epochs of 50; 20 epochs of cosine are left, by the epoch, to 1e-7."""
    config = OptimConfig(kind="adam", lr=3.5e-4, bias_lr_factor=1.0, epochs=60, warmup_steps=2000, warmup_factor=0.1,
                         end_factor=0)  # fmt: skip
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    assert set_rate(optimizer, epoch, config, 50) == pytest.approx(3.5e-4 * share, rel=1e-6)
    assert {group["lr"] for group in optimizer.param_groups} == {set_rate(optimizer, epoch, config, 50)}
    ends = config.model_copy(update={"end_factor": 1e-7 / 3.5e-4})
    assert set_rate(optimizer, 59.99, ends, 50) > 1e-7


def test_a_warm_up_longer_than_the_training_never_ends():
    config = OptimConfig(epochs=3, warmup_steps=1000, warmup_factor=0.0, lr=1e-3, bias_lr_factor=1.0)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    assert set_rate(optimizer, 2.9, config, 10) == pytest.approx(1e-3 * 29 / 1000)


@pytest.mark.parametrize("more", [{"by": "step"}, {"schedule": "steps"}])
def test_warm_up_by_steps_goes_with_the_cosine_by_epochs(more):
    with pytest.raises(ValidationError, match="warmup_epochs instead"):
        OptimConfig(warmup_steps=10, **more)
