"""One backbone, two ends: the deep stages twice, from the same weights, on shared early ones. MDPR (arXiv 2401.06430).

Of a ResNet the last two stages; of a Vision Transformer the last blocks, whose tokens stand for the map of the last
stage, and the tokens of a block between for that of the stage before it.
"""

import copy
from typing import Any, NamedTuple

from pydantic import Field
from timm.models.resnet import ResNet
from torch import Tensor, nn

from finetune.backbones import TimmBackbone
from pretrain.backbone import Backbone
from recipes.errors import UserError
from recipes.load import Section

DEEP = 1 / 3  # of the blocks of a ViT, at least two: 4 of 12, and the mid level comes after 10


class BranchesConfig(Section):
    """Where a network forks."""

    # of a ViT: number of the first block, from 0, that each branch has a copy of; null: they have the last third, at
    # least two
    branch_from: int | None = Field(None, ge=0)
    # of a ViT: the mid level are the tokens before this block; null: half of the way from there to the end
    mid_block: int | None = Field(None, ge=1)
    # of a ResNet: its pooling after the first convolution as in fast-reid, without a border and rounded up; false as in
    # torchvision and timm, whose weights were trained so
    ceil_pool: bool = False


class Levels(NamedTuple):
    """Something of both levels of the soft branch: maps, attention, or features."""

    mid: Tensor
    last: Tensor


class SoftBranch(nn.Module):
    """A copy of the deep stages. The hard branch runs those of the backbone, which stays whole.

    channels: C1, C2 of the two levels. draws: uniform draws for the stochastic depth of an image.
    """

    channels: tuple[int, int]
    draws: int = 0

    def shared(self, backbone: nn.Module, images: Tensor, drops: Tensor | None) -> Tensor:
        """The early stages. drops: float [B, S] of the whole backbone, or None."""
        raise NotImplementedError

    def hard(self, backbone: nn.Module, shared: Tensor, drops: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The backbone's own deep stages: the last map [B, C2, h, w], and the class token [B, C2] if there is one."""
        raise NotImplementedError

    def forward(self, backbone: nn.Module, shared: Tensor, drops: Tensor | None) -> Levels:
        """The copy: maps [B, C1, h, w] and [B, C2, h, w]. drops: float [B, draws] or None."""
        raise NotImplementedError

    def origin(self, name: str) -> str:
        """Name in the backbone of the parameter that `name` here is a copy of."""
        raise NotImplementedError


class ViTBranch(SoftBranch):
    """Blocks from `start` on."""

    def __init__(self, config: BranchesConfig, backbone: Backbone):
        super().__init__()
        depth = len(backbone.vit.blocks)
        self.start = depth - max(2, round(DEEP * depth)) if config.branch_from is None else config.branch_from
        middle = (self.start + depth + 1) // 2
        self.middle = middle if config.mid_block is None else config.mid_block
        if not 0 <= self.start < self.middle < depth:
            raise UserError(f"method.branches: branch_from={self.start} and mid_block={self.middle} must be "
                            f"0 <= branch_from < mid_block < {depth}, the blocks of this backbone")  # fmt: skip
        self.blocks = copy.deepcopy(backbone.vit.blocks[self.start :])
        self.norm, self.mid_norm = copy.deepcopy(backbone.vit.norm), copy.deepcopy(backbone.vit.norm)
        self.channels, self.draws = (backbone.dim, backbone.dim), 2 * len(self.blocks)

    def shared(self, backbone: Backbone, images: Tensor, drops: Tensor | None) -> Tensor:
        return backbone.before(self.start, images, drops)

    def hard(self, backbone: Backbone, shared: Tensor, drops: Tensor | None) -> tuple[Tensor, Tensor]:
        first = 2 * self.start
        own = None if drops is None else drops[:, first:]
        x = backbone.through(shared, backbone.vit.blocks[self.start :], own, backbone.drops[first:])
        x = backbone.vit.norm(x)
        return self._map(backbone, x), x[:, 0]

    def forward(self, backbone: Backbone, shared: Tensor, drops: Tensor | None) -> Levels:
        count, rates = self.middle - self.start, backbone.drops[2 * self.start :]
        early, late = (None, None) if drops is None else (drops[:, : 2 * count], drops[:, 2 * count :])
        mid = backbone.through(shared, self.blocks[:count], early, rates[: 2 * count])
        last = backbone.through(mid, self.blocks[count:], late, rates[2 * count :])
        return Levels(self._map(backbone, self.mid_norm(mid)), self._map(backbone, self.norm(last)))

    @staticmethod
    def _map(backbone: Backbone, tokens: Tensor) -> Tensor:
        """Tokens [B, L, D] -> [B, D, gh, gw] of the patches."""
        patches = tokens[:, backbone.vit.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, backbone.grid).contiguous()

    def origin(self, name: str) -> str:
        first, _, rest = name.partition(".")
        return f"vit.norm.{rest}" if first != "blocks" else f"vit.{name}"  # a slice of blocks keeps their numbers


class ResNetBranch(SoftBranch):
    """The last two stages, res4 and res5 of the paper. Their stochastic depth, if any, is torch's own."""

    def __init__(self, config: BranchesConfig, backbone: TimmBackbone):
        super().__init__()
        if not isinstance(backbone.model, ResNet):
            raise UserError(f"method.name = mdpr forks Vision Transformers and ResNets; "
                            f"{backbone.arguments['model_name']} is none, choose another backbone.name")  # fmt: skip
        if config.branch_from is not None or config.mid_block is not None:
            raise UserError("method.branches.branch_from and mid_block are for Vision Transformers; a ResNet forks "
                            "before its last two stages, leave them away")  # fmt: skip
        model = backbone.model
        if config.ceil_pool:
            model.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.layer3, self.layer4 = copy.deepcopy(model.layer3), copy.deepcopy(model.layer4)
        self.channels = tuple(stage["num_chs"] for stage in model.feature_info[-2:])

    def shared(self, backbone: TimmBackbone, images: Tensor, drops: Tensor | None) -> Tensor:
        model = backbone.model
        return model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(images))))))

    def hard(self, backbone: TimmBackbone, shared: Tensor, drops: Tensor | None) -> tuple[Tensor, None]:
        return backbone.model.layer4(backbone.model.layer3(shared)), None

    def forward(self, backbone: TimmBackbone, shared: Tensor, drops: Tensor | None) -> Levels:
        mid = self.layer3(shared)
        return Levels(mid, self.layer4(mid))

    def origin(self, name: str) -> str:
        return f"model.{name}"


def fork(config: BranchesConfig, backbone: Any) -> SoftBranch:
    """The soft branch of a backbone: a copy of its deep stages. UserError where it cannot be forked."""
    if isinstance(backbone, TimmBackbone):
        return ResNetBranch(config, backbone)
    if config.ceil_pool:
        raise UserError("method.branches.ceil_pool is for ResNets; leave it away")
    return ViTBranch(config, backbone)
