"""What networks learn from each other: by hand, and that no gradient goes back."""

import math

import pytest
import torch

from finetune import mutual


def test_divergence_by_hand():
    logits = [torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])]  # probabilities 1/4, 3/4 and 1/2, 1/2
    first, second = mutual.classification(logits)
    assert first.item() == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    assert second.item() == pytest.approx(0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))


def test_distances_by_hand():
    matrices = [torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0], [2.0, 0.0]]), torch.zeros(2, 2)]
    losses = mutual.metric(matrices)
    to_second, to_third = (4 + 1) / 4, (1 + 1) / 4
    assert losses[0].item() == pytest.approx((to_second + to_third) / 2)
    assert losses[2].item() == pytest.approx((to_third + (9 + 4) / 4) / 2)


@pytest.mark.parametrize("learn", [mutual.classification, mutual.metric])
@pytest.mark.parametrize("networks", [2, 3])
def test_equal_networks_teach_nothing_and_no_gradient_reaches_a_peer(learn, networks):
    equal = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert max(loss.abs().item() for loss in learn([equal] * networks)) < 1e-6
    each = [(equal + i).mul(1 + i).requires_grad_() for i in range(networks)]
    for i in range(networks):
        loss = learn(each)[i]
        found = torch.autograd.grad(loss, each, allow_unused=True)
        assert [gradient is not None for gradient in found] == [j == i for j in range(networks)]
        assert found[i].abs().sum() > 0
