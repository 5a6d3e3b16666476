"""Signs of collapse at their ends, where they are known exactly."""

import math

import pytest
import torch

from pretrain.health import signals

K, D, B = 16, 32, 32


def test_uniform_targets():
    found = signals(torch.full((2, B, K), 1 / K), torch.ones(B, D))
    assert found["teacher_entropy"].item() == pytest.approx(math.log(K))
    assert found["mean_entropy"].item() == pytest.approx(math.log(K))


def test_one_prototype_for_all():
    targets = torch.zeros(2, B, K)
    targets[..., 3] = 1
    found = signals(targets, torch.ones(B, D))
    assert found["teacher_entropy"].item() == pytest.approx(0, abs=1e-6)
    assert found["mean_entropy"].item() == pytest.approx(0, abs=1e-6)


def test_sharp_targets_that_use_all_prototypes():
    targets = torch.eye(K).repeat(2, 2, 1)
    found = signals(targets, torch.ones(B, D))
    assert found["teacher_entropy"].item() == pytest.approx(0, abs=1e-6)
    assert found["mean_entropy"].item() == pytest.approx(math.log(K), rel=1e-5)


def test_entropy_of_two_targets_by_hand():
    targets = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]])
    found = signals(targets, torch.ones(2, D))
    one, two = math.log(2), -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert found["teacher_entropy"].item() == pytest.approx((one + two) / 2)
    assert found["mean_entropy"].item() == pytest.approx(-0.375 * math.log(0.375) - 0.625 * math.log(0.625))


def test_features_that_are_all_equal_have_no_spread():
    targets = torch.full((2, B, K), 1 / K)
    row = torch.randn(1, D, generator=torch.Generator().manual_seed(0))
    # the length does not count
    scale = torch.linspace(0.5, 3, B)[:, None]
    assert signals(targets, row * scale)["feature_std"].item() == pytest.approx(0, abs=1e-5)


def test_orthogonal_features_fill_the_sphere():
    # each coordinate is 1 once and 0 otherwise: variance 1/D - 1/D^2
    targets = torch.full((2, D, K), 1 / K)
    found = signals(targets, 5 * torch.eye(D))["feature_std"].item()
    assert found == pytest.approx(math.sqrt((D - 1) / D), rel=1e-5)
    spread = torch.randn(4000, D, generator=torch.Generator().manual_seed(0))
    assert signals(targets, spread)["feature_std"].item() == pytest.approx(1, abs=0.02)


def test_signals_carry_no_gradient():
    targets = torch.full((2, B, K), 1 / K, requires_grad=True)
    assert not any(value.requires_grad for value in signals(targets, torch.ones(B, D, requires_grad=True)).values())
