"""The ResNet of CLIP (Radford et al. 2021, arXiv 2103.00020, section 2.4): `backbone.name: clip_resnet50`, `..101`.

Three convolutions for a stem, average pooling before every stride, and attention instead of average pooling at the end.
Weights have the names of the authors' file, which `--ckpt FILE` reads; timm's own copies have other names. As text
search has it (arXiv 2110.10807): the last stage has stride 1, and the table of positions is resized to the grid of the
images, 24 x 8 for 384 x 128 pixels.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from recipes.errors import UserError

NORMALIZE = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
EXPANSION, HEAD = 4, 64  # widening of a block; numbers of an attention head
SIZE = (384, 128)  # height and width of the images, where nothing else is asked for


class ClipBlock(nn.Module):
    """Bottleneck whose stride is an average pooling, in the block and beside it. channels, width: in, and inside."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, width * EXPANSION, 1, bias=False), nn.BatchNorm2d(width * EXPANSION)
        self.stride, self.downsample = stride, None
        if stride > 1 or channels != width * EXPANSION:
            projected = nn.Conv2d(channels, width * EXPANSION, 1, bias=False)
            self.downsample = nn.Sequential(projected, nn.BatchNorm2d(width * EXPANSION))  # named 0 and 1

    def forward(self, maps: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, 4 width, H / stride, W / stride]."""
        inside = F.relu(self.bn1(self.conv1(maps)))
        inside = F.relu(self.bn2(self.conv2(inside)))
        beside = maps
        if self.stride > 1:
            inside, beside = F.avg_pool2d(inside, self.stride), F.avg_pool2d(beside, self.stride)
        beside = beside if self.downsample is None else self.downsample(beside)
        return F.relu(self.bn3(self.conv3(inside)) + beside)


class AttentionPool(nn.Module):
    """One attention whose query is the mean of all places. grid: rows, columns. dim: of a place. out: F."""

    def __init__(self, grid: tuple[int, int], dim: int, out: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(grid[0] * grid[1] + 1, dim) * dim**-0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.c_proj = nn.Linear(dim, out)
        self.grid = grid

    def forward(self, maps: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, F]; another grid than its own gets resized positions."""
        places = maps.flatten(2).transpose(1, 2)
        x = torch.cat([places.mean(dim=1, keepdim=True), places], dim=1)
        positions = resized(self.positional_embedding, self.grid, tuple(maps.shape[2:]))
        x = x + positions.to(x.dtype)
        heads = x.shape[2] // HEAD
        q, k, v = (
            layer(part).unflatten(2, (heads, HEAD)).transpose(1, 2)
            for layer, part in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


def resized(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions [1 + N, D], that of the mean first, of the grid `old`, bilinearly for the grid `new`."""
    if old == new:
        return positions
    first, places = positions[:1], positions[1:]
    maps = places.T.unflatten(1, old)[None].float()
    maps = F.interpolate(maps, size=new, mode="bilinear", align_corners=False)
    return torch.cat([first, maps[0].flatten(1).T.to(first.dtype)])


class ClipResNet(nn.Module):
    """As timm's models are: `forward_features` gives maps, `forward_head` the feature. layers: blocks of the stages.
    width: of the stem. out: length of the feature."""

    def __init__(self, layers: tuple[int, ...], width: int, out: int, img_size: tuple[int, int] = SIZE):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        channels, stages = width, []
        for number, count in enumerate(layers):
            own = width * 2**number
            strides = [1 if number in (0, len(layers) - 1) else 2] + [1] * (count - 1)
            blocks = []
            for stride in strides:
                blocks.append(ClipBlock(channels, own, stride))
                channels = own * EXPANSION
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        if any(side % 16 for side in img_size):
            raise ValueError(f"images of {img_size[0]} x {img_size[1]} pixels are no multiples of 16")
        self.grid = img_size[0] // 16, img_size[1] // 16
        self.attnpool = AttentionPool(self.grid, channels, out)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, H / 16, W / 16]."""
        x = images
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(F.avg_pool2d(x, 2)))))

    def forward_head(self, maps: Tensor, pre_logits: bool = True) -> Tensor:
        """[B, D, h, w] -> [B, out]. There is no classifier, so `pre_logits` changes nothing."""
        return self.attnpool(maps)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, out]."""
        return self.forward_head(self.forward_features(images))

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """What timm needs for a rate that shrinks from layer to layer: stem, then block by block, then the pooling."""
        return {"stem": r"^(?:conv|bn)\d", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def from_clip(self, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The weights of this network in a CLIP state dict, in float32, the positions on the grid of this one's images.

        UserError where it holds no such network; what does not fit otherwise is told by whoever loads the result.
        """
        own = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        positions = own.get("attnpool.positional_embedding")
        if positions is None or positions.ndim != 2:
            raise UserError(f"{where} holds no ResNet of CLIP: visual.attnpool.positional_embedding is missing")
        side = round((len(positions) - 1) ** 0.5)
        if side * side + 1 == len(positions):  # of square images, as published; others must fit as they are
            own["attnpool.positional_embedding"] = resized(positions.float(), (side, side), self.grid)
        return {key: value if key.endswith("num_batches_tracked") else value.float() for key, value in own.items()}


def _made(layers: tuple[int, ...], out: int, pretrained: bool, arguments: dict[str, Any]) -> ClipResNet:
    if pretrained:
        raise RuntimeError("give a file of CLIP's authors to --ckpt; timm's copies have other names")
    given = {key: value for key, value in arguments.items() if key in ("width", "img_size")}
    model = ClipResNet(layers, given.get("width", 64), out, tuple(given.get("img_size", SIZE)))
    model.default_cfg = {"classifier": "none", "input_size": (3, *SIZE)}
    return model


@register_model
def clip_resnet50(pretrained: bool = False, **arguments: Any) -> ClipResNet:
    """CLIP's RN50, 1,024 numbers. RuntimeError if pretrained."""
    return _made((3, 4, 6, 3), 1024, pretrained, arguments)


@register_model
def clip_resnet101(pretrained: bool = False, **arguments: Any) -> ClipResNet:
    """CLIP's RN101, 512 numbers. RuntimeError if pretrained."""
    return _made((3, 4, 23, 3), 512, pretrained, arguments)
