"""Blocks of convolutions behind a backbone: MDPR (arXiv 2401.06430)."""

from torch import Tensor, nn


def start(module: nn.Module) -> nn.Module:
    """Start every convolution in `module` as published: normal, fan-out of ReLU (He et al. 2015, arXiv 1502.01852)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return module


def embedding(channels: int, dim: int) -> nn.Sequential:
    """Maps [B, channels, h, w] -> [B, dim, h, w], >= 0: 1 x 1 convolution -> BatchNorm -> ReLU."""
    return start(nn.Sequential(nn.Conv2d(channels, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)))


class Summed(nn.Module):
    """1 x 1 and 3 x 3 convolution side by side, summed -> BatchNorm -> ReLU: what makes the attention maps."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.point = nn.Conv2d(channels, dim, 1, bias=False)
        self.square = nn.Conv2d(channels, dim, 3, padding=1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(dim), nn.ReLU(inplace=True)
        start(self)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, dim, h, w], >= 0."""
        return self.relu(self.norm(self.point(maps) + self.square(maps)))


def fused(channels: int, width: int) -> nn.Sequential:
    """Maps [B, channels, h, w] -> [B, width, h, w], >= 0: 1 x 1, then 3 x 3 convolution -> BatchNorm -> ReLU."""
    return start(
        nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
    )
