"""BoT, the bag of tricks (Luo et al. 2019, arXiv 1903.07071) on a ViT as in TransReID-SSL and PersonViT.

CLS token -> triplet loss; -> BNNeck -> classifier -> cross-entropy.
"""

from torch import Tensor

from finetune.id_losses import IdLosses, IdLossesConfig
from finetune.methods.base import ImageBatch, Method, Parts
from finetune.necks import BNNeck, NecksConfig
from recipes.load import Section


class Config(Section):
    """Neck and losses."""

    necks: NecksConfig = NecksConfig()
    id_losses: IdLossesConfig = IdLossesConfig()


class BagOfTricks(Method):
    """Backbone, BNNeck, identity loss and batch-hard triplet."""

    def __init__(self, config: Config, parts: Parts):
        super().__init__(parts)
        self.neck = BNNeck(config.necks, parts.backbone.dim, parts.classes)
        self.losses = IdLosses(config.id_losses)

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        features = self.backbone(batch.images, drops=batch.drops).cls.float()
        return self.losses(self.neck(features), features, batch.labels)

    def embed(self, images: Tensor) -> Tensor:
        return self.neck.embed(self.backbone(images).cls.float())


def build(config: Config, parts: Parts) -> BagOfTricks:
    """Called by finetune.methods.build."""
    return BagOfTricks(config, parts)
