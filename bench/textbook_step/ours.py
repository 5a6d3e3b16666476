"""Our step for the benches: the parts and the loop body of pretrain/run.py, and batches to feed both ways.

Left out of the loop are the journal, which works on every 10th or 50th step, and the checkpoints.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from pretrain import optim
from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.batch import Batch, Views, collate
from pretrain.centering import Centering, CenteringConfig, teacher_targets
from pretrain.heads import Head, HeadsConfig
from pretrain.losses import LossesConfig, named_losses
from pretrain.masks import MasksConfig, draw_mask
from pretrain.optim import OptimConfig
from pretrain.photometric import PhotometricConfig, normalize
from pretrain.student_teacher import Student, build_teacher, put_back, running_statistics, update_teacher
from shards.seeds import generator
from textbook_step import Images, Settings, Shape


class Crops(NamedTuple):
    """What a batch looks like."""

    size: int  # B
    local_count: int
    global_size: tuple[int, int] = (256, 128)  # height, width, pixels
    local_size: tuple[int, int] = (96, 64)


def build_student(
    backbone: BackboneConfig, head: HeadsConfig, size: tuple[int, int], seed: int = 0, compiled: bool = False
) -> Student:
    """The same weights at every call. size: height, width of the global crops."""
    torch.manual_seed(seed)
    vit = Backbone(timm_arguments(backbone, size), masked=True, drop_path=backbone.drop_path, compiled=compiled)
    vit.initialise(backbone.init)
    return Student(vit, Head(vit.dim, head), PhotometricConfig(), True).train()


def shape_of(student: Student, teacher_shared: bool = False) -> Shape:
    """The sizes of our networks, for those of the textbook."""
    vit, head = student.backbone.vit, student.head
    linear = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    return Shape(
        dim=vit.embed_dim,
        depth=len(vit.blocks),
        heads=vit.blocks[0].attn.num_heads,
        hidden=vit.blocks[0].mlp.fc1.out_features,
        patch=vit.patch_embed.patch_size[0],
        grid=student.backbone.grid,
        head_dims=(linear[0].in_features, *(layer.out_features for layer in linear)),
        prototypes=len(head.last_layer.weight_v),
        shared=head.last_layer2 is None,
        teacher_shared=head.last_layer2 is None or teacher_shared,
        fixed_length=not isinstance(head.last_layer.weight_g, nn.Parameter),
    )


def draw_batch(crops: Crops, grid: tuple[int, int], places: int, number: int = 0) -> Batch:
    """Noise in the shapes that the loader gives, on the host; masks as a recipe draws them by default.

    grid: patches of a global crop. places: of drop path. number: another one gives another batch.
    """
    samples = []
    for row in range(crops.size):
        rng = generator(0, "bench step", number, row)
        count = 2 + crops.local_count
        drops = rng.random((count, places), np.float32)
        samples.append(
            Views(
                row=row,
                replaced=-1,
                global_crops=rng.integers(0, 256, (2, *crops.global_size, 3), dtype=np.uint8),
                local_crops=rng.integers(0, 256, (crops.local_count, *crops.local_size, 3), dtype=np.uint8),
                boxes=np.zeros((count, 5), np.int64),
                masks=np.stack([draw_mask(rng, grid, MasksConfig()) for _ in range(2)]),
                global_drops=drops[:2],
                local_drops=drops[2:],
            )
        )
    return collate(samples)


def images_of(batch: Batch) -> Images:
    """The same batch as the textbook takes it."""
    colour = PhotometricConfig()
    crops = [
        normalize(crop, colour.mean, colour.std).contiguous()
        for crops in (batch.global_crops, batch.local_crops)
        for crop in crops
    ]
    return Images(crops, list(batch.masks), [*batch.global_drops, *batch.local_drops])


class OurStep:
    """Student, teacher, centres, optimiser. `step(batch)` is one step of training and returns the losses."""

    def __init__(
        self,
        student: Student,
        settings: Settings = Settings(),  # noqa: B008
        bf16: bool = False,
        device: torch.device | str = "cpu",
        teacher_shared: bool = False,
    ):
        self.settings, self.bf16, self.device = settings, bf16, torch.device(device)
        self.student = student.to(device)
        self.teacher = build_teacher(student, teacher_shared)
        count, config = len(student.head.last_layer.weight_v), CenteringConfig(momentum=settings.centre_momentum)
        self.centres = nn.ModuleDict({kind: Centering(count, config) for kind in ("cls", "patches")}).to(device)
        self.config = OptimConfig(eps=settings.eps, clip=settings.clip)
        self.optimizer = optim.build_optimizer(student, self.config)
        self.terms = LossesConfig(
            cls_weight=settings.cls_weight,
            patch_weight=settings.patch_weight,
            student_temperature=settings.student_temperature,
        )

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """One step; the named losses."""
        losses = self.gradients(batch)
        self.update()
        return losses

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Both forwards, the losses, backward."""
        optim.set_values(self.optimizer, self.settings.lr, self.settings.weight_decay)
        self.statistics = running_statistics(nn.ModuleList([self.student, self.teacher]))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            seen, guessed = self.teacher(batch), self.student(batch)
        targets = teacher_targets(self.centres, seen, self.settings.teacher_temperature)
        losses = named_losses(guessed, targets, batch.mask_weights, self.terms)
        losses["loss"].backward()
        self.told = torch.stack([value.detach() for value in losses.values()])
        return {name: value.detach() for name, value in losses.items()}

    def update(self) -> None:
        """Clip, optimiser, momentum update, centres."""
        with record_function("clip"):
            norm = optim.clip_gradients(self.student, self.config)
        finite = torch.isfinite(self.told).all() & torch.isfinite(norm)
        optim.step(self.optimizer, finite)
        with record_function("EMA"):
            update_teacher(self.teacher, self.student, self.settings.momentum, finite)
        for centre in self.centres.values():
            centre.end_step(finite)
        put_back(self.statistics, finite)
