"""ResNet-50 with IBN-a (Pan et al. 2018, arXiv 1807.09441), which timm has not: `backbone.name: resnet50_ibn_a`.

Half of the channels after the first convolution of a block lose what a camera does to contrast and colour (instance
normalisation), the other half keep it (batch normalisation); not in the last stage, whose features shall tell people
apart. Weights have the names of the authors' file, which `--ckpt FILE` reads.
"""

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


@register_model
def resnet50_ibn_a(pretrained: bool = False, **arguments: Any) -> ResNet:
    """timm's ResNet-50 with IBN-a in its first three stages. timm has no weights for it: RuntimeError if pretrained."""
    if pretrained:
        raise RuntimeError("timm has no weights of resnet50_ibn_a; give the authors' file to --ckpt")
    given = {key: value for key, value in arguments.items() if key not in ("pretrained_cfg", "pretrained_cfg_overlay")}
    model = timm.create_model("resnet50", **given)
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            block.bn1 = InstanceBatchNorm(block.bn1.num_features)
    return model
