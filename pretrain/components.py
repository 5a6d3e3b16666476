"""What the patch tokens differ in most: their first principal components, as colours (as DINOv2 shows them)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CUT = 0.01  # share of the values at either end that are cut off before they become colours


class Components(NamedTuple):
    """The first C principal components of the patch tokens of B images."""

    values: Tensor  # float64 [B, N, C], centred: positive and negative
    shares: Tensor  # float64 [C], of the variance; descending
    between: float  # share of the variance between the images: what a token tells about its image, not about its place


def principal(patches: Tensor, count: int = 3) -> Components:
    """Principal components of float [B, N, D] tokens, over all patches of all images together; zeros beyond the D-th.

    So a colour means the same in each image of a picture. Nothing is cut away as background: which side of a component
    is the person is not known without labels, and a crop is mostly person. The sign of an eigenvector is free; here its
    entry of the largest size is positive (the first of equal ones), so the same tokens give the same colours.
    """
    flat = patches.detach().double().cpu().flatten(0, 1)
    centred = flat - flat.mean(0)
    variances, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(flat) - 1))
    variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    missing = 0, max(0, count - vectors.shape[1])
    values = F.pad(centred @ (vectors * torch.where(largest < 0, -1.0, 1.0)), missing)
    shares = F.pad(variances[:count], missing)
    total, of_images = variances.sum(), centred.unflatten(0, patches.shape[:2]).mean(1)
    if total <= 0:
        return Components(values.unflatten(0, patches.shape[:2]), torch.zeros_like(shares), 0.0)
    between = of_images.square().sum() * patches.shape[1] / centred.square().sum()
    return Components(values.unflatten(0, patches.shape[:2]), shares / total, float(between))


def colours(values: Tensor) -> Tensor:
    """Each component of [B, N, C] on its own from its CUT to its 1 - CUT quantile to 0..255: uint8 [B, N, C].

    A component without any spread becomes 128.
    """
    flat = values.flatten(0, -2)
    low, high = (torch.quantile(flat, share, dim=0) for share in (CUT, 1 - CUT))
    spread = high - low
    scaled = torch.where(spread > 0, (values - low) / torch.where(spread > 0, spread, 1.0), 0.5)
    return (scaled.clamp(0, 1) * 255).round().to(torch.uint8)
