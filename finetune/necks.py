"""Between the backbone's feature and the classifier: BNNeck (Luo et al. 2019, arXiv 1903.07071)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from recipes.load import Section


class NecksConfig(Section):
    """Which side of the neck is searched with."""

    # "before" the BatchNorm is what the published numbers use; cosines "after" it spread wider and suit thresholds
    feature: Literal["before", "after"] = "before"


class BNNeck(nn.Module):
    """BatchNorm whose bias stays 0, then a linear classifier without bias.

    The triplet acts on the feature before, the cross-entropy on the feature after the BatchNorm: the two want different
    geometries. Without any bias the decision boundaries pass through the origin, as cosine search assumes.
    """

    def __init__(self, config: NecksConfig, dim: int, classes: int):
        super().__init__()
        self.feature = config.feature
        self.norm = nn.BatchNorm1d(dim)  # weight 1, bias 0 by default
        self.norm.bias.requires_grad_(False)
        self.classifier = nn.Linear(dim, classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, features: Tensor) -> Tensor:
        """features: [B, D] of the backbone. Returns the logits [B, C]."""
        return self.classifier(self.norm(features))

    def embed(self, features: Tensor) -> Tensor:
        """features: [B, D] of the backbone. Returns the L2-normalised retrieval feature [B, D]; for eval mode."""
        return F.normalize((self.norm(features) if self.feature == "after" else features).float(), dim=1)
