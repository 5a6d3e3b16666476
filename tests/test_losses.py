"""Both terms against loops over pairs as the papers write them, and against numbers worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from pretrain import losses as module
from pretrain.batch import collate
from pretrain.losses import Guessed, Logits, LossesConfig, dino_loss, koleo_loss, mim_loss, named_losses

K, B, LOCALS = 7, 3, 4


def cross_entropy(p: Tensor, logits: Tensor, temperature: float) -> float:
    """-sum_k p_k log softmax(logits / temperature)_k in double precision."""
    z = [value / temperature for value in logits.tolist()]
    log_sum = max(z) + math.log(sum(math.exp(value - max(z)) for value in z))
    return -sum(share * (value - log_sum) for share, value in zip(p.tolist(), z, strict=True))


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probabilities(*shape: int, seed: int = 1) -> Tensor:
    return torch.softmax(3 * random_logits(*shape, seed=seed), dim=-1)


@pytest.mark.parametrize("local_views", [0, 1, LOCALS])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_cls_term_by_loops(local_views, temperature):
    student, teacher = random_logits(2 + local_views, B, K), probabilities(2, B, K)
    total = 0.0
    for q in range(2):
        for v in range(2 + local_views):
            if v != q:
                total += sum(cross_entropy(teacher[q, b], student[v, b], temperature) for b in range(B)) / B
    expected = total / (2 * (local_views + 1))
    assert dino_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


def guessed(cls: Tensor, patches: Tensor | None) -> Guessed:
    """A student whose patch vectors are their logits: the prototypes are the unit vectors."""
    return Guessed(cls, patches, None if patches is None else torch.eye(patches.shape[-1]), torch.zeros(2, 1, 1))


def masked_batch(masks: Tensor) -> tuple[Tensor, Tensor]:
    """masks bool [2, B, N] -> places and weights, as the loader gives them (tests/test_loader.py checks these)."""
    weights = (1 / masks.sum(-1, keepdim=True).clamp(min=1)).expand(masks.shape)
    return masks.flatten().nonzero().squeeze(1), weights[masks]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mim_term_by_loops(share):
    patches = 10
    student, teacher = random_logits(2, B, patches, K), probabilities(2, B, patches, K)
    masks = torch.rand(2, B, patches, generator=torch.Generator().manual_seed(2)) < share
    masks[0, 1] = False  # an image without a mask stays in the mean over the batch
    expected = 0.0
    for v in range(2):
        for b in range(B):
            hidden = [i for i in range(patches) if masks[v, b, i]]
            each = sum(cross_entropy(teacher[v, b, i], student[v, b, i], 0.1) for i in hidden)
            expected += each / max(1, len(hidden)) / B / 2
    places, weights = masked_batch(masks)
    patches, unit = (student.flatten(0, 2)[places], torch.eye(K)), teacher.flatten(0, 2)[places]
    loss = mim_loss(*patches, unit, weights, 2 * B, 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (expected == 0) == (share == 0)


def test_two_images_by_hand():
    # two prototypes, no local view, temperature 1. Student: view 0 always log odds 0 (p = 1/2, 1/2),
    # view 1 log odds ln 3 (p = 3/4, 1/4). Teacher: view 0 (1, 0) and (0, 1); view 1 (1/2, 1/2) and (1, 0)
    student = torch.tensor([[[0.0, 0.0], [5.0, 5.0]], [[math.log(3), 0.0], [math.log(3), 0.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [1.0, 0.0]]])
    against_view_1 = (-math.log(3 / 4) - math.log(1 / 4)) / 2
    against_view_0 = math.log(2)
    expected = (against_view_1 + against_view_0) / 2
    assert dino_loss(student, teacher, 1.0).item() == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(0.7651, abs=1e-4)
    # MIM: image 0 of view 0 has two masked patches, image 1 of view 1 has one, the other two views none
    patches = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [math.log(3), 0.0]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss = mim_loss(patches, torch.eye(2), targets, torch.tensor([0.5, 0.5, 1.0]), 4, 1.0)
    by_hand = ((math.log(2) + math.log(4 / 3)) / 2 + math.log(4)) / 4
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)
    assert by_hand == pytest.approx(0.4692, abs=1e-4)


def test_terms_are_weighted_and_named():
    student = guessed(random_logits(4, B, K), random_logits(5, K, seed=3))
    targets = Logits(probabilities(2, B, K), probabilities(5, K, seed=4))
    weights = torch.tensor([0.5, 0.5, 1.0, 1.0, 1.0])
    losses = named_losses(student, targets, weights, LossesConfig(cls_weight=0.3, patch_weight=2.0))
    assert losses["loss_cls"] == dino_loss(student.cls, targets.cls, 0.1)
    assert losses["loss_patch"] == mim_loss(student.patches, torch.eye(K), targets.patches, weights, 2 * B, 0.1)
    assert losses["loss"].item() == pytest.approx(0.3 * losses["loss_cls"].item() + 2 * losses["loss_patch"].item())
    alone = named_losses(guessed(student.cls, None), Logits(targets.cls, None), weights, LossesConfig())
    assert alone["loss"] == alone["loss_cls"] == losses["loss_cls"]
    assert alone["loss_patch"] == 0


def test_gradients_reach_the_student_only_where_the_equations_say():
    student = random_logits(3, B, K).requires_grad_()
    targets = probabilities(2, B, K)
    dino_loss(student, targets, 0.1).backward()
    # d H(p, softmax(z / t)) / dz = (softmax(z / t) - p) / t
    p = torch.softmax(student.detach() / 0.1, dim=-1)
    for view, against in ((0, [1]), (1, [0]), (2, [0, 1])):
        expected = sum(p[view] - targets[q] for q in against) / 0.1 / (4 * B)
        assert torch.allclose(student.grad[view], expected, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_zero_prototypes_give_exactly_ln_k(make_student, make_batch, shared):
    student, batch = make_student(shared=shared), make_batch(4, masks={"ratios": (0.3,), "spreads": (0.2,)})
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("weight_g"):
                parameter.zero_()
        logits = student(batch)
    assert not logits.cls.any()
    assert batch.masks.any(-1).any(-1).all(), "every view has a mask"
    targets = Logits(probabilities(2, 4, 64), probabilities(len(batch.masked), 64))
    losses = named_losses(logits, targets, batch.mask_weights, LossesConfig())
    assert losses["loss_cls"].item() == pytest.approx(math.log(64), abs=1e-5)
    assert losses["loss_patch"].item() == pytest.approx(math.log(64), abs=1e-5)


def test_gradients_flow_through_both_terms(make_student, make_batch):
    student, batch = make_student(shared=False), make_batch(4, masks={"ratios": (0.3,), "spreads": (0.0,)})
    targets = Logits(probabilities(2, 4, 64), probabilities(len(batch.masked), 64))
    named_losses(student(batch), targets, batch.mask_weights, LossesConfig())["loss"].backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_without_any_mask_the_patch_term_is_zero_and_harmless(make_student, make_batch):
    student, batch = make_student(), make_batch(3, masks={"ratios": (0.0,), "spreads": (0.0,)})
    assert len(batch.masked) == 0
    guessed = student(batch)
    assert guessed.patches.shape[0] == 0
    targets = Logits(probabilities(2, 3, 64), torch.zeros(0, 64))
    losses = named_losses(guessed, targets, batch.mask_weights, LossesConfig())
    assert losses["loss_patch"].item() == 0
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_loss_of_micro_batches_is_the_loss_of_the_batch(make_views):
    maker = make_views(masks={"ratios": (0.3,), "spreads": (0.2,)})
    samples = [maker[n] for n in range(4)]
    whole, parts = collate(samples), [collate(samples[:2]), collate(samples[2:])]
    cls, targets = random_logits(5, 4, K), probabilities(2, 4, K)
    patches, patch_targets = random_logits(2, 4, 32, K), probabilities(2, 4, 32, K)

    def loss(batch, low, high) -> float:
        places = batch.masked
        student = guessed(cls[:, low:high], patches[:, low:high].flatten(0, 2)[places])
        teacher = Logits(targets[:, low:high], patch_targets[:, low:high].flatten(0, 2)[places])
        return named_losses(student, teacher, batch.mask_weights, LossesConfig())["loss"].item()

    assert loss(whole, 0, 4) == pytest.approx((loss(parts[0], 0, 2) + loss(parts[1], 2, 4)) / 2, rel=1e-5)


def test_bfloat16_logits_are_lifted_to_float32():
    student, targets = random_logits(3, B, K).bfloat16(), probabilities(2, B, K)
    found = dino_loss(student, targets, 0.1)
    assert found.dtype == torch.float32
    assert found == dino_loss(student.float(), targets, 0.1)
    patches, rest = student[0], (torch.eye(K), targets[0], torch.ones(B), B, 0.1)
    assert mim_loss(patches, *rest) == mim_loss(patches.float(), *rest)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_the_gradients_made_in_parts_are_those_of_autograd(monkeypatch, rows):
    monkeypatch.setattr(module, "PART", rows * K)
    z = torch.nn.functional.normalize(random_logits(9, 5), dim=-1).requires_grad_()
    prototypes, targets = random_logits(K, 5, seed=2).requires_grad_(), probabilities(9, K)
    weights = torch.rand(9, generator=torch.Generator().manual_seed(3))
    (3 * mim_loss(z, prototypes, targets, weights, 4, 0.1)).backward()
    found = z.grad, prototypes.grad
    z.grad = prototypes.grad = None
    log_p = torch.log_softmax(z @ prototypes.T / 0.1, dim=-1)
    expected = -3 * ((targets * log_p).sum(-1) * weights).sum() / 4
    expected.backward()
    for ours, theirs in zip(found, (z.grad, prototypes.grad), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_koleo_by_hand_and_its_direction():
    # view 0: three unit vectors at 0, 90 and 180 degrees: each has its neighbour at distance sqrt(2). View 1: vectors
    # twice as long of which two are 60 degrees apart (distance 1), the third 120 degrees from the nearer one (sqrt(3))
    angles = torch.tensor([[0.0, 90, 180], [0, 60, 180]]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=-1) * torch.tensor([1.0, 2.0])[:, None, None]
    by_hand = -math.log(math.sqrt(2)) - (0 + 0 + math.log(math.sqrt(3))) / 3
    assert koleo_loss(features).item() == pytest.approx(by_hand, abs=1e-5)
    close = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)) * 0.01 + 1
    close.requires_grad_()
    koleo_loss(close).backward()
    assert koleo_loss(close - close.grad) < koleo_loss(close), "a step against the gradient spreads them"
    assert koleo_loss(torch.ones(2, 1, 8)) == 0


def test_koleo_joins_the_loss_with_its_weight():
    cls, targets = random_logits(3, B, K), Logits(probabilities(2, B, K), None)
    student = Guessed(cls, None, None, random_logits(2, B, 8, seed=5))
    losses = named_losses(student, targets, torch.zeros(0), LossesConfig(koleo_weight=0.1))
    assert losses["loss"].item() == pytest.approx(losses["loss_cls"].item() + 0.1 * losses["loss_koleo"].item())
    assert losses["loss_koleo"] == koleo_loss(student.features)
    assert "loss_koleo" not in named_losses(student, targets, torch.zeros(0), LossesConfig())
