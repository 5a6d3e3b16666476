"""The two terms of the loss of PersonViT (arXiv 2408.05398).

DINO: arXiv 2104.14294, eq. 1 to 3. Masked patches as in iBOT: arXiv 2111.07832, eq. 2 and 3.
"""

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from recipes.load import Section


class LossesConfig(Section):
    """Weights and the student's temperature."""

    cls_weight: float = Field(1.0, ge=0)  # lambda 1, of the DINO term
    patch_weight: float = Field(1.0, ge=0)  # lambda 2, of the MIM term; 0 = DINO only, without masks
    student_temperature: float = Field(0.1, gt=0)


class Logits(NamedTuple):
    """What the two terms compare; K = prototypes, M = masked patches."""

    cls: Tensor  # [V, B, K]; of the student all views, the 2 global ones first; of the teacher the global ones
    patches: Tensor | None  # [M, K]; None without the MIM term


def named_losses(student: Logits, targets: Logits, mask_weights: Tensor, config: LossesConfig) -> dict[str, Tensor]:
    """`loss_cls`, `loss_patch` and their weighted sum `loss`. targets: probabilities; mask_weights: [M]."""
    cls = dino_loss(student.cls, targets.cls, config.student_temperature)
    patch = torch.zeros_like(cls)
    if student.patches is not None and targets.patches is not None:
        views = targets.cls.shape[0] * targets.cls.shape[1]
        patch = mim_loss(student.patches, targets.patches, mask_weights, views, config.student_temperature)
    return {"loss": config.cls_weight * cls + config.patch_weight * patch, "loss_cls": cls, "loss_patch": patch}


def dino_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """CLS term: each teacher view against every student view but the same one.

    student: logits [V, B, K], the 2 global views first. targets: probabilities [2, B, K].
    Returns 1 / (2 (V - 1)) * sum over q, v != q of mean_B H(targets_q, softmax(student_v / temperature)).
    """
    log_p = torch.log_softmax(student.float() / temperature, dim=-1)
    others = log_p.sum(0) - log_p[: len(targets)]  # [2, B, K]: sum over v != q
    pairs = len(targets) * (len(student) - 1)
    return -(targets * others).sum() / (pairs * student.shape[1])


def mim_loss(student: Tensor, targets: Tensor, weights: Tensor, views: int, temperature: float) -> Tensor:
    """MIM term: masked patches against the teacher's same patch, normalised by the mask count of each view.

    student: logits [M, K]. targets: probabilities [M, K]. weights: [M], 1 / masked patches of the view. views: 2 B;
    those without a mask stay in the mean and add nothing. Returns the mean over the views of the mean of H over their
    masked patches.
    """
    log_p = torch.log_softmax(student.float() / temperature, dim=-1)
    return -((targets * log_p).sum(-1) * weights).sum() / views
