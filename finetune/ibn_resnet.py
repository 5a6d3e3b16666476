"""ResNets with IBN-a (Pan et al. 2018, arXiv 1807.09441), which timm has not: `backbone.name: resnet50_ibn_a`.

Half of the channels after the first convolution of a block lose what a camera does to contrast and colour (instance
normalisation), the other half keep it (batch normalisation); not in the last stage, whose features shall tell people
apart. Weights have the names of the authors' files, which `--ckpt FILE` reads; those of a ResNet without IBN fit too.
"""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import register_model
from timm.models.resnet import ResNet
from torch import Tensor, nn


class InstanceBatchNorm(nn.Module):
    """The first half of the channels by instance, the second by batch normalisation. channels: even."""

    def __init__(self, channels: int):
        super().__init__()
        assert channels % 2 == 0
        self.half = channels // 2
        self.IN = nn.InstanceNorm2d(self.half, affine=True)
        self.BN = nn.BatchNorm2d(self.half)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        first, second = maps.split(self.half, dim=1)
        return torch.cat([self.IN(first.contiguous()), self.BN(second.contiguous())], dim=1)


def with_ibn(name: str, pretrained: bool, arguments: dict[str, Any]) -> ResNet:
    """timm's ResNet of that name with IBN-a in its first three stages. RuntimeError if pretrained."""
    if pretrained:
        raise RuntimeError(f"timm has no weights of {name}_ibn_a; give a file of weights to --ckpt")
    given = {key: value for key, value in arguments.items() if key not in ("pretrained_cfg", "pretrained_cfg_overlay")}
    model = timm.create_model(name, **given)
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            block.bn1 = InstanceBatchNorm(block.bn1.num_features)
    return model


@register_model
def resnet18_ibn_a(pretrained: bool = False, **arguments: Any) -> ResNet:
    """Two basic blocks a stage."""
    return with_ibn("resnet18", pretrained, arguments)


@register_model
def resnet34_ibn_a(pretrained: bool = False, **arguments: Any) -> ResNet:
    """3, 4, 6, 3 basic blocks."""
    return with_ibn("resnet34", pretrained, arguments)


@register_model
def resnet50_ibn_a(pretrained: bool = False, **arguments: Any) -> ResNet:
    """3, 4, 6, 3 bottlenecks."""
    return with_ibn("resnet50", pretrained, arguments)


@register_model
def resnet101_ibn_a(pretrained: bool = False, **arguments: Any) -> ResNet:
    """3, 4, 23, 3 bottlenecks."""
    return with_ibn("resnet101", pretrained, arguments)


def from_plain(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Weights of a ResNet without IBN for `model`, and how many of its norms were split for that.

    Batch normalisation gets its half of scale, shift and statistics; instance normalisation its half of scale and
    shift, and needs no statistics. What has IBN already, or belongs to another network, stays as it is.
    """
    found, split = dict(tensors), 0
    for name, norm in model.named_modules():
        if not isinstance(norm, InstanceBatchNorm) or f"{name}.weight" not in found:
            continue
        split += 1
        for key in ("weight", "bias", "running_mean", "running_var"):
            value = found.pop(f"{name}.{key}", None)
            if value is None:
                continue
            if key in ("weight", "bias"):
                found[f"{name}.IN.{key}"] = value[: norm.half]
            found[f"{name}.BN.{key}"] = value[norm.half :]
        counted = found.pop(f"{name}.num_batches_tracked", None)
        if counted is not None:
            found[f"{name}.BN.num_batches_tracked"] = counted
    return found, split
