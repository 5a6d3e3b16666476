"""timm's Vision Transformer on rectangular images, with masked patches and per-sample drop path."""

import json
from typing import Any, Literal, NamedTuple

import timm
import torch
from pydantic import Field
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from recipes.errors import UserError
from recipes.load import Section

Init = Literal["truncated_normal", "fan_in"]


class BackboneConfig(Section):
    """A Vision Transformer by its timm name; the sizes below override the named ones where given."""

    name: str = "vit_small_patch16_224"
    patch_size: int = Field(16, ge=1)  # pixels
    embed_dim: int | None = Field(None, ge=1)  # None: of the named model
    depth: int | None = Field(None, ge=1)  # blocks
    num_heads: int | None = Field(None, ge=1)
    drop_path: float = Field(0.1, ge=0, lt=1)  # of the last block; grows linearly from 0
    init: Init = "truncated_normal"  # std 0.02, or linear layers at 1/sqrt(fan_in), better for narrow models


class Tokens(NamedTuple):
    """Output of the backbone after the final norm. D = embedding dimension."""

    cls: Tensor  # [B, D]
    patches: Tensor  # [B, N, D], row by row over the grid


def init_linear(module: nn.Module, how: Init) -> None:
    """Start every linear layer: weights truncated normal of std 0.02 or 1/sqrt(fan_in) (cut at +-2 std), biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            std = 0.02 if how == "truncated_normal" else layer.in_features**-0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class SampleDropPath(nn.Module):
    """Stochastic depth whose draws come from outside: a residual branch of a sample is dropped when its number < rate.

    The numbers belong to the sample (shards/seeds.py), not to the process, so a run is the same on any number of
    processes and after a resume. Kept branches are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.draws: Tensor | None = None  # [B] uniform in [0, 1), set for one forward; None = keep all

    def forward(self, branch: Tensor) -> Tensor:
        if self.draws is None or self.rate == 0.0:
            return branch
        keep = (self.draws >= self.rate).to(branch.dtype) / (1 - self.rate)
        return branch * keep.view(-1, *[1] * (branch.dim() - 1))


def timm_arguments(config: BackboneConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    """What to give `timm.create_model` so that the exported weights load: name and keyword arguments.

    image_size: height, width in pixels. Raises UserError when patches do not tile it.
    """
    if any(side % config.patch_size for side in image_size):
        height, width = image_size
        raise UserError(
            f"images of {height} x {width} pixels cannot be cut into patches of backbone.patch_size = "
            f"{config.patch_size}; make height and width multiples of it"
        )
    given = {k: getattr(config, k) for k in ("embed_dim", "depth", "num_heads") if getattr(config, k) is not None}
    size = {"img_size": list(image_size), "patch_size": config.patch_size, "dynamic_img_size": True}
    return {"model_name": config.name, "num_classes": 0, **size, **given}


def create_vit(arguments: dict[str, Any]) -> VisionTransformer:
    """The timm model of those arguments. Raises UserError when the name is no Vision Transformer of timm."""
    arguments = dict(arguments)
    name = arguments.pop("model_name")
    if not timm.is_model(name):
        raise UserError(f"backbone.name = {name!r} is no timm model; see timm.list_models('vit*')")
    try:
        vit = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"timm refuses to build {name!r} with {json.dumps(arguments)}: {error}") from error
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"backbone.name = {name!r} is not a Vision Transformer; choose a timm model 'vit_*'")
    return vit


class Backbone(nn.Module):
    """A timm ViT that returns Tokens.

    arguments: see `timm_arguments`. `self.vit` is the plain timm model: its state dict is what gets exported.
    """

    def __init__(self, arguments: dict[str, Any], masked: bool = False, drop_path: float = 0.0):
        super().__init__()
        self.arguments = arguments
        self.vit = create_vit(arguments)
        self.dim: int = self.vit.embed_dim
        self.grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)
        self.mask_embedding = nn.Parameter(torch.zeros(1, self.dim)) if masked else None
        depth = len(self.vit.blocks)
        self.drops: list[SampleDropPath] = []
        for index, block in enumerate(self.vit.blocks):
            for place in ("drop_path1", "drop_path2"):
                assert isinstance(getattr(block, place), nn.Identity | DropPath)
                drop = SampleDropPath(drop_path * index / max(depth - 1, 1))
                setattr(block, place, drop)
                self.drops.append(drop)
            # fused attention in bf16 is several times slower than plain matmuls on CPU at these lengths
            if hasattr(block.attn, "fused_attn"):
                block.attn.fused_attn = torch.cuda.is_available()

    def initialise(self, how: Init) -> None:
        """Fresh weights, drawn from torch's current generator: tokens and positions std 0.02, norms at 1 and 0."""
        init_linear(self.vit, how)
        for parameter in (self.vit.cls_token, self.vit.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)

    def forward(self, images: Tensor, mask: Tensor | None = None, drops: Tensor | None = None) -> Tokens:
        """images float [B, 3, H, W]; mask bool [B, gh, gw], True = replaced by the mask embedding before the positions
        are added; drops float [B, S] uniform draws for stochastic depth, S = len(self.drops)."""
        for place, drop in enumerate(self.drops):
            drop.draws = drops[:, place] if drops is not None else None
        vit = self.vit
        x = vit.patch_embed(images)  # [B, gh, gw, D]
        if mask is not None:
            assert self.mask_embedding is not None, "this backbone was built without a mask embedding"
            x = torch.where(mask[..., None], self.mask_embedding.to(x.dtype), x)
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))
        x = vit.norm(vit.blocks(x))
        return Tokens(x[:, 0], x[:, vit.num_prefix_tokens :])
