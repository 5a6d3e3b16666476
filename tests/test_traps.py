"""What reimplementations of this method got wrong, or what lay in the published code: one test a trap."""

import collections
import dataclasses

import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain import checkpoint
from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.batch import Batch, collate
from pretrain.centering import Centering, CenteringConfig, teacher_targets
from pretrain.heads import Head, HeadsConfig, logits
from pretrain.loader import MicroBatches
from pretrain.losses import LossesConfig, named_losses
from pretrain.photometric import PhotometricConfig, normalize
from pretrain.positions import resize_positions
from pretrain.student_teacher import Student, build_teacher
from shards.order import Order, OrderConfig

MASKED = {"ratios": (0.3,), "spreads": (0.2,)}
STEPS = 8  # an epoch of 128 images in steps of 16


def other_pixels(batch: Batch, where: Tensor) -> Batch:
    """The batch with other pixels in the global crops where a patch is True: bool [2, B, 8, 4] of 8 x 8 pixels."""
    pixels = where.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., None]
    return dataclasses.replace(batch, global_crops=torch.where(pixels, 255 - batch.global_crops, batch.global_crops))


@torch.no_grad()
def test_only_the_teacher_sees_what_is_masked(make_student, make_batch):
    student, batch = make_student(), make_batch(4, masks=MASKED)
    student.backbone.mask_embedding.normal_(generator=torch.Generator().manual_seed(0))
    teacher, other = build_teacher(student), other_pixels(batch, batch.masks)
    assert torch.equal(student(other).cls, student(batch).cls)
    assert torch.equal(student(other).patches, student(batch).patches)
    for ours, theirs in zip(teacher(other).logits, teacher(batch).logits, strict=True):
        assert not torch.allclose(ours, theirs, atol=1e-2)
    shown = other_pixels(batch, ~batch.masks)
    assert not torch.allclose(student(shown).cls[:2], student(batch).cls[:2], atol=1e-2)


def test_cls_learns_from_the_other_view_and_patches_from_the_same(make_student, make_batch):
    student, batch = make_student(), make_batch(4, masks=MASKED)
    teacher = build_teacher(student)
    first = torch.zeros_like(batch.masks)
    first[0] = True  # every pixel of the first view

    def gradients(seen_by_teacher: Batch) -> tuple[Tensor, Tensor]:
        """Of the student's CLS logits [5, B, K] and of its masked patches [M, bottleneck]."""
        centres = nn.ModuleDict({kind: Centering(64, CenteringConfig()) for kind in ("cls", "patches")})
        targets, guess = teacher_targets(centres, teacher(seen_by_teacher), 0.04), student(batch)
        loss = named_losses(guess, targets, batch.mask_weights, LossesConfig())["loss"]
        return torch.autograd.grad(loss, (guess.cls, guess.patches))

    before, after = gradients(batch), gradients(other_pixels(batch, first))
    moved = (before[0] - after[0]).abs().amax((1, 2)) / before[0].abs().amax()
    assert moved[0] < 1e-5, "the first view has no part in the teacher's first view"
    assert moved[1:].min() > 0.01
    of_first = batch.masked < batch.masks[0].numel()
    unchanged = (before[1] == after[1]).all(1)
    assert torch.equal(unchanged, ~of_first)
    assert of_first.any()
    assert not of_first.all()


# height and width of the local crops beside global ones of 256 x 128, patches of 32 pixels
GROUPS = {"same width": (96, 128), "as many tokens": (128, 256), "same size": (256, 128)}


