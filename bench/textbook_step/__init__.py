"""The step of the method as published code has it: what ours is compared with, in value and in time.

Written anew after the equations of DINO (arXiv 2104.14294), iBOT (arXiv 2111.07832) and PersonViT (arXiv 2408.05398),
and built as the programs of the first two are:

* one forward for each size of crop, the head and the prototypes on every token, of the local crops too;
* attention as softmax(q k^T) v, position embeddings resampled at every forward of local crops;
* drop path multiplies a branch by 0 or 1 / (1 - rate);
* a loop over pairs of views for the loss, which is taken of all patches and then masked;
* centres over all CLS logits and all patch logits of the teacher;
* a loop over parameters for clipping and one for the momentum update; torch's AdamW as it comes, in two groups;
* the loss is read at every step, to see that it is finite.

What differs from them: the draws of drop path come with the batch, so that both ways compute the same function, and the
precision is bf16 where theirs is fp16 with a scaler. One process: their all-reduces are left out. Nothing here imports
pretrain/.

Precision: "float32"; "published": autocast to bf16 around everything, the losses in float32; "same": as ours, autocast
for the backbone and the MLP of the head, float32 from the L2 norm on.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from textbook_step.network import Network, Precision, Shape

__all__ = ["Images", "Network", "Precision", "Settings", "Shape", "TextbookStep"]


@dataclass(frozen=True)
class Settings:
    """The values of one step, for either way."""

    lr: float = 1e-5
    weight_decay: float = 0.04
    eps: float = 1e-8  # of AdamW
    clip: float = 3.0  # longest gradient of a tensor
    momentum: float = 0.996  # of the teacher
    centre_momentum: float = 0.9
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    cls_weight: float = 1.0  # lambda 1
    patch_weight: float = 1.0  # lambda 2


class Images(NamedTuple):
    """A batch as published loaders give it: one tensor for each crop, the two global ones first. B images, S draws."""

    crops: list[Tensor]  # float32 [B, 3, H, W], normalised
    masks: list[Tensor]  # bool [B, rows, columns] of the global crops, True = masked
    draws: list[Tensor]  # float32 [B, S] uniform in [0, 1): for each residual branch of each crop

    def to(self, device: torch.device) -> "Images":
        """The same on a device, tensor by tensor; asynchronous from pinned memory."""
        return Images(*([part.to(device, non_blocking=True) for part in parts] for parts in self))


class TextbookStep:
    """Student, teacher, centres, optimiser. `step(images)` is one step of training and returns the losses."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        shape: Shape,
        drop_path_rate: float,
        settings: Settings = Settings(),
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
    ):
        """weights: of the student; the teacher starts with the same ones, as far as it has them."""
        self.settings, self.precision, self.device = settings, precision, torch.device(device)
        self.student = Network(shape, masked=True, drop_path_rate=drop_path_rate, precision=precision).to(device)
        self.student.load_state_dict(weights)
        self.teacher = Network(shape._replace(shared=shape.teacher_shared), precision=precision).to(device)
        self.teacher.load_state_dict({name: weights[name] for name in self.teacher.state_dict()})
        self.teacher.requires_grad_(False)
        self.centre = torch.zeros(1, shape.prototypes, device=device)
        self.patch_centre = torch.zeros(1, 1, shape.prototypes, device=device)
        decayed, others = [], []
        for name, parameter in self.student.named_parameters():
            (others if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, eps=settings.eps)

    def __call__(self, images: Images) -> dict[str, Tensor]:
        """One step; the named losses."""
        losses = self.gradients(images)
        self.update()
        return losses

    def gradients(self, images: Images) -> dict[str, Tensor]:
        """Both forwards, the losses, the centres, backward."""
        with self._autocast():
            teacher = self.teacher(images.crops[:2], None, None)
            student = self.student(images.crops[:2], images.masks, images.draws[:2])
            local = self.student(images.crops[2:], None, images.draws[2:])[0] if len(images.crops) > 2 else None
            losses = self.losses(student, local, teacher, images.masks)
        if not math.isfinite(losses["loss"].item()):
            raise FloatingPointError(f"the loss is {losses['loss'].item()}")
        self.optimizer.zero_grad()
        losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()}

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "float32")

    def losses(
        self,
        student: tuple[Tensor, Tensor],
        local: Tensor | None,
        teacher: tuple[Tensor, Tensor],
        masks: list[Tensor],
    ) -> dict[str, Tensor]:
        """PersonViT's two terms from logits: CLS [V B, K] and patches [2 B, N, K]; then the centres move.

        Between the same view of both networks the patches are compared, between different views the CLS tokens.
        """
        now = self.settings
        student_cls, student_patches = (logits.float() / now.student_temperature for logits in student)
        if local is not None:
            student_cls = torch.cat([student_cls, local.float() / now.student_temperature])
        teacher_cls, teacher_patches = (logits.float() for logits in teacher)
        views = student_cls.chunk(len(student_cls) // len(masks[0]))
        patch_views = student_patches.chunk(2)
        targets = F.softmax((teacher_cls - self.centre) / now.teacher_temperature, dim=-1).chunk(2)
        patch_targets = F.softmax((teacher_patches - self.patch_centre) / now.teacher_temperature, dim=-1).chunk(2)
        cls_sum, cls_terms, patch_sum, patch_terms = 0.0, 0, 0.0, 0
        for q in range(2):
            for v in range(len(views)):
                if v == q:
                    each = torch.sum(-patch_targets[q] * F.log_softmax(patch_views[v], dim=-1), dim=-1)
                    mask = masks[v].flatten(1).float()
                    patch_sum = patch_sum + (torch.sum(each * mask, dim=-1) / mask.sum(dim=-1).clamp(min=1.0)).mean()
                    patch_terms += 1
                else:
                    each = torch.sum(-targets[q] * F.log_softmax(views[v], dim=-1), dim=-1)
                    cls_sum = cls_sum + each.mean()
                    cls_terms += 1
        cls, patch = cls_sum / cls_terms, patch_sum / patch_terms
        self.move_centres(teacher_cls, teacher_patches)
        return {"loss": now.cls_weight * cls + now.patch_weight * patch, "loss_cls": cls, "loss_patch": patch}

    @torch.no_grad()
    def move_centres(self, cls: Tensor, patches: Tensor) -> None:
        """Running means of the teacher's logits, CLS [2 B, K] and patches [2 B, N, K]."""
        m = self.settings.centre_momentum
        self.centre = self.centre * m + cls.mean(dim=0, keepdim=True) * (1 - m)
        self.patch_centre = self.patch_centre * m + patches.mean(dim=(0, 1), keepdim=True) * (1 - m)

    @torch.no_grad()
    def update(self) -> None:
        """Clip, optimiser, momentum update."""
        with record_function("clip"):
            for parameter in self.student.parameters():
                if parameter.grad is not None:
                    scale = self.settings.clip / (parameter.grad.norm(2) + 1e-6)
                    if scale < 1:
                        parameter.grad.mul_(scale)
        self.optimizer.step()
        with record_function("EMA"):
            own, m = dict(self.student.named_parameters()), self.settings.momentum
            for name, parameter in self.teacher.named_parameters():
                parameter.mul_(m).add_((1 - m) * own[name].detach())
