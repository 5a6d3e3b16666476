"""A model written with plain tensor operations, for exporters: the same features, no packing, no Python branches.

pretrain/backbone.py runs crops of several sizes through one forward, with kernels chosen at run time. An exporter
follows one path and wants the batch left open, so the Vision Transformer is run here block by block as timm does it.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.backbone import Backbone, Tokens

Input = Literal["own", "imagenet", "pixels"]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, std of R, G, B in 0..1


class PlainBackbone(nn.Module):
    """The interface of pretrain's Backbone that the methods use, for eval mode: no masks, no stochastic depth."""

    def __init__(self, backbone: Backbone, added: Tensor | None):
        """added: [1, D], added to every token before the first block."""
        super().__init__()
        self.register_buffer("added", added)
        self.arguments, self.dim, self.grid = backbone.arguments, backbone.dim, backbone.grid
        self.drops: list[float] = []
        self.vit = backbone.vit

    def before(self, block: int, images: Tensor, drops: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """The tokens [B, L, D] that go into block number `block`, which may count from the end."""
        x = self.vit._pos_embed(self.vit.patch_embed(images))
        x = self.vit.norm_pre(x if self.added is None else x + self.added[:, None])
        return self.through(x, self.vit.blocks[:block], None, ())

    def through(
        self, tokens: Tensor, blocks: Sequence[nn.Module], drops: Tensor | None, rates: Sequence[float]
    ) -> Tensor:
        """Tokens [B, L, D] through blocks of this network, or copies of them."""
        for block in blocks:
            tokens = block(tokens)
        return tokens

    def forward(
        self,
        images: Tensor,
        drops: Tensor | None = None,
        added: Tensor | None = None,
        patches: Literal["all", "none"] = "all",
    ) -> Tokens:
        """images float32 [B, 3, H, W]."""
        x, prefix = self.vit.norm(self.before(len(self.vit.blocks), images, None, added)), self.vit.num_prefix_tokens
        return Tokens(x[:, 0], x[:, prefix:], x[:, 1:prefix])


class PlainEmbedder(nn.Module):
    """Images as a tracker prepares them -> L2-normalised features. For eval mode."""

    def __init__(self, model: nn.Module, own: Mapping[str, Sequence[float]], prepared: Input):
        """model: has `embed`. own: mean and std of its training, of R, G, B in 0..1.

        prepared: how the images come: "own", normalised with these; "imagenet", with ImageNet's; "pixels", in 0..255.
        """
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        if isinstance(model.backbone, Backbone):
            cameras = getattr(self.model, "sie", None)
            # trackers do not know the cameras of its training: for all images the mean of their vectors
            added = None if cameras is None else cameras(None, 1).detach().clone()
            self.model.sie = None
            self.model.backbone = PlainBackbone(self.model.backbone, added)
        zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        mean, std = {"own": (own["mean"], own["std"]), "imagenet": IMAGENET, "pixels": (zeros, [1 / 255] * 3)}[prepared]
        scale, shift = (torch.tensor(values, dtype=torch.float64) for values in (ones, zeros))
        if prepared != "own":  # back to 0..1, then as in its training
            scale = torch.tensor(std, dtype=torch.float64) / torch.tensor(own["std"], dtype=torch.float64)
            difference = torch.tensor(mean, dtype=torch.float64) - torch.tensor(own["mean"], dtype=torch.float64)
            shift = difference / torch.tensor(own["std"], dtype=torch.float64)
        self.register_buffer("scale", scale.float()[:, None, None])
        self.register_buffer("shift", shift.float()[:, None, None])
        self.folds = prepared != "own"
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """images float32 [B, 3, H, W] -> [B, F]."""
        return self.model.embed(images * self.scale + self.shift if self.folds else images)
