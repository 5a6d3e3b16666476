"""Fine-tuning's rates against the published table; its groups by name."""

import pytest
import torch
from torch import nn

from finetune.optim import OptimConfig, build_optimizer, learning_rate, set_rate

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
    for kind, optimizer_class in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
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
