"""Which Vision Transformer some weights belong to: timm's arguments from their shapes, and the strict comparison."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from pretrain.backbone import create_vit
from recipes.errors import UserError

# embedding dimension, blocks -> timm's name and the heads, which no shape tells
NAMED = {
    (192, 12): ("vit_tiny_patch16_224", 3),
    (384, 12): ("vit_small_patch16_224", 6),
    (768, 12): ("vit_base_patch16_224", 12),
    (1024, 24): ("vit_large_patch16_224", 16),
    (1280, 32): ("vit_huge_patch14_224", 16),
    (1536, 40): ("vit_giant_patch14_dinov2", 24),
}
HEAD_DIM = 64  # of DINO, iBOT, DINOv2 and all that follow them
NEEDED = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "norm.weight": 1}
NEEDED |= {f"blocks.0.{name}.weight": 2 for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
LAYER_SCALE = 1e-5  # DINOv2's initial value; any number makes timm build the layer

Grid = tuple[int, int]  # rows, columns of patches


def grid_of(patches: int, hint: Grid | None, likely: Grid | None, where: str) -> Grid:
    """Rows and columns of the patches that the position embeddings are for.

    hint: what the user or the file says; it must fit. Without it the grid is a square or has twice as many rows as
    columns; `likely`, the grid that the recipe asks for, decides where neither fits. UserError when nothing fits or two
    grids do.
    """
    if hint is not None:
        if math.prod(hint) != patches:
            raise UserError(f"{where} has positions for {patches} patches, not for a grid of {hint[0]} x {hint[1]}")
        return hint
    side, narrow = math.isqrt(patches), math.isqrt(patches // 2)
    found = {(side, side)} if side * side == patches else set()
    found |= {(2 * narrow, narrow)} if 2 * narrow * narrow == patches else set()
    found |= {likely} if likely is not None and math.prod(likely) == patches else set()
    if len(found) == 1:
        return found.pop()
    shapes = " and ".join(f"{rows} x {columns}" for rows, columns in sorted(found)) or "no square and not 2:1"
    raise UserError(
        f"{where} has positions for {patches} patches, which may be {shapes}; tell the grid that they are for: "
        "python pretrain/convert.py FILE --grid ROWS COLUMNS --out FOLDER, then give FOLDER as --ckpt"
    )


def timm_arguments_of(tensors: dict[str, Tensor], grid: Grid, where: str, heads: int | None = None) -> dict[str, Any]:
    """Arguments of `backbone.create_vit` for weights by timm's names, as `backbone.timm_arguments` would write them.

    heads: of the attention; None: known for the usual sizes, else 64 channels a head. UserError where the dimension is
    no multiple of that.
    """
    dim, patch = tensors["cls_token"].shape[2], tensors["patch_embed.proj.weight"].shape[-1]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    hidden, back = tensors["blocks.0.mlp.fc1.weight"].shape[0], tensors["blocks.0.mlp.fc2.weight"].shape[1]
    stem = {"stem": "ics"} if "patch_embed.conv.0.weight" in tensors else {}
    patch *= 2 if stem else 1  # the convolutions before it halve the image
    name, usual = NAMED.get((dim, depth), ("", None))
    heads = heads or usual or (dim // HEAD_DIM if dim % HEAD_DIM == 0 else None)
    if not heads or dim % heads:
        raise UserError(
            f"{where}: nothing in the file tells into how many heads its {dim} channels are cut; say it: "
            "python pretrain/convert.py FILE --heads N --out FOLDER, then give FOLDER as --ckpt"
        )
    own = {} if name and heads == usual else {"embed_dim": dim, "depth": depth, "num_heads": heads}
    if hidden == 2 * back:  # the gated MLP of the largest DINOv2
        name = "vit_giant_patch14_dinov2"
        own |= {"mlp_ratio": hidden / dim}
    elif hidden != 4 * dim:
        own["mlp_ratio"] = hidden / dim
    own |= {} if "blocks.0.attn.qkv.bias" in tensors else {"qkv_bias": False}
    own |= {"init_values": LAYER_SCALE} if "blocks.0.ls1.gamma" in tensors else {}
    own |= {"reg_tokens": tensors["reg_token"].shape[1]} if "reg_token" in tensors else {}
    size = {"img_size": [grid[0] * patch, grid[1] * patch], "patch_size": patch, "dynamic_img_size": True}
    return {"model_name": name or "vit_tiny_patch16_224", "num_classes": 0, **size, **own, **stem}


def need_vit(tensors: dict[str, Tensor], where: str) -> None:
    """Raise UserError unless these are, by their names, the weights of a ViT."""
    lacking = [name for name, ndim in NEEDED.items() if name not in tensors or tensors[name].ndim != ndim]
    if lacking:
        holds = ", ".join(list(tensors)[:5])
        raise UserError(
            f"{where} holds no Vision Transformer that is known here: it lacks {', '.join(lacking[:3])}; it holds "
            f"{holds}, ... See docs/checkpoints.md for what is read"
        )


def empty_vit(arguments: dict[str, Any]) -> VisionTransformer:
    """The model of those arguments without memory for its weights: shapes only."""
    with torch.device("meta"):
        return create_vit(arguments)


def prefix_places(vit: VisionTransformer) -> int:
    """Places for CLS and registers in its position embeddings; some of timm's models have none."""
    return vit.pos_embed.shape[1] - math.prod(vit.patch_embed.grid_size)


