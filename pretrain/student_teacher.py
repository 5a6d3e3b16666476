"""Student and teacher: the two forward passes and the momentum update."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.backbone import Backbone
from pretrain.batch import Batch
from pretrain.heads import Head
from pretrain.losses import Logits
from pretrain.photometric import PhotometricConfig, normalize


class Seen(NamedTuple):
    """What the teacher gives for one batch."""

    logits: Logits  # of the 2 global views and their masked patches
    cls_mean: Tensor  # [K] mean CLS logits, for the centre
    patch_mean: Tensor | None  # [K] mean logits over *all* patches, for the centre of patches
    features: Tensor  # [B, D] CLS tokens of the first global view, for the health signals


class Network(nn.Module):
    """Backbone and head."""

    def __init__(self, backbone: Backbone, head: Head, photometric_config: PhotometricConfig, mim: bool):
        super().__init__()
        self.backbone, self.head, self.photometric, self.mim = backbone, head, photometric_config, mim

    def _images(self, crops: Tensor) -> Tensor:
        """[V, B, H, W, 3] uint8 -> [V * B, 3, H, W] float32, normalised."""
        return normalize(crops.flatten(0, 1), self.photometric.mean, self.photometric.std)


class Student(Network):
    """Sees masked global views and clean local views."""

    def forward(self, batch: Batch) -> Logits:
        images = self._images(batch.global_crops)
        mask = batch.masks.flatten(0, 1) if self.mim else None
        wide = self.backbone(images, mask, batch.global_drops.flatten(0, 1))
        tokens = [wide.cls]
        if len(batch.local_crops):
            images = self._images(batch.local_crops)
            tokens.append(self.backbone(images, None, batch.local_drops.flatten(0, 1)).cls)
        views = sum(len(t) for t in tokens)
        if self.mim:  # the head runs on masked patches only: no other patch enters the loss
            tokens.append(wide.patches.flatten(0, 1)[batch.masked])
        z = self.head.bottleneck(torch.cat(tokens))
        cls = self.head.cls_logits(z[:views]).unflatten(0, (-1, batch.size))
        return Logits(cls, self.head.patch_logits(z[views:]) if self.mim else None)


class Teacher(Network):
    """Sees the clean global views; never gets a gradient."""

    @torch.no_grad()
    def forward(self, batch: Batch) -> Seen:
        tokens = self.backbone(self._images(batch.global_crops))
        cls = self.head.cls_logits(self.head.bottleneck(tokens.cls))
        features = tokens.cls[: batch.size].float()
        views = cls.unflatten(0, (2, batch.size))
        if not self.mim:
            return Seen(Logits(views, None), cls.mean(0), None, features)
        z = self.head.bottleneck(tokens.patches.flatten(0, 1))  # every patch: the centre needs them all
        masked = self.head.patch_logits(z[batch.masked])
        # the prototypes are linear, so the mean logit of all patches is the logit of their mean: exact, and cheap
        patch_mean = self.head.patch_logits(z.mean(0))
        return Seen(Logits(views, masked), cls.mean(0), patch_mean, features)


def build_teacher(student: Student) -> Teacher:
    """A teacher that starts as a copy of the student: without mask embedding, without drop path, without gradients."""
    teacher = Teacher(copy.deepcopy(student.backbone), copy.deepcopy(student.head), student.photometric, student.mim)
    teacher.backbone.mask_embedding = None
    for drop in teacher.backbone.drops:
        drop.rate = 0.0
    return teacher.requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: Teacher, student: Student, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over the parameters that both have."""
    own = dict(student.named_parameters())
    pairs = [(parameter, own[name]) for name, parameter in teacher.named_parameters()]
    torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 1 - momentum)