@torch.no_grad()
@pytest.mark.parametrize("local", GROUPS.values(), ids=GROUPS)
def test_crops_are_grouped_by_height_and_width(make_views, local):
    maker = make_views(global_size=(256, 128), local_size=local, local_count=2, masks=MASKED)
    batch = collate([maker[n] for n in range(2)])
    torch.manual_seed(0)
    config = BackboneConfig(name="vit_tiny_patch16_224", patch_size=32, embed_dim=32, depth=2, num_heads=2)
    backbone = Backbone(timm_arguments(config, (256, 128)), masked=True)
    backbone.initialise("fan_in")
    backbone.mask_embedding.normal_()
    sizes = HeadsConfig(out_dim=64, hidden_dim=48, bottleneck_dim=16)
    student = Student(backbone, Head(32, sizes), PhotometricConfig(), True)
    # the same network made for the size of the local crops
    grid, weights = (local[0] // 32, local[1] // 32), backbone.vit.state_dict()
    if grid != (8, 4):
        weights |= {"pos_embed": resize_positions(weights["pos_embed"], (8, 4), grid, 1, "bicubic")}
    for_local = Backbone(timm_arguments(config, local))
    for_local.vit.load_state_dict(weights)
    found, norm = student(batch).cls, student.photometric
    for view, crops in enumerate([*batch.global_crops, *batch.local_crops]):
        images = normalize(crops, norm.mean, norm.std)
        alone = backbone(images, batch.masks[view]) if view < 2 else for_local(images)
        expected = logits(student.head.bottleneck(alone.cls), student.head.prototypes()[0])
        assert torch.allclose(found[view], expected, atol=1e-4), view


def test_processes_of_one_seed_draw_different_views(make_views):
    # DINO, iBOT and TransReID-SSL seed the global generators of all processes alike
    drawn = []
    for rank in range(2):
        np.random.seed(0)  # noqa: NPY002 - what the published code draws from
        torch.manual_seed(0)
        maker = make_views(masks=MASKED)
        (places,) = MicroBatches((0, 1), 12, 6, rank, 2)
        drawn.append([maker[place] for place in places])
    for one, other in zip(*drawn, strict=True):
        for what in ("boxes", "masks", "global_drops", "local_drops"):
            assert not np.array_equal(getattr(one, what), getattr(other, what)), what
    boxes = [tuple(box) for samples in drawn for made in samples for box in made.boxes]
    assert len(set(boxes)) > 0.9 * len(boxes) == 0.9 * 2 * 6 * 5


def test_the_end_of_an_epoch_is_not_dropped():
    # 53 images in steps of 12 on two processes: after 53 steps each image was seen 12 times, once an epoch
    order, rows = Order([12, 12, 12, 12, 5], 0, OrderConfig(lanes=6, window=4)), []
    for rank in range(2):
        positions = [place for batch in MicroBatches((0, 53), 12, 3, rank, 2) for place in batch]
        rows += [order(place) for place in positions]
    assert collections.Counter(rows) == dict.fromkeys([(epoch, row) for epoch in range(12) for row in range(53)], 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same pretraining of two epochs in float32 with 16 images at a time, and with 4 times 4."""
    base = tmp_path_factory.mktemp("accumulation")
    crops, found = small.drawn(base, small.UNLABELED), {}
    for micro in (16, 4):
        # Sinkhorn-Knopp balances the images that it gets at a time: on smaller micro-batches it is another method
        given = ["precision=no", "centering.kind=centre", "schedules.epochs=2", "checkpoint.teacher_every_epochs=1"]
        command = small.arguments("pretrain/run.py", base / str(micro), crops, *given)
        assert small.run([*command, f"loader.batch_per_device={micro}"]) == 0
        found[micro] = base / str(micro)
    return found


def state(out, samples: int) -> dict[str, Tensor]:
    return checkpoint.read_state(out / "checkpoints" / f"samples-{samples:012d}")[0]


def test_accumulation_moves_centre_and_teacher_once_a_step(runs):
    whole, parts = (small.metrics(runs[micro]) for micro in (16, 4))
    assert len(whole) == len(parts) == 2 * STEPS
    for ours, theirs in zip(parts, whole, strict=True):
        for name in ("loss", "loss_cls", "loss_patch"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
    ours, theirs = (state(runs[micro], 2 * 128) for micro in (4, 16))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        one, other = ours[name], theirs[name]
        if "attn.qkv.bias" in name and one.ndim:
            # no softmax feels a bias of the keys, so its gradient is rounding alone, which Adam makes a step of
            one, other = one.unflatten(0, (3, -1))[[0, 2]], other.unflatten(0, (3, -1))[[0, 2]]
        assert (one - other).double().norm() <= 1e-5 * other.double().norm(), name
    assert theirs["centres.patches.centre"].norm() > 0.01


def test_checkpoints_are_named_by_what_is_done(runs):
    # DINO's checkpoint0220.pth has seen 221 epochs
    teachers = runs[16] / "teachers"
    assert sorted(path.name for path in teachers.iterdir()) == ["epoch-0001.00", "epoch-0002.00"]
    for epochs in (1, 2):
        told = small.json_of(teachers / f"epoch-{epochs:07.2f}" / "config.json")
        assert (told["samples"], told["epochs"]) == (epochs * 128, epochs)
        tensors = state(runs[16], epochs * 128)
        assert tensors["optimizer.head.mlp.0.weight//step"] == epochs * STEPS
        weights = load_file(teachers / f"epoch-{epochs:07.2f}" / "model.safetensors")
        assert all(torch.equal(value, tensors[f"teacher.backbone.vit.{name}"]) for name, value in weights.items())
