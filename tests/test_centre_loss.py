"""The centre loss against numbers worked out by hand, and its centres against the optimiser that BoT gives them."""

import numpy as np
import torch
from torch import nn

from finetune.centre_loss import CentreLoss


def test_value_by_hand():
    loss = CentreLoss(2, 3)
    loss.centres.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]]))
    features = torch.tensor([[3.0, 4.0], [1.0, 2.0], [0.0, 1.0]])
    # 9 + 16, 0 + 1 and 0 + 1 over three images
    assert loss(features, torch.tensor([0, 1, 0])).item() == 9.0


def test_gradient_by_hand():
    loss = CentreLoss(1, 2)
    loss.centres.copy_(torch.tensor([[1.0], [5.0]]))
    features = torch.tensor([[4.0], [5.0]], requires_grad=True)
    loss(features, torch.tensor([0, 1])).backward()
    # 2 (4 - 1) / 2; where a feature meets its centre the gradient is 0
    np.testing.assert_allclose(features.grad, [[3.0], [0.0]])


def test_centres_start_standard_normal_and_are_saved_but_not_trained():
    torch.manual_seed(0)
    loss = CentreLoss(100, 300)
    # 30,000 draws: 5 deviations of the mean and of the deviation are 0.03 and 0.02
    assert abs(loss.centres.mean().item()) < 0.03
    assert abs(loss.centres.std().item() - 1) < 0.02
    assert list(loss.state_dict()) == ["centres"]
    assert not list(loss.parameters())


def test_centres_move_as_by_bots_optimiser():
    # the published way: the centres are parameters of a plain SGD of rate 0.5, whose gradient, that of the weighted
    # loss, is divided by the weight before the step
    weight, classes, dim = 5e-4, 5, 7
    torch.manual_seed(1)
    ours = CentreLoss(dim, classes)
    theirs = nn.Parameter(ours.centres.clone())
    optimizer = torch.optim.SGD([theirs], lr=0.5)
    for _ in range(6):
        features, labels = torch.randn(12, dim), torch.randint(classes - 1, (12,))  # one class is never seen
        published = (features - theirs[labels]).square().sum(dim=1).mean()
        torch.testing.assert_close(ours(features, labels), published)
        optimizer.zero_grad()
        (weight * published).backward()
        theirs.grad /= weight
        optimizer.step()
        ours.update(features, labels)
        torch.testing.assert_close(ours.centres, theirs.detach())


def test_a_batch_of_one_identity_pulls_its_centre_onto_the_mean():
    loss = CentreLoss(3, 2)
    other = loss.centres[1].clone()
    features = torch.randn(8, 3)
    loss.update(features, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(loss.centres[0], features.mean(dim=0))
    assert torch.equal(loss.centres[1], other)


def test_half_precision_features_count_in_float32():
    loss = CentreLoss(1, 1)
    loss.centres.fill_(0.0)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(torch.tensor([[1.0625]]).bfloat16(), torch.tensor([0]))
    assert value.dtype == torch.float32
    assert value.item() == 1.0625**2  # 1.12890625 has more bits than bfloat16
