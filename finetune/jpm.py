"""Jigsaw patches of TransReID (He et al. 2021, arXiv 2102.04378, section 3.2): local features beside the CLS token."""

import copy

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.backbone import Backbone
from recipes.errors import UserError
from recipes.load import Section


class JpmConfig(Section):
    """Shapes and weights; the published numbers of PersonViT are without it."""

    shift: int = Field(5, ge=1)  # tokens, CLS included: the patches from this token on come first
    groups: int = Field(2, ge=1)  # of the shuffle
    slices: int = Field(4, ge=1)  # local features
    global_weight: float = Field(0.5, ge=0, le=1)  # of the losses on CLS; the mean of the local ones has the rest


def rearranged(patches: Tensor, shift: int, groups: int) -> Tensor:
    """Patches [B, N, D] in the order in which the slices are cut.

    The first shift - 1 patches move to the end (the published shift counts the CLS token), then the sequence is cut
    into `groups` equal parts and read across them; where N is no multiple the last but one is repeated, as published.
    """
    moved = torch.cat([patches[:, shift - 1 :], patches[:, : shift - 1]], dim=1)
    lacking = -moved.shape[1] % groups
    if lacking:
        moved = torch.cat([moved, moved[:, -2:-1].expand(-1, lacking, -1)], dim=1)
    return moved.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class JigsawPatches(nn.Module):
    """A copy of the last block and norm, run on CLS with each slice of the rearranged patches."""

    def __init__(self, config: JpmConfig, backbone: Backbone):
        super().__init__()
        if backbone.grid[0] * backbone.grid[1] < max(config.slices, config.shift):
            rows, columns = backbone.grid
            raise UserError(f"method.jpm cannot cut {rows} x {columns} patches into {config.slices} slices")
        self.config = config
        self.block, self.norm = copy.deepcopy(backbone.vit.blocks[-1]), copy.deepcopy(backbone.vit.norm)
        self.prefix = backbone.vit.num_prefix_tokens

    @property
    def draws(self) -> int:
        """Uniform draws for the stochastic depth of an image: two branches for each slice."""
        return 2 * self.config.slices

    def forward(self, backbone: Backbone, tokens: Tensor, drops: Tensor | None) -> list[Tensor]:
        """tokens [B, L, D] before the last block; drops float [B, draws] or None. Returns a [B, D] for each slice."""
        cls = tokens[:, :1]
        patches = rearranged(tokens[:, self.prefix :], self.config.shift, self.config.groups)
        length, found = patches.shape[1] // self.config.slices, []
        for place in range(self.config.slices):
            part = torch.cat([cls, patches[:, place * length : (place + 1) * length]], dim=1)
            own = None if drops is None else drops[:, 2 * place : 2 * place + 2]
            found.append(self.norm(backbone.through(part, [self.block], own, backbone.drops[-2:]))[:, 0])
        return found
