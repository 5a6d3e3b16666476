"""Signs of collapse that are cheap enough to read at every logged step."""

import torch
from torch import Tensor


@torch.no_grad()
def signals(targets: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Health of the teacher.

    targets: its CLS probabilities [..., K]. features: its CLS tokens [B, D]. Returns
    `teacher_entropy`: mean entropy of a target, nats; near 0 or near ln K for long means collapse.
    `mean_entropy`: entropy of the mean target; near 0 means that all images get the same prototype.
    `feature_std`: mean standard deviation over the batch of the L2-normalised features times sqrt(D); 0 when all are
    equal, about 1 when they fill the sphere.
    """
    flat = targets.flatten(0, -2)
    mean = flat.mean(0)
    unit = torch.nn.functional.normalize(features, dim=-1)
    return {
        "teacher_entropy": -(flat * flat.clamp(min=1e-12).log()).sum(-1).mean(),
        "mean_entropy": -(mean * mean.clamp(min=1e-12).log()).sum(),
        "feature_std": unit.std(0, unbiased=False).mean() * features.shape[-1] ** 0.5,
    }