def check_keys(tensors: dict[str, Tensor], arguments: dict[str, Any], where: str) -> None:
    """Raise UserError that names missing, unexpected and reshaped keys, unless the weights are exactly that model's."""
    told = misfits(empty_vit(arguments).state_dict(), tensors)
    if told:
        raise UserError(f"{where} is not exactly one plain ViT: by timm's names, {told}")


def misfits(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """`2 missing (a, b); 1 not expected (c)`: how the keys and shapes of `given` differ from those of `wanted`, ""
    where they do not."""
    own, found = ({name: tuple(value.shape) for name, value in state.items()} for state in (wanted, given))
    reshaped = [f"{key} {found[key]} for {own[key]}" for key in own if key in found and found[key] != own[key]]
    faults = {
        "missing": [key for key in own if key not in found],
        "not expected": [key for key in found if key not in own],
        "of another shape": reshaped,
    }
    return "; ".join(
        f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
        for what, keys in faults.items()
        if keys
    )


def traits(arguments: dict[str, Any]) -> dict[str, Any]:
    """What tells one ViT from another beside the image size, by the names of the recipe's backbone section."""
    vit = empty_vit(arguments)
    block, patch = vit.blocks[0], vit.patch_embed.patch_size
    return {
        "depth": len(vit.blocks),
        "embed_dim": vit.embed_dim,
        "num_heads": block.attn.num_heads,
        "patch_size": patch[0],
        "registers": vit.num_prefix_tokens - 1,
        "stem": arguments.get("stem", "patch"),
        "MLP ratio": block.mlp.fc1.out_features / vit.embed_dim,
        "layer scale": any(name.endswith("ls1.gamma") for name, _ in vit.named_parameters()),
        "activation": type(block.mlp.act).__name__,
        "epsilon of the norms": getattr(vit.norm, "eps", None),
        "norms of queries and keys": any(".q_norm." in name for name, _ in vit.named_parameters()),
        "norm before the blocks": any(name.startswith("norm_pre") for name, _ in vit.named_parameters()),
    }


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """`depth is 2, the recipe asks for 3`, for two sets of arguments; [] where only names and image sizes differ."""
    if found | {"img_size": None} == wanted | {"img_size": None}:
        return []
    one, other = traits(found), traits(wanted)
    return [f"{key} is {one[key]}, the recipe asks for {other[key]}" for key in one if one[key] != other[key]]
