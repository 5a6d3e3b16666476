"""AlignedReID (Zhang et al. 2017, arXiv 1711.08184): a global feature, local features that are aligned by the cheapest
path between two people, and several networks that learn from each other. AlignedReID++ (Luo et al. 2019) by settings.

Feature -> cross-entropy, triplet; stripes of patches -> triplet of the aligned distance. With `mutual` M networks see
the same batch, and each learns from the others' probabilities and distances; the first is the model that comes out.
"""

import copy
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import mutual
from finetune.aligned_distance import pairwise
from finetune.backbones import TimmBackbone
from finetune.id_losses import IdLosses, IdLossesConfig, pairwise_distances
from finetune.local_heads import LocalHead, LocalHeadsConfig, stripes
from finetune.local_triplet import LocalTripletConfig, all_local_distances, local_triplet, mined, prepared
from finetune.methods.base import ImageBatch, Method, Parts
from finetune.mutual import MutualConfig
from finetune.necks import BNNeck, NecksConfig, Pooling
from pretrain.backbone import Backbone, Tokens
from recipes.errors import UserError
from recipes.load import Section

APART = 0x9E3779B1  # between the seeds of the networks' heads: torch looks at the lower 32 bits only


class Config(Section):
    """Heads and losses; the defaults are those of AlignedReID's reproduction, on a ViT with BoT's neck."""

    # "bnneck" of BoT; "plain" as published: a linear classifier with bias on the feature that is searched with
    head: Literal["bnneck", "plain"] = "bnneck"
    necks: NecksConfig = NecksConfig()
    id_losses: IdLossesConfig = IdLossesConfig(margin=0.3)
    normalize: bool = False  # the global feature has length 1 before distances are taken
    local_heads: LocalHeadsConfig = LocalHeadsConfig()
    local_triplet: LocalTripletConfig = LocalTripletConfig()
    mutual: MutualConfig | None = None  # {} switches it on: two networks

    @property
    def local(self) -> bool:
        """Whether local features are trained."""
        return bool(self.local_triplet.weight or (self.mutual and self.mutual.local_weight))

    @property
    def classified(self) -> bool:
        """Whether the classifier is trained."""
        return bool(self.id_losses.id_weight or (self.mutual and self.mutual.class_weight))


class PlainHead(nn.Module):
    """A linear classifier on the feature itself, std 0.001 and bias 0, as AlignedReID has it; float32."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.classifier = nn.Linear(dim, classes)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> logits [B, C]."""
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(features.float())

    def embed(self, features: Tensor) -> Tensor:
        """[B, D] -> the same, of length 1."""
        return F.normalize(features.float(), dim=1)


class Seen(NamedTuple):
    """What one network makes of a batch."""

    feature: Tensor  # [B, F], before the neck
    logits: Tensor  # [B, C]
    parts: Tensor | None  # [B, H, c]; None without a loss on them


class Heads(nn.Module):
    """Everything behind the backbone of one network."""

    def __init__(self, config: Config, dim: int, classes: int):
        super().__init__()
        self.pooling = Pooling(config.necks, dim)
        if config.head == "bnneck":
            self.neck: nn.Module = BNNeck(config.necks, self.pooling.dim, classes)
        else:
            self.neck = PlainHead(self.pooling.dim, classes)
        if not config.classified:  # nothing would give it a gradient, which several processes wait for
            self.neck.requires_grad_(False)
        self.local = LocalHead(config.local_heads, dim) if config.local else None
        self.losses = IdLosses(config.id_losses, self.pooling.dim, classes)

    def forward(self, tokens: Tokens, size: tuple[int, int]) -> Seen:
        """size: height, width of the images."""
        feature = self.pooling(tokens)
        parts = self.local(stripes(tokens.patches, size, self.local.config)) if self.local is not None else None
        return Seen(feature, self.neck(feature), parts)


class Peer(nn.Module):
    """A network that learns beside the first one, and is not exported."""

    def __init__(self, backbone: Backbone | TimmBackbone, heads: Heads):
        super().__init__()
        self.backbone, self.heads = backbone, heads


