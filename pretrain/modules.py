"""The modules that hold the whole state of the method: student, teacher, centres, skipped steps, spikes."""

from typing import Protocol

import torch
from torch import nn

from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.centering import Centering, CenteringConfig
from pretrain.heads import Head, HeadsConfig
from pretrain.journal import Skipped
from pretrain.losses import LossesConfig
from pretrain.photometric import PhotometricConfig
from pretrain.spikes import Spikes
from pretrain.stem import synchronised
from pretrain.student_teacher import Student, build_teacher
from pretrain.views import ViewsConfig


class Recipe(Protocol):
    """The sections that describe the networks."""

    seed: int
    views: ViewsConfig
    photometric: PhotometricConfig
    backbone: BackboneConfig
    heads: HeadsConfig
    centering: CenteringConfig
    losses: LossesConfig


def build_modules(config: Recipe, device: torch.device, world: int) -> dict[str, nn.Module]:
    """The whole state of the method, by name; the fresh weights are the same on all processes."""
    torch.manual_seed(config.seed)
    mim = config.losses.patch_weight > 0
    timm_arguments(config.backbone, config.views.local_size)  # refuses a size that the patches do not tile
    vit = timm_arguments(config.backbone, config.views.global_size)
    backbone = Backbone(vit, masked=mim, drop_path=config.backbone.drop_path, compiled=config.backbone.compile)
    backbone.initialise(config.backbone.init)
    student = Student(backbone, Head(backbone.dim, config.heads, patches=mim), config.photometric, mim).to(device)
    student = synchronised(student, world, device.type)
    kinds = ("cls", "patches") if mim else ("cls",)
    centres = nn.ModuleDict({kind: Centering(config.heads.out_dim, config.centering) for kind in kinds}).to(device)
    teacher = build_teacher(student, config.heads.teacher_shared)
    counts = {"skipped": Skipped().to(device), "spikes": Spikes().to(device)}
    return {"student": student, "teacher": teacher, "centres": centres, **counts}
