"""Who sees what, how the teacher follows, and what the loss is before anything was learned."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from pretrain.centering import Centering, CenteringConfig, teacher_targets
from pretrain.heads import logits
from pretrain.losses import LossesConfig, named_losses
from pretrain.photometric import PhotometricConfig, normalize
from pretrain.student_teacher import build_teacher, put_back, running_statistics, update_teacher

MASKED = {"ratios": (0.3,), "spreads": (0.2,)}
MEAN, STD = PhotometricConfig().mean, PhotometricConfig().std


def test_the_teacher_starts_as_a_copy(make_student):
    student = make_student(drop_path=0.2)
    teacher = build_teacher(student)
    own = student.state_dict()
    assert set(own) - set(teacher.state_dict()) == {"backbone.mask_embedding"}
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, own[name])
        assert value.data_ptr() != own[name].data_ptr()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.backbone.drops == [0.0] * 4
    assert student.backbone.drops == [0.0, 0.0, 0.2, 0.2], "the student keeps its own"
    assert student.backbone.mask_embedding is not None


@torch.no_grad()
def test_update_by_hand(make_student):
    student, other = make_student(0), make_student(1)
    teacher = build_teacher(student)
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    update_teacher(teacher, other, 0.9)
    for name, value in teacher.named_parameters():
        expected = 0.9 * before[name] + 0.1 * other.get_parameter(name)
        assert torch.allclose(value, expected, atol=1e-6)
    assert not torch.equal(teacher.backbone.vit.cls_token, before["backbone.vit.cls_token"])
    update_teacher(teacher, other, 1.0)
    assert torch.allclose(
        teacher.head.mlp[0].weight, 0.9 * before["head.mlp.0.weight"] + 0.1 * other.head.mlp[0].weight
    )
    update_teacher(teacher, other, 0.0)
    assert torch.equal(teacher.head.last_layer.weight_g, other.head.last_layer.weight_g)
    assert torch.allclose(teacher.backbone.vit.pos_embed, other.backbone.vit.pos_embed, atol=1e-7)


@torch.no_grad()
def test_no_update_leaves_every_bit(make_student):
    student, other = make_student(0), make_student(1)
    teacher = build_teacher(student)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    update_teacher(teacher, other, 0.9, torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    update_teacher(teacher, other, 0.9, torch.tensor(True))
    assert not torch.equal(teacher.backbone.vit.cls_token, before["backbone.vit.cls_token"])


def test_running_statistics_of_a_skipped_step_are_put_back(make_student):
    assert running_statistics(make_student()) == [], "a plain ViT has none"
    norms = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in norms.state_dict().items()}
    for finite in (False, True):
        statistics = running_statistics(norms)
        norms(torch.tensor([[1.0, 2.0], [3.0, float("inf") if not finite else 5.0]]))
        put_back(statistics, torch.tensor(finite))
        same = [torch.equal(value, before[name]) for name, value in norms.named_buffers()]
        assert all(same) if not finite else not any(same)


@torch.no_grad()
def test_a_shared_teacher_of_an_unshared_student(make_student, make_batch):
    student, batch = make_student(shared=False), make_batch(3, masks=MASKED)
    teacher = build_teacher(student, shared=True)
    own, of_patches = teacher.head.prototypes()
    assert own is of_patches
    assert torch.equal(own, student.head.prototypes()[0])
    assert not torch.equal(own, student.head.prototypes()[1])
    assert teacher(batch).logits.patches.shape == (len(student(batch).patches), 64)
    update_teacher(teacher, make_student(1, shared=False), 0.5)
    assert not any("last_layer2" in name for name in teacher.state_dict())


def without_masks(batch):
    return dataclasses.replace(batch, masks=torch.zeros_like(batch.masks))


@torch.no_grad()
def test_the_teacher_sees_clean_views_and_the_student_masked_ones(make_student, make_batch):
    student, batch = make_student(), make_batch(3, masks=MASKED)
    student.backbone.mask_embedding.normal_(generator=torch.Generator().manual_seed(0))
    teacher = build_teacher(student)
    hidden, clean = teacher(batch), teacher(without_masks(batch))
    assert torch.equal(hidden.logits.cls, clean.logits.cls)
    assert torch.equal(hidden.logits.patches, clean.logits.patches)
    assert torch.equal(hidden.patch_mean, clean.patch_mean)
    hidden, clean = student(batch), student(without_masks(batch))
    assert not torch.allclose(hidden.cls[:2], clean.cls[:2], atol=1e-3)
    assert torch.allclose(hidden.cls[2:], clean.cls[2:], atol=1e-6), "local views are never masked"


@torch.no_grad()
@pytest.mark.parametrize("local_size", [(32, 16), (48, 32)])  # the second as wide as the global views
def test_the_student_gives_what_each_view_gives_alone(make_student, make_batch, local_size):
    student = make_student(shared=False, drop_path=0.4)
    student.backbone.mask_embedding.normal_(generator=torch.Generator().manual_seed(0))
    batch = make_batch(3, masks=MASKED, local_size=local_size)
    guessed, (own, of_patches) = student(batch), student.head.prototypes()
    assert guessed.cls.shape == (5, 3, 64)
    patches = []
    for view in range(5):
        part = view < 2
        crops = batch.global_crops[view] if part else batch.local_crops[view - 2]
        drops = batch.global_drops[view] if part else batch.local_drops[view - 2]
        images = normalize(crops, MEAN, STD)
        tokens = student.backbone(images, batch.masks[view] if part else None, drops)
        expected = logits(student.head.bottleneck(tokens.cls), own)
        assert torch.allclose(guessed.cls[view], expected, atol=1e-5)
        if part:  # image after image, row after row
            patches.append(student.head.bottleneck(tokens.patches[batch.masks[view].flatten(1)]))
            assert torch.allclose(guessed.features[view], tokens.cls, atol=1e-5)
    assert torch.allclose(guessed.patches, torch.cat(patches), atol=1e-5)
    assert torch.equal(guessed.prototypes, of_patches)
    assert len(guessed.patches) == batch.masks.sum()


@torch.no_grad()
def test_the_teacher_gives_the_same_patches_in_the_same_order(make_student, make_batch):
    teacher, batch = build_teacher(make_student(shared=False)), make_batch(3, masks=MASKED)
    seen, (own, of_patches) = teacher(batch), teacher.head.prototypes()
    assert seen.logits.cls.shape == (2, 3, 64)
    patches = []
    for view in range(2):
        images = normalize(batch.global_crops[view], MEAN, STD)
        tokens = teacher.backbone(images)
        assert torch.allclose(seen.logits.cls[view], logits(teacher.head.bottleneck(tokens.cls), own), atol=1e-5)
        chosen = tokens.patches[batch.masks[view].flatten(1)]
        patches.append(logits(teacher.head.bottleneck(chosen), of_patches))
        assert torch.allclose(seen.features[view], tokens.cls, atol=1e-5)
    assert torch.allclose(seen.logits.patches, torch.cat(patches), atol=1e-5)


def test_without_the_mim_term_nothing_is_masked(make_student, make_batch):
    student, batch = make_student(mim=False), make_batch(3, masks=MASKED)
    assert student.backbone.mask_embedding is None
    guessed = student(batch)
    assert guessed.patches is None
    assert torch.equal(guessed.cls, student(without_masks(batch)).cls)
    seen = build_teacher(student)(batch)
    assert seen.logits.patches is None
    assert seen.patch_mean is None


def test_without_local_views(make_student, make_batch):
    student, batch = make_student(), make_batch(3, masks=MASKED, local_count=0)
    guessed = student(batch)
    assert guessed.cls.shape == (2, 3, 64)
    seen = build_teacher(student)(batch)
    loss = named_losses(guessed, seen.logits, batch.mask_weights, LossesConfig())["loss"]
    loss.backward()
    assert torch.isfinite(loss)


def test_the_student_alone_gets_gradients(make_student, make_batch):
    student, batch = make_student(), make_batch(3, masks=MASKED)
    teacher = build_teacher(student)
    centres = nn.ModuleDict({"cls": Centering(64, CenteringConfig()), "patches": Centering(64, CenteringConfig())})
    targets = teacher_targets(centres, teacher(batch), 0.04)
    assert not targets.cls.requires_grad
    assert not targets.patches.requires_grad
    named_losses(student(batch), targets, batch.mask_weights, LossesConfig())["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.backbone.mask_embedding.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("prototypes", [64, 1024, 8192])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_loss_is_about_ln_k(make_student, make_batch, prototypes, seed):
    # In 256 dimensions the logits have deviation 1/16: s = 0.625 over the student's temperature of 0.1, t = 1.56 over
    # the teacher's 0.04. Two views with the same bottleneck vector have cross-entropy ln K + s^2/2 - s t = ln K - 0.8,
    # two without anything in common ln K + s^2/2 = ln K + 0.2. A run that stays there learns nothing.
    student = make_student(seed, hidden_dim=128, bottleneck_dim=256, out_dim=prototypes)
    batch = make_batch(6, seed=seed, masks=MASKED)
    assert batch.masks.flatten(2).any(-1).all(), "every view is masked"
    centres = nn.ModuleDict({name: Centering(prototypes, CenteringConfig()) for name in ("cls", "patches")})
    targets = teacher_targets(centres, build_teacher(student)(batch), 0.04)
    losses = named_losses(student(batch), targets, batch.mask_weights, LossesConfig())
    for name in ("loss_cls", "loss_patch"):
        assert math.log(prototypes) - 1 <= losses[name].item() <= math.log(prototypes) + 0.3, name
