"""MDPR (arXiv 2401.06430): two branches of one backbone that learn from each other, for features that miss little.

The hard branch cuts a person into pieces of equal height, the soft one learns by itself where to look; a tree of
convolutions joins both. Each stream has a classifier (circle softmax) and a triplet loss of its own. Published with a
ResNet-101 with IBN-a; on a Vision Transformer the tokens of the deep blocks are the maps.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from finetune.attention_diversity import AttentionDiversityConfig, attention_diversity
from finetune.attention_maker import AttentionMakerConfig
from finetune.branch_heads import HardContent, SoftContent, StreamHead
from finetune.branches import BranchesConfig, Levels, fork
from finetune.circle_softmax import CircleSoftmaxConfig
from finetune.distillation import DistillationConfig, MutualDistillation
from finetune.fusion import FusionConfig, FusionTree
from finetune.id_losses import IdLosses, IdLossesConfig
from finetune.methods.base import ImageBatch, Method, Parts
from pretrain.backbone import Backbone
from recipes.errors import UserError
from recipes.load import Section

Stream = Literal["global", "parts", "last", "mid", "cls", "fusion"]
BESIDE = ("seen_last", "seen_mid")  # streams that are trained and not searched with


class Config(Section):
    """The published values; null switches a part off."""

    dim: int = Field(512, ge=1)  # of the global feature, of each part, and of each level of the soft branch
    parts: int = Field(2, ge=1)  # of equal height; 2: upper and lower body
    branches: BranchesConfig = BranchesConfig()
    attention_maker: AttentionMakerConfig | None = AttentionMakerConfig()
    attention_diversity: AttentionDiversityConfig = AttentionDiversityConfig()
    distillation: DistillationConfig | None = DistillationConfig()
    fusion: FusionConfig | None = FusionConfig()
    cls: bool = False  # of a ViT: the class token is one more stream; not in the paper
    circle_softmax: CircleSoftmaxConfig = CircleSoftmaxConfig()
    id_losses: IdLossesConfig = IdLossesConfig(margin=0.05, label_smoothing=0.1, smooth_over="others")
    streams: tuple[Stream, ...] | None = None  # what is searched with, in this order; null: all


class MutualBranches(Method):
    """Backbone with a second end, the two contents, their fusion, and a head for each stream."""

    def __init__(self, config: Config, parts: Parts):
        super().__init__(parts)
        self.config = config
        self.branch = fork(config.branches, parts.backbone)
        rows = parts.backbone.grid[0]
        if config.parts > rows:
            raise UserError(f"method.parts={config.parts} is more than the {rows} rows of the backbone's map")
        if config.cls and not isinstance(parts.backbone, Backbone):
            raise UserError("method.cls needs the class token of a Vision Transformer; leave it false")
        channels, dim = self.branch.channels, config.dim
        self.hard = HardContent(channels[1], dim, config.parts)
        self.soft = SoftContent(config.attention_maker, channels, dim)
        self.tree = FusionTree(config.fusion, dim) if config.fusion else None
        self.distil = MutualDistillation(dim) if config.distillation else None
        pooled = [*self._names("global"), *self._names("parts"), "last", "mid"]
        lengths = dict.fromkeys(pooled, dim) | ({"fusion": self.tree.dim} if self.tree else {})
        plain = {"cls": parts.backbone.dim} if config.cls else {}
        if config.attention_maker:
            plain |= dict.fromkeys(BESIDE, config.attention_maker.maps * dim)
        heads = {name: StreamHead(config.circle_softmax, length, parts.classes) for name, length in lengths.items()}
        heads |= {name: StreamHead(config.circle_softmax, length, parts.classes, pools=False)
                  for name, length in plain.items()}  # fmt: skip
        self.heads = nn.ModuleDict(heads)
        beside = config.id_losses.model_copy(update={"triplet_weight": 0.0})
        self.losses = nn.ModuleDict(
            {name: IdLosses(beside if name in BESIDE else config.id_losses, head.norm.num_features, parts.classes)
             for name, head in self.heads.items()}
        )  # fmt: skip
        self.search_by(tuple(self._lengths()) if config.streams is None else config.streams)

    def _names(self, stream: str) -> list[str]:
        """The heads of a stream. "global" has another name: exporters make attributes of them, and it is a keyword."""
        if stream == "parts":
            return [f"part_{n + 1}" for n in range(self.config.parts)]
        return ["whole" if stream == "global" else stream]

    @property
    def draws(self) -> int:
        return super().draws + (self.branch.draws if self.backbone.drops else 0)

    @property
    def watched(self) -> list[nn.Module]:
        return [self.branch, self.hard, self.soft, *([] if self.tree is None else [self.tree])]

    def _lengths(self) -> dict[str, int]:
        """All streams that can be searched with."""
        config = self.config
        present = {"global": True, "parts": True, "last": True, "mid": True, "cls": config.cls, "fusion": config.fusion}
        return {stream: sum(self.heads[name].norm.num_features for name in self._names(stream))
                for stream, there in present.items() if there}  # fmt: skip

    @property
    def streams(self) -> Mapping[str, int]:
        return self.chosen

    def search_by(self, streams: Sequence[str]) -> None:
        lengths = self._lengths()
        if not streams or len(set(streams)) < len(streams) or not set(streams) <= lengths.keys():
            raise UserError(f"streams = {', '.join(streams)}: give each at most once, of those that this model has: "
                            f"{', '.join(lengths)}")  # fmt: skip
        self.chosen = {stream: lengths[stream] for stream in streams}

    def _hard(self, shared: Tensor, drops: Tensor | None) -> dict[str, Tensor]:
        """Maps [B, dim, h, w] for the heads of the hard branch, and the class token [B, D] where it is one."""
        last, cls = self.branch.hard(self.backbone, shared, drops)
        whole, parts = self.hard(last)
        maps = {"whole": whole, **dict(zip(self._names("parts"), parts, strict=True))}
        return maps | ({"cls": cls} if self.config.cls else {})

    def _fused(self, maps: Mapping[str, Tensor]) -> Tensor:
        """The map of the fusion, from those of both branches."""
        return self.tree(maps["whole"], [maps[name] for name in self._names("parts")], maps["last"], maps["mid"])

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        own, rest = batch.drops[:, : super().draws], batch.drops[:, super().draws :]
        if not self.draws:
            own = rest = None
        shared = self.branch.shared(self.backbone, batch.images, own)
        levels = self.branch(self.backbone, shared, rest)
        prepared, embedded = self.soft(levels)
        maps = self._hard(shared, own) | embedded._asdict()
        if self.tree is not None:
            maps["fusion"] = self._fused(maps)
        losses: dict[str, Tensor] = {}
        if self.soft.maker is not None:
            attention, features = self.soft.look(levels, prepared)
            config = self.config.attention_diversity
            for level in Levels._fields:
                seen = getattr(features, level)
                maps[f"seen_{level}"] = F.relu(seen.flatten(1))
                loss = attention_diversity(seen, getattr(attention, level), config.beta)
                losses |= {f"diversity_{level}": config.weight * loss} if config.weight else {}
        compared = {name: head.feature(maps[name]) for name, head in self.heads.items()}
        for name, feature in compared.items():
            logits = self.heads[name].classifier(feature, batch.labels)
            found = self.losses[name](logits, feature, batch.labels)
            losses |= {f"{kind}_{name}": loss for kind, loss in found.items()}
        if self.distil is not None:
            loss = self.distil(compared["whole"], compared["last"])
            losses["distillation"] = self.config.distillation.weight * loss
        return losses

    def end_step(self) -> None:
        for losses in self.losses.values():
            losses.end_step()

    def embed(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        shared, maps = self.branch.shared(self.backbone, images, None), {}
        both = "fusion" in self.chosen
        if both or self.chosen.keys() & {"global", "parts", "cls"}:
            maps |= self._hard(shared, None)
        if both or self.chosen.keys() & {"last", "mid"}:
            maps |= self.soft(self.branch(self.backbone, shared, None))[1]._asdict()
        if both:
            maps["fusion"] = self._fused(maps)
        names = [name for stream in self.chosen for name in self._names(stream)]
        return F.normalize(torch.cat([self.heads[name].feature(maps[name]) for name in names], dim=1), dim=1)

    def attention(self, images: Tensor) -> dict[str, Tensor]:
        if self.soft.maker is None:
            return {}
        levels = self.branch(self.backbone, self.branch.shared(self.backbone, images, None), None)
        attention = self.soft.maker(*levels)
        return {f"{level} level": getattr(attention, level) for level in ("last", "mid")}

    def exported(self, section: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {name: value for name, value in self.state_dict().items() if not name.startswith("distil.")}
        return tensors, section | {"distillation": None}


def build(config: Config, parts: Parts) -> MutualBranches:
    """Called by finetune.methods.build."""
    return MutualBranches(config, parts)
