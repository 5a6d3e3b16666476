"""One training step of the method: ours against a plain one as the papers' code would have it, in float32.

    python bench/step.py

ViT-S/16, batch 8, 2 crops of 256 x 128 and 6 of 96 x 64, K = 8,192. Both start from the same weights and see the same
images, and their losses must agree. The plain step, written anew here after the equations of DINO and iBOT: one
forward for each size of crop, the head and the prototypes on every patch, a loop over pairs of views, loops over
parameters for clipping and the momentum update, torch's default AdamW. Ours includes photometric.normalize; the plain
step gets images that are normalised already.
"""

import argparse

import numpy as np
import pairs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain import optim
from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.batch import Batch, Views, collate
from pretrain.centering import Centering, CenteringConfig, teacher_targets
from pretrain.heads import Head, HeadsConfig
from pretrain.losses import LossesConfig, named_losses
from pretrain.masks import MasksConfig, draw_mask
from pretrain.optim import OptimConfig
from pretrain.photometric import PhotometricConfig, normalize
from pretrain.student_teacher import Student, Teacher, build_teacher, update_teacher
from shards.seeds import generator

GLOBAL, LOCAL, LOCALS = (256, 128), (96, 64), 6
LR, DECAY, MOMENTUM, WARM, COLD, CLIP = 1e-5, 0.04, 0.996, 0.1, 0.04, 3.0
CENTRE_MOMENTUM = 0.9


def draw_batch(size: int, grid: tuple[int, int], places: int) -> Batch:
    """Noise in the shapes that the loader gives; every global view has a mask."""
    samples = []
    for row in range(size):
        rng = generator(0, "bench step", row)
        masks = [draw_mask(rng, grid, MasksConfig(ratios=(0.3,), spreads=(0.2,))) for _ in range(2)]
        samples.append(
            Views(
                row=row,
                replaced=-1,
                global_crops=rng.integers(0, 256, (2, *GLOBAL, 3), dtype=np.uint8),
                local_crops=rng.integers(0, 256, (LOCALS, *LOCAL, 3), dtype=np.uint8),
                boxes=np.zeros((2 + LOCALS, 5), np.int64),
                masks=np.stack(masks),
                global_drops=rng.random((2, places), np.float32),
                local_drops=rng.random((LOCALS, places), np.float32),
            )
        )
    return collate(samples)


class Ours:
    """The parts of pretrain/run.py and its loop body."""

    def __init__(self, student: Student, batch: Batch, out_dim: int):
        self.student, self.teacher, self.batch = student, build_teacher(student), batch
        self.centres = nn.ModuleDict({kind: Centering(out_dim, CenteringConfig()) for kind in ("cls", "patches")})
        self.optimizer = optim.build_optimizer(student, OptimConfig())
        self.losses: list[float] = []

    def __call__(self) -> None:
        optim.set_values(self.optimizer, LR, DECAY)
        seen, guessed = self.teacher(self.batch), self.student(self.batch)
        targets = teacher_targets(self.centres, seen, COLD)
        loss = named_losses(guessed, targets, self.batch.mask_weights, LossesConfig())["loss"]
        loss.backward()
        optim.clip_gradients(self.student, OptimConfig(clip=CLIP))
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_teacher(self.teacher, self.student, MOMENTUM)
        for centre in self.centres.values():
            centre.end_step()
        self.losses.append(loss.item())