class AlignedReid(Method):
    """Global and local features of one network, or of M networks in training."""

    def __init__(self, config: Config, parts: Parts):
        super().__init__(parts)
        self.config = config
        if config.local_triplet.weight and config.id_losses.mining == "global":
            raise UserError("method.id_losses.mining = 'global' mines over all processes, and the local triplets are "
                            "those of one; leave it local, or set method.local_triplet.weight=0")  # fmt: skip
        self.heads = Heads(config, parts.backbone.dim, parts.classes)
        self.peers = nn.ModuleList()
        for number in range(1, config.mutual.networks if config.mutual else 1):
            backbone = copy.deepcopy(parts.backbone)
            with torch.random.fork_rng(devices=[]):  # the heads differ, also between runs of another seed
                torch.manual_seed(parts.seed + number * APART)
                self.peers.append(Peer(backbone, Heads(config, parts.backbone.dim, parts.classes)))

    @property
    def draws(self) -> int:
        return super().draws * (1 + len(self.peers))

    def networks(self) -> list[tuple[Backbone | TimmBackbone, Heads]]:
        """Backbone and heads of each, the first one first."""
        return [(self.backbone, self.heads), *((peer.backbone, peer.heads) for peer in self.peers)]

    def optimisers(self) -> list[nn.Module]:
        """One for each network, which no other one's loss reaches."""
        return [nn.ModuleDict({"backbone": backbone, "heads": heads}) for backbone, heads in self.networks()]

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        size, each = tuple(batch.images.shape[2:]), super().draws
        seen = []
        for number, (backbone, heads) in enumerate(self.networks()):
            drops = batch.drops[:, number * each : (number + 1) * each]
            seen.append(heads(backbone(batch.images, drops=drops), size))
        losses: dict[str, Tensor] = {}
        for number, (own, (_, heads)) in enumerate(zip(seen, self.networks(), strict=True)):
            for name, loss in self._own(own, heads, batch.labels).items():
                losses[f"{name}_{number}" if number else name] = loss
        return losses | self._mutual(seen)

    def _compared(self, feature: Tensor) -> Tensor:
        """The global feature as distances are taken of it."""
        return F.normalize(feature.float(), dim=1) if self.config.normalize else feature

    def _own(self, seen: Seen, heads: Heads, labels: Tensor) -> dict[str, Tensor]:
        """The losses of one network by itself."""
        compared, config = self._compared(seen.feature), self.config.local_triplet
        losses = heads.losses(seen.logits, compared, labels)
        if config.weight:
            with torch.no_grad():
                triplets = mined(pairwise_distances(compared), labels)
            parts = prepared(seen.parts, config)
            losses["local"] = config.weight * local_triplet(parts, labels, triplets, config)
        return losses

    def _mutual(self, seen: list[Seen]) -> dict[str, Tensor]:
        """What the networks learn from each other; the sum over them, because each has weights of its own."""
        config = self.config.mutual
        if config is None:
            return {}
        losses = {}
        if config.class_weight:
            losses["mutual_class"] = config.class_weight * sum(mutual.classification([one.logits for one in seen]))
        if config.metric_weight:
            distances = [pairwise_distances(self._compared(one.feature)) for one in seen]
            losses["mutual_metric"] = config.metric_weight * sum(mutual.metric(distances))
        if config.local_weight:
            local = self.config.local_triplet
            distances = [all_local_distances(prepared(one.parts, local), local) for one in seen]
            losses["mutual_local"] = config.local_weight * sum(mutual.metric(distances))
        return losses

    def end_step(self) -> None:
        for _, heads in self.networks():
            heads.losses.end_step()

    def embed(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        patches = "none" if self.config.necks.pooling in (None, "cls") else "all"
        return self.heads.neck.embed(self.heads.pooling(self.backbone(images, patches=patches)))

    @property
    def local_shape(self) -> tuple[int, int] | None:
        if self.heads.local is None:
            return None
        config = self.config.local_heads
        rows = config.stripes or self.backbone.grid[0]
        return rows, config.dim if config.search == "head" else self.backbone.dim

    def embed_local(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        rows = stripes(self.backbone(images).patches, tuple(images.shape[2:]), self.config.local_heads)
        return self.heads.local.search(rows)

    def local_distance(self, query: Tensor, gallery: Tensor, aligned: bool = True) -> Tensor:
        return pairwise(query, gallery, aligned)

    def exported(self, section: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {name: value for name, value in self.state_dict().items() if not name.startswith("peers.")}
        return tensors, section | {"mutual": None}


def build(config: Config, parts: Parts) -> AlignedReid:
    """Called by finetune.methods.build."""
    return AlignedReid(config, parts)
