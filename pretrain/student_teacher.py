"""Student and teacher: the two forward passes and the momentum update."""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.backbone import Backbone
from pretrain.batch import Batch
from pretrain.heads import Head, logits
from pretrain.losses import Guessed, Logits
from pretrain.photometric import PhotometricConfig, normalize
from pretrain.stem import batch_norms, train_norms

# masked patches are filled up to a multiple of it with patch 0, whose result is thrown away: libraries build a kernel
# for every new shape and keep it. With any number oneDNN took 10 % more time in bf16, and memory grew without end
PADDED = 64


class Seen(NamedTuple):
    """What the teacher gives for one batch."""

    logits: Logits  # of the 2 global views and their masked patches
    cls_mean: Tensor  # [K] mean CLS logits, for the centre
    patch_mean: Tensor | None  # [K] mean logits over *all* patches, for the centre of patches
    features: Tensor  # [2, B, D] CLS tokens of the global views, for the health signals


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

    def forward(self, batch: Batch) -> Guessed:
        crops, drops, patches = [self._images(batch.global_crops)], [batch.global_drops.flatten(0, 1)], ["none"]
        if len(batch.local_crops):
            crops.append(self._images(batch.local_crops))
            drops.append(batch.local_drops.flatten(0, 1))
            patches.append("none")
        if self.mim:  # the head runs on masked patches only: no other patch enters the loss
            patches[0] = F.pad(batch.masked, (0, -len(batch.masked) % PADDED))
        mask = batch.masks.flatten(0, 1) if self.mim else None
        seen = self.backbone.packed(crops, mask, drops, patches)
        features = seen[0].cls.unflatten(0, (2, batch.size)).float()
        cls, masked = torch.cat([tokens.cls for tokens in seen]), seen[0].patches
        z = self.head.bottleneck(torch.cat([cls, masked]) if self.mim else cls)
        own, of_patches = self.head.prototypes()
        views = logits(z[: len(cls)], own).unflatten(0, (-1, batch.size))
        if not self.mim:
            return Guessed(views, None, None, features)
        return Guessed(views, z[len(cls) :][: len(batch.masked)], of_patches, features)


class Teacher(Network):
    """Sees the clean global views; never gets a gradient."""

    @torch.no_grad()
    def forward(self, batch: Batch) -> Seen:
        wanted = "all" if self.mim else "none"
        (tokens,) = self.backbone.packed([self._images(batch.global_crops)], None, None, [wanted])
        own, of_patches = self.head.prototypes()
        cls = logits(self.head.bottleneck(tokens.cls), own)
        features = tokens.cls.unflatten(0, (2, batch.size)).float()
        views = cls.unflatten(0, (2, batch.size))
        if not self.mim:
            return Seen(Logits(views, None), cls.mean(0), None, features)
        z = self.head.bottleneck(tokens.patches.flatten(0, 1))  # every patch: the centre needs them all
        masked = logits(z[batch.masked], of_patches)
        # the prototypes are linear, so the mean logit of all patches is the logit of their mean: exact, and cheap
        patch_mean = logits(z.mean(0), of_patches)
        return Seen(Logits(views, masked), cls.mean(0), patch_mean, features)


def build_teacher(student: Student, shared: bool | None = None) -> Teacher:
    """A teacher that starts as a copy of the student: without mask embedding, without drop path, without gradients.

    shared: True where its CLS and patch tokens have the same prototypes although the student's do not; it follows the
    student's prototypes of CLS then.
    """
    teacher = Teacher(copy.deepcopy(student.backbone), copy.deepcopy(student.head), student.photometric, student.mim)
    teacher.backbone.mask_embedding = None
    teacher.backbone.drops = [0.0] * len(teacher.backbone.drops)
    if shared:
        teacher.head.last_layer2 = None
    teacher.requires_grad_(False).eval()
    train_norms(teacher)
    return teacher


@torch.no_grad()
def update_teacher(teacher: Teacher, student: Student, momentum: float, finite: Tensor | None = None) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, over the parameters that both have.

    finite: bool [], the teacher stays as it is, bit for bit, where it is False; the host does not wait for a GPU's.
    """
    own = dict(student.named_parameters())
    names = [name for name, _ in teacher.named_parameters()]
    theirs, ours = [teacher.get_parameter(name) for name in names], [own[name] for name in names]
    if finite is None or finite.device.type == "cpu":
        if finite is None or bool(finite):
            torch._foreach_lerp_(theirs, ours, 1 - momentum)
        return
    steps = torch._foreach_sub(ours, theirs)
    torch._foreach_mul_(steps, finite * (1 - momentum))
    torch._foreach_add_(theirs, steps)


def running_statistics(modules: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The buffers that a forward pass changes (batch normalisation, in the ICS stem only), each with its value now."""
    return [(buffer, buffer.clone()) for norm in batch_norms(modules) for buffer in norm.buffers()]


def put_back(statistics: list[tuple[Tensor, Tensor]], finite: Tensor) -> None:
    """Undo what happened to them since `running_statistics` where finite [] is False."""
    for buffer, before in statistics:
        buffer.copy_(torch.where(finite, buffer, before))