class Plain:
    """The same step without any of our thoughts about speed."""

    def __init__(self, student: Student, batch: Batch, out_dim: int):
        self.student, self.teacher = student, build_teacher(student)
        colour = PhotometricConfig()
        crops = (batch.global_crops, batch.local_crops)
        self.wide, self.narrow = (normalize(each.flatten(0, 1), colour.mean, colour.std).contiguous() for each in crops)
        self.masks = batch.masks.flatten(0, 1)
        self.centre, self.patch_centre = torch.zeros(1, out_dim), torch.zeros(1, 1, out_dim)
        named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        groups = [{"params": [p for n, p in named if optim.decayed(n, p)]}]
        groups.append({"params": [p for n, p in named if not optim.decayed(n, p)], "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY)
        self.losses: list[float] = []

    def logits(self, network: Student | Teacher, images: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """CLS [B, K] and patch logits [B, N, K]: the head sees all tokens."""
        tokens = network.backbone(images, masks)
        every = torch.cat([tokens.cls[:, None], tokens.patches], dim=1)
        every = network.head.last_layer(F.normalize(network.head.mlp(every), dim=-1))
        return every[:, 0], every[:, 1:]

    def loss(self, student: tuple[Tensor, Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
        """Over all pairs of a teacher view and a student view: patches where they are the same view, else CLS."""
        cls, patches, small = student
        views = [view / WARM for view in (*cls.chunk(2), *small.chunk(LOCALS))]
        patch_views = [view / WARM for view in patches.chunk(2)]
        targets = F.softmax((teacher[0] - self.centre) / COLD, dim=-1).chunk(2)
        patch_targets = F.softmax((teacher[1] - self.patch_centre) / COLD, dim=-1).chunk(2)
        cls_sum, cls_terms, patch_sum = 0.0, 0, 0.0
        for q in range(2):
            for v in range(len(views)):
                if v == q:
                    each = -(patch_targets[q] * F.log_softmax(patch_views[v], dim=-1)).sum(-1)
                    mask = self.masks.flatten(1).float().chunk(2)[v]
                    patch_sum = patch_sum + ((each * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean() / 2
                else:
                    cls_sum = cls_sum - (targets[q] * F.log_softmax(views[v], dim=-1)).sum(-1).mean()
                    cls_terms += 1
        return cls_sum / cls_terms + patch_sum

    def __call__(self) -> None:
        with torch.no_grad():
            teacher = self.logits(self.teacher, self.wide, None)
        small, _ = self.logits(self.student, self.narrow, None)
        loss = self.loss((*self.logits(self.student, self.wide, self.masks), small), teacher)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                scale = CLIP / (parameter.grad.norm(2) + 1e-6)
                if scale < 1:
                    parameter.grad.mul_(scale)
        self.optimizer.step()
        with torch.no_grad():
            own = dict(self.student.named_parameters())
            for name, parameter in self.teacher.named_parameters():
                parameter.mul_(MOMENTUM).add_((1 - MOMENTUM) * own[name])
            self.centre = self.centre * CENTRE_MOMENTUM + teacher[0].mean(0, keepdim=True) * (1 - CENTRE_MOMENTUM)
            mean = teacher[1].mean((0, 1), keepdim=True)
            self.patch_centre = self.patch_centre * CENTRE_MOMENTUM + mean * (1 - CENTRE_MOMENTUM)
        self.losses.append(loss.item())


def build_student(config: BackboneConfig, out_dim: int) -> Student:
    """The same weights at every call, without drop path, so that both ways compute the same."""
    torch.manual_seed(0)
    backbone = Backbone(timm_arguments(config, GLOBAL), masked=True)
    backbone.initialise(config.init)
    return Student(backbone, Head(backbone.dim, HeadsConfig(out_dim=out_dim)), PhotometricConfig(), True).train()


def main() -> None:
    """Time both in turns, check the losses, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="name in timm")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out-dim", type=int, default=8192, help="K, prototypes")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    config = BackboneConfig(name=given.model, drop_path=0.0)
    students = [build_student(config, given.out_dim) for _ in range(2)]
    batch = draw_batch(given.batch, students[0].backbone.grid, len(students[0].backbone.drops))
    ours, plain = Ours(students[0], batch, given.out_dim), Plain(students[1], batch, given.out_dim)
    # no warm-up: a step of either takes seconds
    pair = pairs.Pair(ours, plain, given.rounds, warm=False)
    np.testing.assert_allclose(ours.losses, plain.losses, rtol=1e-3)
    told = {"model": given.model, "batch": given.batch, "prototypes": given.out_dim, "losses": ours.losses}
    pairs.report("step", pair.numbers(1.0), "s/step", pair.peak_mb, torch.get_num_threads(), **told)


if __name__ == "__main__":
    main()
