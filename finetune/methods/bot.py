"""BoT, the bag of tricks (Luo et al. 2019, arXiv 1903.07071) on a ViT as in TransReID-SSL and PersonViT, or on a CNN.

Feature -> triplet loss, centre loss; -> BNNeck -> classifier -> cross-entropy. The camera embedding (sie.py) and the
jigsaw patches (jpm.py) of TransReID can be added to a ViT; the published numbers of PersonViT are without them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.id_losses import IdLosses, IdLossesConfig
from finetune.jpm import JigsawPatches, JpmConfig
from finetune.methods.base import ImageBatch, Method, Parts
from finetune.necks import BNNeck, NecksConfig, Pooling
from finetune.sie import CameraEmbedding, SieConfig
from pretrain.backbone import Backbone, Tokens
from recipes.errors import UserError
from recipes.load import Section


class Config(Section):
    """Neck, losses, and what TransReID adds."""

    necks: NecksConfig = NecksConfig()
    id_losses: IdLossesConfig = IdLossesConfig()
    sie: SieConfig | None = None  # {} switches the camera embedding on
    jpm: JpmConfig | None = None  # {} switches the jigsaw patches on


class BagOfTricks(Method):
    """Backbone, BNNeck, identity loss and batch-hard triplet."""

    def __init__(self, config: Config, parts: Parts):
        super().__init__(parts)
        vit = isinstance(parts.backbone, Backbone)
        for name, section in (("sie", config.sie), ("jpm", config.jpm)):
            if section is not None and not vit:
                raise UserError(f"method.{name} needs a Vision Transformer; {parts.backbone.arguments['model_name']} "
                                "is none")  # fmt: skip
        if config.sie and not parts.cameras:
            raise UserError("method.sie learns a vector for each camera, but the training images have no camera labels")
        self.config = config
        self.pooling = Pooling(config.necks, parts.backbone.dim)
        self.neck = BNNeck(config.necks, self.pooling.dim, parts.classes)
        self.losses = IdLosses(config.id_losses, self.pooling.dim, parts.classes)
        self.sie = CameraEmbedding(config.sie, parts.cameras, parts.backbone.dim) if config.sie else None
        self.jpm = JigsawPatches(config.jpm, parts.backbone) if config.jpm else None
        if self.jpm is not None:
            count, dim = config.jpm.slices, parts.backbone.dim
            self.local_necks = nn.ModuleList(BNNeck(config.necks, dim, parts.classes) for _ in range(count))
            without_centres = config.id_losses.model_copy(update={"centre_weight": 0.0})
            self.local_losses = IdLosses(without_centres, dim, parts.classes)
        # of a ViT the last block then runs on CLS alone
        self.patches = "none" if config.necks.pooling in (None, "cls") else "all"

    @property
    def draws(self) -> int:
        return super().draws + (self.jpm.draws if self.jpm is not None else 0)

    @property
    def watched(self) -> list[nn.Module]:
        return [self.backbone] if self.jpm is None else [self.jpm]  # which runs the backbone block by block

    def features(self, images: Tensor, drops: Tensor | None, cameras: Tensor | None) -> list[Tensor]:
        """The feature before the neck, float32 [B, F], and with jigsaw patches one [B, D] for each slice."""
        added = None if self.sie is None else self.sie(cameras, len(images))
        own = None if drops is None else drops[:, : super().draws]
        if self.jpm is None:
            return [self.pooling(self.backbone(images, drops=own, added=added, patches=self.patches))]
        vit, rates = self.backbone.vit, self.backbone.drops[-2:]
        tokens, prefix = self.backbone.before(-1, images, own, added), vit.num_prefix_tokens
        x = vit.norm(self.backbone.through(tokens, vit.blocks[-1:], None if own is None else own[:, -2:], rates))
        local = self.jpm(self.backbone, tokens, None if drops is None else drops[:, super().draws :])
        return [self.pooling(Tokens(x[:, 0], x[:, prefix:], x[:, 1:prefix])), *(part.float() for part in local)]

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        first, *local = self.features(batch.images, batch.drops, batch.cameras)
        losses = self.losses(self.neck(first), first, batch.labels)
        if not local:
            return losses
        share = self.config.jpm.global_weight
        parts = [
            self.local_losses(neck(feature), feature, batch.labels)
            for neck, feature in zip(self.local_necks, local, strict=True)
        ]
        means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        return {name: share * loss + (1 - share) * means[name] if name in means else loss
                for name, loss in losses.items()}  # fmt: skip

    def tokens(self, images: Tensor, cameras: Tensor | None = None) -> Tokens:
        return self.backbone(images, added=None if self.sie is None else self.sie(cameras, len(images)))

    def end_step(self) -> None:
        self.losses.end_step()

    def embed(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        first, *local = self.features(images, None, cameras)
        if not local:
            return self.neck.embed(first)
        # as published: each local feature counts a fraction of the global one
        found = [neck.norm(f) if neck.feature == "after" else f
                 for neck, f in zip([self.neck, *self.local_necks], [first, *local], strict=True)]  # fmt: skip
        return F.normalize(torch.cat([found[0], *(part / len(local) for part in found[1:])], dim=1).float(), dim=1)


def build(config: Config, parts: Parts) -> BagOfTricks:
    """Called by finetune.methods.build."""
    return BagOfTricks(config, parts)
