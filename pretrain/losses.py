"""The terms of the loss of PersonViT (arXiv 2408.05398), and KoLeo as an option.

DINO: arXiv 2104.14294, eq. 1 to 3. Masked patches as in iBOT: arXiv 2111.07832, eq. 2 and 3.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from recipes.load import Section


class LossesConfig(Section):
    """Weights and the student's temperature."""

    cls_weight: float = Field(1.0, ge=0)  # lambda 1, of the DINO term
    patch_weight: float = Field(1.0, ge=0)  # lambda 2, of the MIM term; 0 = DINO only, without masks
    koleo_weight: float = Field(0.0, ge=0)  # of the KoLeo term; DINOv2 takes 0.1. It sees one process's micro-batch
    student_temperature: float = Field(0.1, gt=0)


class Logits(NamedTuple):
    """Logits or probabilities of both kinds of token; K = prototypes, M = masked patches."""

    cls: Tensor  # [2, B, K], of the global views
    patches: Tensor | None  # [M, K]; None without the MIM term


class Guessed(NamedTuple):
    """What the student gives for one batch."""

    cls: Tensor  # logits [V, B, K] of all views, the 2 global ones first
    patches: Tensor | None  # unit vectors [M, bottleneck] of the masked patches; their logits are made inside the loss
    prototypes: Tensor | None  # [K, bottleneck], of the patches
    features: Tensor  # [2, B, D] CLS tokens of the global views, for KoLeo


def named_losses(student: Guessed, targets: Logits, mask_weights: Tensor, config: LossesConfig) -> dict[str, Tensor]:
    """`loss_cls`, `loss_patch`, with a weight `loss_koleo`, and their weighted sum `loss`.

    targets: probabilities. mask_weights: [M].
    """
    cls = dino_loss(student.cls, targets.cls, config.student_temperature)
    terms = {"loss_cls": cls, "loss_patch": torch.zeros_like(cls)}
    if student.patches is not None and targets.patches is not None:
        views = targets.cls.shape[0] * targets.cls.shape[1]
        patches = (student.patches, student.prototypes)
        terms["loss_patch"] = mim_loss(*patches, targets.patches, mask_weights, views, config.student_temperature)
    loss = config.cls_weight * cls + config.patch_weight * terms["loss_patch"]
    if config.koleo_weight:
        terms["loss_koleo"] = koleo_loss(student.features)
        loss = loss + config.koleo_weight * terms["loss_koleo"]
    return {"loss": loss, **terms}


def dino_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """CLS term: each teacher view against every student view but the same one.

    student: logits [V, B, K], the 2 global views first. targets: probabilities [2, B, K].
    Returns 1 / (2 (V - 1)) * sum over q, v != q of mean_B H(targets_q, softmax(student_v / temperature)).
    """
    log_p = torch.log_softmax(student.float() / temperature, dim=-1)
    others = log_p.sum(0) - log_p[: len(targets)]  # [2, B, K]: sum over v != q
    pairs = len(targets) * (len(student) - 1)
    return -(targets * others).sum() / (pairs * student.shape[1])


def mim_loss(
    student: Tensor, prototypes: Tensor, targets: Tensor, weights: Tensor, views: int, temperature: float
) -> Tensor:
    """MIM term: masked patches against the teacher's same patch, normalised by the mask count of each view.

    student: unit vectors [M, C]. prototypes: [K, C]. targets: probabilities [M, K]. weights: [M], 1 / masked patches of
    the view. views: 2 B; those without a mask stay in the mean and add nothing. Returns the mean over the views of the
    mean over their masked patches of H(targets, softmax(student @ prototypes^T / temperature)).
    """
    return PrototypeCrossEntropy.apply(student.float(), prototypes, targets, weights / views, temperature)


class PrototypeCrossEntropy(torch.autograd.Function):
    """sum_i w_i H(t_i, softmax(z_i W^T / temperature)) and its gradients, a few rows at a time.

    Only a part of the [M, K] logits is ever there: the gradients with respect to z and W, which are small, are made in
    the forward pass, while the part is at hand. With p = softmax: dH/dlogits = (p - t) / temperature, as t sums to 1.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, prototypes: Tensor, targets: Tensor, weights: Tensor, temperature: float
    ) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            loss, dz, dw = z.new_zeros(()), torch.empty_like(z), torch.zeros_like(prototypes)
            rows = max(1, PART // prototypes.shape[0])
            for start in range(0, len(z), rows):
                part = slice(start, start + rows)
                t, w = targets[part], weights[part, None]
                logits = (z[part] @ prototypes.T).mul_(1 / temperature)
                log_sum = logits.logsumexp(1, keepdim=True)
                loss += (w * (log_sum - torch.linalg.vecdot(t, logits)[:, None])).sum()
                slope = logits.sub_(log_sum).exp_().sub_(t).mul_(w / temperature)
                torch.mm(slope, prototypes, out=dz[part])
                dw.addmm_(slope.T, z[part])
        ctx.save_for_backward(dz, dw)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, slope: Tensor) -> tuple[Tensor | None, ...]:
        dz, dw = ctx.saved_tensors
        return dz * slope, dw * slope, None, None, None


# logits that are there at one time; 8 MB of float32, which stay in the cache of a CPU
PART = 2**21


def koleo_loss(features: Tensor) -> Tensor:
    """Kozachenko-Leonenko term: spreads the features of a batch (arXiv 1806.03198, eq. 2; DINOv2, arXiv 2304.07193).

    features: [2, B, D], of each global view by itself; normalised here. Returns the sum over the views of
    -mean_i log(distance of i to its nearest neighbour in the same view). 0 for a batch of one, which has no neighbours.
    """
    unit = F.normalize(features.float(), dim=-1)
    if unit.shape[1] == 1:
        return unit.sum() * 0.0
    with torch.no_grad():
        cosine = unit @ unit.transpose(1, 2)
        cosine.diagonal(dim1=1, dim2=2).fill_(-2)
        nearest = cosine.argmax(-1, keepdim=True)  # [2, B, 1]
    other = unit.gather(1, nearest.expand_as(unit))
    distance = F.pairwise_distance(unit, other, eps=1e-8)
    return -(distance + 1e-8).log().mean(1).sum()
