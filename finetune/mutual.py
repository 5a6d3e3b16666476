"""Mutual learning of several networks on the same batch: AlignedReID (arXiv 1711.08184), after Zhang et al. 2018,
Deep Mutual Learning (arXiv 1706.00384). What a network learns from another one gives that one no gradient.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from recipes.load import Section


class MutualConfig(Section):
    """How many networks learn together, and from what."""

    networks: int = Field(2, ge=2)  # M, of one architecture
    class_weight: float = Field(
        1.0, ge=0
    )  # of the classifiers' probabilities; 0.01 in the paper, 1 in its reproduction
    metric_weight: float = Field(1.0, ge=0)  # of the global distances; 0.001 in the paper, 1 in its reproduction
    local_weight: float = Field(0.0, ge=0)  # of the local distances


def classification(logits: Sequence[Tensor]) -> list[Tensor]:
    """For each network i the mean over the others j and the images of KL(p_j || p_i), in nats.

    logits: M of them, [B, C] each.
    """
    own = [F.log_softmax(each.float(), dim=1) for each in logits]
    theirs = [each.detach() for each in own]
    losses = []
    for i, student in enumerate(own):
        others = [F.kl_div(student, theirs[j], reduction="batchmean", log_target=True)
                  for j in range(len(own)) if j != i]  # fmt: skip
        losses.append(torch.stack(others).mean())
    return losses


def metric(distances: Sequence[Tensor]) -> list[Tensor]:
    """For each network i the mean over the others j and all pairs of (D_i - D_j)^2.

    distances: M of them, [B, B] each.
    """
    losses = []
    for i, own in enumerate(distances):
        others = [(own - distances[j].detach()).square().mean() for j in range(len(distances)) if j != i]
        losses.append(torch.stack(others).mean())
    return losses
