"""Centres by hand over steps, micro-batches and processes; Sinkhorn-Knopp against its two conditions."""

import multiprocessing

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import linear

from pretrain.centering import Centering, CenteringConfig, sinkhorn, teacher_targets
from pretrain.losses import Logits
from pretrain.student_teacher import Seen, build_teacher

K = 5


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_targets_are_the_centred_softmax():
    centering = Centering(K, CenteringConfig())
    centering.centre.copy_(torch.tensor([1.0, 0.0, 0.0, -1.0, 0.5]))
    z = logits(2, 3, K)
    expected = np.exp((z.double().numpy() - [1, 0, 0, -1, 0.5]) / 0.07)
    expected /= expected.sum(-1, keepdims=True)
    found = centering.targets(z, 0.07)
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), expected, atol=1e-5)
    assert centering.targets(z.bfloat16(), 0.07).dtype == torch.float32


def test_centre_is_a_running_mean_over_steps_and_micro_batches():
    centering = Centering(2, CenteringConfig(momentum=0.9))
    centering.collect(torch.tensor([1.0, 2.0]))
    centering.collect(torch.tensor([3.0, -2.0]))
    assert not centering.centre.any(), "the loss of a step uses the centre of the steps before"
    centering.end_step()
    assert torch.allclose(centering.centre, torch.tensor([0.2, 0.0]))
    centering.collect(torch.tensor([1.0, 1.0]))
    centering.end_step()
    assert torch.allclose(centering.centre, torch.tensor([0.9 * 0.2 + 0.1, 0.1]))


def test_a_centre_is_saved_with_the_state():
    assert set(Centering(K, CenteringConfig()).state_dict()) == {"centre"}


def test_both_kinds_of_tokens_have_their_own_centre():
    config = CenteringConfig(momentum=0.0)
    centres = nn.ModuleDict({"cls": Centering(K, config), "patches": Centering(K, config)})
    cls, patches = logits(2, 3, K), logits(7, K, seed=1)
    seen = Seen(Logits(cls, patches), cls.mean((0, 1)), torch.arange(5.0), torch.zeros(3, 4))
    first = teacher_targets(centres, seen, 0.05)
    assert torch.allclose(first.cls, torch.softmax(cls / 0.05, -1))
    assert torch.allclose(first.patches, torch.softmax(patches / 0.05, -1))
    for centre in centres.values():
        centre.end_step()
    assert torch.allclose(centres["cls"].centre, cls.mean((0, 1)))
    assert torch.equal(centres["patches"].centre, torch.arange(5.0))
    second = teacher_targets(centres, seen, 0.05)
    assert torch.allclose(second.patches, torch.softmax((patches - torch.arange(5.0)) / 0.05, -1))
    alone = nn.ModuleDict({"cls": Centering(K, config)})
    assert teacher_targets(alone, Seen(Logits(cls, None), cls.mean((0, 1)), None, seen.features), 0.05).patches is None


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_patch_centre_is_the_mean_over_all_patches(make_student, make_batch, shared):
    # by way of the mean bottleneck vector, without the logits of all patches
    student, batch = make_student(shared=shared), make_batch(4)
    teacher = build_teacher(student)
    seen = teacher(batch)
    images = teacher._images(batch.global_crops)
    tokens = teacher.backbone(images)
    own, of_patches = teacher.head.prototypes()
    every = linear(teacher.head.bottleneck(tokens.patches), of_patches).double()
    assert torch.allclose(seen.patch_mean.double(), every.mean((0, 1)), atol=1e-6)
    assert every.mean((0, 1)).abs().max() > 1e-2
    every_cls = linear(teacher.head.bottleneck(tokens.cls), own).double()
    assert torch.allclose(seen.cls_mean.double(), every_cls.mean(0), atol=1e-6)


def by_the_paper(scores: np.ndarray, iterations: int) -> np.ndarray:
    """SwAV's Sinkhorn-Knopp with K rows and B columns, in double precision."""
    q = np.exp(scores.T - scores.max())
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * q.shape[0]
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("iterations", [1, 3, 100])
def test_sinkhorn_is_that_of_the_paper(iterations):
    scores = 4 * logits(24, 6)
    expected = by_the_paper(scores.double().numpy(), iterations)
    assert np.allclose(sinkhorn(scores, iterations).numpy(), expected, atol=1e-5)


def test_sinkhorn_balances_rows_and_columns():
    scores = 4 * logits(24, 6)
    scores[:, 0] += 8  # everybody wants the first prototype
    assert torch.softmax(scores, -1)[:, 0].mean() > 0.7
    q = sinkhorn(scores, 100)
    assert torch.allclose(q.sum(1), torch.ones(24), atol=1e-6)
    assert torch.allclose(q.sum(0), torch.full((6,), 4.0), rtol=1e-3)
    three = sinkhorn(scores, 3)
    assert torch.allclose(three.sum(1), torch.ones(24), atol=1e-6)
    assert three[:, 0].mean() < 0.25


def test_sinkhorn_survives_sharp_scores_and_empty_batches():
    cosine = torch.nn.functional.normalize(logits(50, 8), dim=-1) @ torch.nn.functional.normalize(logits(8, 40), dim=0)
    q = sinkhorn(cosine / 0.02, 3)
    assert torch.isfinite(q).all()
    assert torch.allclose(q.sum(1), torch.ones(50), atol=1e-5)
    assert sinkhorn(torch.zeros(0, 4), 3).shape == (0, 4)


def test_sinkhorn_targets_keep_the_shape_and_need_no_centre():
    centering = Centering(K, CenteringConfig(kind="sinkhorn"))
    z = logits(2, 6, K)
    found = centering.targets(z, 0.05)
    assert torch.equal(found, sinkhorn(z.flatten(0, 1) / 0.05, 3).view(2, 6, K))
    centering.collect(torch.ones(K))
    centering.end_step()
    assert not centering.centre.any()


def _rank(rank: int, folder, answers) -> None:
    """One of two processes: a centre's step and Sinkhorn over its half of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    centering = Centering(K, CenteringConfig(momentum=0.5))
    scores = 4 * logits(12, K)
    half = scores[:8] if rank == 0 else scores[8:]  # unequal shares, as masked patches have
    centering.collect(torch.full((K,), float(rank)))
    centering.collect(torch.full((K,), 4.0 * rank))
    centering.end_step()
    answers.put((rank, centering.centre.tolist(), sinkhorn(half, 3).tolist()))
    dist.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=_rank, args=(rank, tmp_path, answers), daemon=True) for rank in range(2)]
    for child in children:
        child.start()
    found = sorted(answers.get(timeout=30) for _ in children)
    for child in children:
        child.join(30)
    expected = 0.5 * (0 + 0 + 1 + 4) / 4
    assert found[0][1] == found[1][1] == pytest.approx([expected] * K)
    together = sinkhorn(4 * logits(12, K), 3)
    assert torch.allclose(torch.tensor(found[0][2] + found[1][2]), together, atol=1e-6)
