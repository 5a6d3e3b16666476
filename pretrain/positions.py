"""Position embeddings of one patch grid on another."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Kernel = Literal["bilinear", "bicubic"]


def resize_positions(
    positions: Tensor,
    old: tuple[int, int],
    new: tuple[int, int],
    prefix: int,
    kernel: Kernel = "bilinear",
) -> Tensor:
    """Position embeddings [1, prefix + N, D] from one patch grid (rows, columns) to another.

    The `prefix` places of CLS (and registers) are copied. "bilinear" is the kernel with which the published fine-tunes
    load a checkpoint; "bicubic" the one that DINO (arXiv 2104.14294) runs on every crop of another size: it adds 0.1 to
    the new sides before it takes their ratio to the old ones as the scale.
    """
    patches = rearrange(positions[:, prefix:], "1 (r c) d -> 1 d r c", r=old[0], c=old[1])
    if kernel == "bilinear":
        patches = F.interpolate(patches, size=new, mode="bilinear", align_corners=False)
    else:
        scale = [(to + 0.1) / side for side, to in zip(old, new, strict=True)]
        patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
        assert tuple(patches.shape[2:]) == tuple(new)
    return torch.cat([positions[:, :prefix], rearrange(patches, "1 d r c -> 1 (r c) d")], dim=1)


def resizing(old: tuple[int, int], new: tuple[int, int], kernel: Kernel) -> str:
    """How `resize_positions` changes them, for people."""
    return f"from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches, {kernel}"


def fit_prefix(tensors: dict[str, Tensor], places: int, wanted: int) -> dict[str, Tensor]:
    """The same ViT with another number of places for the prefix (CLS, then R registers) in `pos_embed`; equal outputs.

    tensors: by timm's names; pos_embed [1, places + N, D]. places, wanted: 0 (positions of the patches only), 1 (CLS
    has one) or 1 + R (all have one). Missing places become zeros; surplus ones are added to their tokens. Raises
    KeyError for a number of places that no ViT has.
    """
    if places == wanted:
        return tensors
    tokens = [name for name in ("cls_token", "reg_token") if name in tensors]
    counts = [tensors[name].shape[1] for name in tokens]
    if not {places, wanted} <= {0, 1, sum(counts)}:
        raise KeyError(f"pos_embed has {places} places for {sum(counts)} tokens before the patches")
    own, patches = tensors["pos_embed"][:, :places], tensors["pos_embed"][:, places:]
    zeros = own.new_zeros(1, sum(counts) - places, own.shape[2])
    own = torch.cat([own, zeros], dim=1)  # [1, 1 + R, D]
    kept = own[:, :wanted]
    added = torch.cat([torch.zeros_like(kept), own[:, wanted:]], dim=1).split(counts, dim=1)
    folded = {name: tensors[name] + part for name, part in zip(tokens, added, strict=True)}
    return tensors | folded | {"pos_embed": torch.cat([kept, patches], dim=1)}
