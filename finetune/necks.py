"""Between backbone and classifier: how tokens become one feature, and BNNeck (Luo et al. 2019, arXiv 1903.07071)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.backbone import Tokens
from recipes.errors import UserError
from recipes.load import Section

GEM_POWER = 3.0  # where GeM starts, and where it stays in "cls_gem"
GROUP = 4  # consecutive patches whose maximum "avg_max" takes


class NecksConfig(Section):
    """What the feature is made from, and which side of the neck is searched with."""

    # null: the backbone's own feature, CLS of a ViT (as "cls") or the pooling of another timm model. Of the patches:
    # "avg", "max", "gem" (for networks that end in a ReLU), "avg_max" (maximum of 4 consecutive ones, then the mean).
    # Of CLS and more: "cls_gem" (sum, as PersonViT's code), "cls_parts" (beside the mean of the part tokens, as PASS)
    pooling: Literal["cls", "avg", "max", "gem", "avg_max", "cls_gem", "cls_parts"] | None = None
    # "before" the BatchNorm is what the published numbers use; cosines "after" it spread wider and suit thresholds
    feature: Literal["before", "after"] = "before"


def generalised_mean(patches: Tensor, power: Tensor | float) -> Tensor:
    """GeM, Radenovic et al. 2018 (arXiv 1711.02512), eq. 3: (mean over places of x^p)^(1/p).

    patches: float32 [B, N, D], meant to be >= 0; what is below 1e-6 counts as 1e-6. Returns [B, D].
    """
    patches = patches.clamp(min=1e-6)
    # relative to the largest, so that a learned p cannot make it underflow; the mean scales with its input, so value
    # and gradient are those of the formula
    largest = patches.detach().amax(dim=1, keepdim=True)
    return (patches / largest).pow(power).mean(dim=1).pow(1 / power) * largest[:, 0]


class GeM(nn.Module):
    """Generalised mean over the places of a map >= 0, with a learned p."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(GEM_POWER))

    def forward(self, maps: Tensor) -> Tensor:
        """[B, D, h, w] -> float32 [B, D]."""
        with torch.autocast(maps.device.type, enabled=False):
            return generalised_mean(maps.float().flatten(2).transpose(1, 2), self.p)


class Pooling(nn.Module):
    """Tokens -> the feature before the neck. `dim`: its length; given is D, that of a token."""

    def __init__(self, config: NecksConfig, dim: int):
        super().__init__()
        self.kind = config.pooling
        self.dim = 2 * dim if self.kind == "cls_parts" else dim
        if self.kind == "gem":
            self.p = nn.Parameter(torch.tensor(GEM_POWER))  # learned, as in fast-reid and AGW (arXiv 2001.04193)
        self.tried = False  # whether "gem" has seen that its input is not signed

    def forward(self, tokens: Tokens) -> Tensor:
        """float32 [B, dim]; for other kinds than null and "cls" `tokens` must hold all patches."""
        cls = tokens.cls.float()
        if self.kind in (None, "cls"):
            return cls
        if self.kind == "cls_parts":
            return torch.cat([cls, self._parts(tokens)], dim=1)
        patches = tokens.patches.float()
        if self.kind == "avg":
            return patches.mean(dim=1)
        if self.kind == "max":
            return patches.amax(dim=1)
        if self.kind == "avg_max":
            return self._groups(patches).amax(dim=2).mean(dim=1)
        if self.kind == "cls_gem":  # tokens are signed, so GeM sees their positive half only: so it was published
            return cls + generalised_mean(patches, GEM_POWER)
        if self.training and not self.tried:
            self._try(patches)
        return generalised_mean(patches, self.p)

    def _parts(self, tokens: Tokens) -> Tensor:
        if tokens.registers is None or not tokens.registers.shape[1]:
            raise UserError("method.necks.pooling = 'cls_parts' needs part tokens beside CLS, and this backbone has "
                            "none; set backbone.registers=3 for a model of PASS, or another pooling")  # fmt: skip
        return tokens.registers.float().mean(dim=1)

    def _groups(self, patches: Tensor) -> Tensor:
        """[B, N, D] -> [B, N / 4, 4, D], four consecutive patches each."""
        if patches.shape[1] % GROUP:
            raise UserError(f"method.necks.pooling = 'avg_max' takes groups of {GROUP} patches, and {patches.shape[1]} "
                            "are no multiple; choose another pooling or input size")  # fmt: skip
        return patches.unflatten(1, (-1, GROUP))

    def _try(self, patches: Tensor) -> None:
        """Refuse signed input, of which GeM would lose half; once, because a GPU has to wait for the answer."""
        if bool((patches < 0).any()):
            raise UserError("method.necks.pooling = 'gem' is for features >= 0, as ResNets have; this backbone's are "
                            "signed, and half of them would be lost; choose avg, max or null")  # fmt: skip
        self.tried = True


class BNNeck(nn.Module):
    """BatchNorm whose bias stays 0, then a linear classifier without bias; both in float32.

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
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(self.norm(features.float()))

    def embed(self, features: Tensor) -> Tensor:
        """features: [B, D] of the backbone. Returns the L2-normalised retrieval feature [B, D]; for eval mode."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            return F.normalize(self.norm(features) if self.feature == "after" else features, dim=1)
