"""The Swin Transformer of SOLIDER (Chen et al. 2023, arXiv 2303.17602), and its weights by timm's names.

It differs from timm's Swin in three ways. The map is padded to whole windows before it is shifted, not after. Windows
stay 7 x 7 where the map is smaller. And after each patch merging every channel is scaled and shifted by a function of a
semantic weight w in 0..1 (section 3.3): w near 1 brings out what people look like in parts, w near 0 appearance;
their re-identification uses 0.2. Here w is fixed, so the scale and the shift are two numbers a channel.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    get_relative_position_index,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from recipes.errors import UserError

SEMANTIC_WEIGHT = 0.2  # of SOLIDER's fine-tunes for re-identification
# their names -> timm's; the patch merging of a stage belongs to the next one in timm
RENAMED = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^stages\.(\d+)\.(?=blocks)", r"layers.\1."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^norm3\.", "norm."),
)
UNUSED = r"norm[012]\.(weight|bias)|semantic_embed_[wb]\.3\.(weight|bias)"


class PaddedBlock(SwinTransformerBlock):
    """timm's block with the padding in front of the shift."""

    def _attn(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> the same shape."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        padded, shift = x.shape, tuple(self.shift_size)
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        windows = window_partition(x, self.window_size).view(-1, self.window_area, padded[3])
        windows = self.attn(windows, mask=self.attn_mask).view(-1, *self.window_size, padded[3])
        x = window_reverse(windows, self.window_size, *padded[1:3])
        if any(shift):
            x = torch.roll(x, shift, (1, 2))
        return x[:, :height, :width].contiguous()


class SemanticStage(nn.Module):
    """Patch merging, scale and shift of the channels, blocks; the first stage has blocks only."""

    def __init__(self, dim: int, grid: tuple[int, int], first: bool, heads: int, window: int, drops: list[float]):
        """dim: channels of the blocks. grid: rows and columns before the merging. drops: stochastic depth a block."""
        super().__init__()
        self.downsample = nn.Identity() if first else PatchMerging(dim // 2, dim)
        if not first:
            grid = tuple((side + 1) // 2 for side in grid)
            self.register_buffer("scale", torch.ones(dim))
            self.register_buffer("shift", torch.zeros(dim))
        self.first, self.grid = first, grid
        self.blocks = nn.Sequential(
            *(
                PaddedBlock(
                    dim,
                    grid,
                    heads,
                    window_size=window,
                    shift_size=window // 2 if place % 2 else 0,
                    always_partition=True,
                    drop_path=drop,
                )
                for place, drop in enumerate(drops)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, W, C] -> [B, H', W', C']."""
        x = self.downsample(x)
        return self.blocks(x if self.first else x * self.scale + self.shift)


@register_model
def solider_swin(
    pretrained: bool = False,
    img_size: tuple[int, int] = (384, 128),
    embed_dim: int = 96,
    depths: tuple[int, ...] = (2, 2, 6, 2),
    num_heads: tuple[int, ...] = (3, 6, 12, 24),
    window_size: int = 7,
    drop_path_rate: float = 0.0,
    num_classes: int = 0,
    **given: Any,
) -> SwinTransformer:
    """timm's Swin Transformer with the stages above; the defaults are SOLIDER's tiny model. Sizes in pixels."""
    assert not pretrained, "weights come from a checkpoint"
    assert not any(given.values()), f"timm gives {given}"
    sizes = {"img_size": tuple(img_size), "embed_dim": embed_dim, "num_heads": tuple(num_heads)}
    # one block a stage: they are replaced at once
    model = SwinTransformer(**sizes, depths=(1,) * len(depths), window_size=window_size, num_classes=num_classes)
    rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()  # also where shapes only are built
    stages, grid = [], tuple(model.patch_embed.grid_size)
    for place, (_, heads) in enumerate(zip(depths, num_heads, strict=True)):
        own = rates[sum(depths[:place]) : sum(depths[: place + 1])]
        stages.append(SemanticStage(embed_dim * 2**place, grid, place == 0, heads, window_size, own))
        grid = stages[-1].grid
    model.layers = nn.Sequential(*stages)
    return model


def arguments_of(tensors: Mapping[str, Tensor], size: tuple[int, int], where: str) -> dict[str, Any]:
    """Arguments of finetune/backbones.build for weights by timm's names. size: of the images in pixels."""
    blocks = [{key.split(".")[3] for key in tensors if key.startswith(f"layers.{n}.blocks.")} for n in range(4)]
    tables = [tensors.get(f"layers.{n}.blocks.0.attn.relative_position_bias_table") for n in range(4)]
    stem = tensors.get("patch_embed.proj.weight")
    if stem is None or stem.ndim != 4 or any(table is None or table.ndim != 2 for table in tables):
        raise UserError(f"{where} holds no Swin Transformer of four stages; the file is refused")
    sizes = {"embed_dim": stem.shape[0], "depths": [len(found) for found in blocks]}
    sizes |= {"num_heads": [table.shape[1] for table in tables], "window_size": (math.isqrt(len(tables[0])) + 1) // 2}
    return {"model_name": "solider_swin", "num_classes": 0, "img_size": list(size), **sizes}


def merging_order(values: Tensor) -> Tensor:
    """The last dimension from (channel, row, column), as torch's unfold lists 2 x 2 patches, to timm's (column, row,
    channel). values: [..., 4 C]."""
    channels = values.shape[-1] // 4
    return values.unflatten(-1, (channels, 2, 2)).movedim(-3, -1).transpose(-3, -2).flatten(-3)


def _modulation(tensors: Mapping[str, Tensor], semantic_weight: float) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """Scale and shift of the stages, and the keys that they were made from; {} where the model has none."""
    found, point = {}, torch.tensor([semantic_weight, 1 - semantic_weight])
    for place in range(3):
        for what, name in (("w", "scale"), ("b", "shift")):
            keys = tuple(f"semantic_embed_{what}.{place}.{part}" for part in ("weight", "bias"))
            if not all(key in tensors for key in keys):
                continue
            weight, bias = (tensors[key].float() for key in keys)
            if weight.shape[:1] != bias.shape:  # the sum would stretch a shorter one
                raise RuntimeError(f"{keys[0]} {tuple(weight.shape)}, {keys[1]} {tuple(bias.shape)}")
            value = weight @ point + bias
            found[f"layers.{place + 1}.{name}"] = (F.softplus(value) if what == "w" else value), keys
    return found


def by_timms_names(
    tensors: Mapping[str, Tensor], semantic_weight: float, where: str
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]], dict[str, str]]:
    """SOLIDER's weights by timm's names, the keys that each was made from, and those that are left out with the
    reason."""
    named, origin, left_out = {}, {}, {}
    made = _modulation(tensors, semantic_weight)
    spent = {key for _, keys in made.values() for key in keys}
    for key, value in tensors.items():
        if key in spent:
            continue
        if re.fullmatch(UNUSED, key):
            left_out[key] = "never reaches the feature"
            continue
        if key.endswith(".relative_position_index"):
            window = math.isqrt(len(value))
            if not torch.equal(value, get_relative_position_index(window, window)):
                raise UserError(f"{where}: {key} is not the usual order of the places in a window; the file is refused")
            left_out[key] = "follows from the size of the windows"
            continue
        merging = re.match(r"stages\.(\d+)\.downsample\.(.+)", key)
        if merging:
            name, value = f"layers.{int(merging[1]) + 1}.downsample.{merging[2]}", merging_order(value)
        else:
            name = key
            for pattern, new in RENAMED:
                name = re.sub(pattern, new, name)
        if name in named:
            raise UserError(f"{where}: {origin[name][0]} and {key} are both {name} in timm; the file is refused")
        named[name], origin[name] = value, (key,)
    for name, (value, keys) in made.items():
        named[name], origin[name] = value, keys
    if not made:  # a Swin Transformer without semantic weights: nothing is scaled
        for place in (1, 2, 3):
            dim = named.get(f"layers.{place}.blocks.0.norm1.weight")
            if dim is not None:
                named[f"layers.{place}.scale"], named[f"layers.{place}.shift"] = torch.ones_like(dim), dim * 0
                origin[f"layers.{place}.scale"] = origin[f"layers.{place}.shift"] = ()
    return named, origin, left_out
