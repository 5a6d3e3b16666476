"""Signals of collapse at their ends, where they are known exactly, and the alarms that follow from logged lines."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.health import FLAT_STEPS, HealthConfig, Watch, effective_rank, signals
from pretrain.losses import Guessed, Logits
from pretrain.student_teacher import Seen

K, D, B = 16, 32, 32
LN_K = math.log(K)


def found(
    targets: Tensor | None = None,
    features: Tensor | None = None,
    patches: Tensor | None = None,
    student: Tensor | None = None,
    centre: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """Signals of CLS targets [2, B, K], features [2, B, D], patch targets [M, K]. centre: it, the mean logits [K]."""
    targets = torch.full((2, B, K), 1 / K) if targets is None else targets
    features = torch.ones(2, targets.shape[1], D) if features is None else features
    mean = centre[1] if centre else torch.ones(K)
    seen = Seen(Logits(targets, patches), mean, None, features)
    guessed = Guessed(targets, patches, None, features if student is None else student)
    values = signals(Logits(targets, patches), seen, guessed, {"cls": centre[0]} if centre else {})
    assert all(value.shape == () and value.dtype == torch.float32 for value in values.values())
    return {name: value.item() for name, value in values.items()}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_uniform_targets():
    values = found()
    assert values["teacher_entropy"] == pytest.approx(LN_K)
    assert values["teacher_entropy_share"] == pytest.approx(1)
    assert values["mean_entropy"] == pytest.approx(LN_K)
    assert "patch_entropy" not in values


def test_one_prototype_for_all():
    targets = torch.zeros(2, B, K)
    targets[..., 3] = 1
    values = found(targets)
    assert values["teacher_entropy"] == values["teacher_entropy_share"] == values["mean_entropy"] == 0


def test_sharp_targets_that_use_all_prototypes():
    values = found(torch.eye(K).repeat(2, 2, 1))
    assert values["teacher_entropy"] == 0
    assert values["mean_entropy"] == pytest.approx(LN_K)


def test_entropies_by_hand():
    targets = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).repeat(2, 2, 1)
    values = found(targets, patches=targets[0])
    one, two = math.log(2), -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    mean = -0.375 * math.log(0.375) - 0.625 * math.log(0.625)
    assert (values["teacher_entropy"], values["mean_entropy"]) == (pytest.approx((one + two) / 2), pytest.approx(mean))
    assert (values["patch_entropy"], values["patch_mean_entropy"]) == (
        pytest.approx((one + two) / 2),
        pytest.approx(mean),
    )
    assert values["teacher_entropy_share"] == pytest.approx((one + two) / 2 / math.log(2))


def test_what_a_small_batch_cannot_tell_is_nan():
    values = found(torch.full((2, 3, K), 1 / K), patches=torch.zeros(0, K))
    unknown = {name for name, value in values.items() if math.isnan(value)}
    assert unknown == {"mean_entropy", "patch_entropy", "patch_mean_entropy"}
    assert math.isnan(found(torch.full((2, 1, K), 1 / K))["negative_cosine"])


def test_many_patches_are_seen_in_part_and_all_over_the_batch():
    patches = torch.eye(K).repeat_interleave(1000, 0)  # the last image's patches are the last prototype's
    assert found(patches=patches)["patch_mean_entropy"] == pytest.approx(LN_K, rel=1e-3)


def test_features_that_are_all_equal_have_no_spread():
    row = noise(1, D)
    features = (row * torch.linspace(0.5, 3, B)[:, None]).repeat(2, 1, 1)  # the length does not count
    values = found(features=features)
    assert values["feature_std"] == pytest.approx(0, abs=1e-5)
    assert values["positive_cosine"] == pytest.approx(1)
    assert values["negative_cosine"] == pytest.approx(1)


def test_orthogonal_features_fill_the_sphere():
    # each coordinate is 1 once and 0 otherwise: variance 1/D - 1/D^2
    values = found(features=5 * torch.eye(D).repeat(2, 1, 1))
    assert values["feature_std"] == pytest.approx(math.sqrt((D - 1) / D), rel=1e-5)
    assert values["positive_cosine"] == pytest.approx(1)
    assert values["negative_cosine"] == pytest.approx(0, abs=1e-6)
    targets = torch.full((2, 4000, K), 1 / K)
    assert found(targets, noise(2, 4000, D))["feature_std"] == pytest.approx(1, abs=0.02)


def test_cosines_by_brute_force():
    teacher, student = noise(2, B, D, seed=1) + 0.3, noise(2, B, D, seed=2) + 0.3
    values = found(features=teacher, student=student)
    cosine = torch.nn.functional.cosine_similarity(teacher[0][:, None], teacher[1][None], dim=-1)
    assert values["positive_cosine"] == pytest.approx(cosine.diagonal().mean().item(), rel=1e-4)
    others = cosine[~torch.eye(B, dtype=bool)].mean().item()
    assert values["negative_cosine"] == pytest.approx(others, rel=1e-4)
    agreement = torch.nn.functional.cosine_similarity(teacher, student, dim=-1).mean().item()
    assert values["student_cosine"] == pytest.approx(agreement, rel=1e-4)


def test_the_share_of_the_mean_that_a_centre_takes_away():
    mean = noise(K)
    assert found(centre=(mean, mean))["centre_share_cls"] == pytest.approx(1)
    assert found(centre=(0.25 * mean, mean))["centre_share_cls"] == pytest.approx(0.25)
    none = found(centre=(torch.zeros(K), mean))
    assert none["centre_share_cls"] == none["centre_norm_cls"] == 0
    assert found(centre=(torch.full((K,), 0.5), mean))["centre_norm_cls"] == pytest.approx(2)
    assert not [name for name in found() if name.startswith("centre")]


def test_signals_carry_no_gradient():
    targets = torch.full((2, B, K), 1 / K, requires_grad=True)
    features = torch.ones(2, B, D, requires_grad=True)
    seen = Seen(Logits(targets, None), torch.ones(K), None, features)
    values = signals(Logits(targets, None), seen, Guessed(targets, None, None, features), {})
    assert not any(value.requires_grad for value in values.values())


def test_effective_rank():
    assert effective_rank(torch.eye(8)) == pytest.approx(8, rel=1e-4)
    assert effective_rank(noise(5, 1) @ noise(1, D)) == pytest.approx(1, abs=1e-4)
    # singular values 3, 1: shares 3/4, 1/4; wide and tall are the same
    two = torch.diag(torch.tensor([3.0, 1.0]))
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert effective_rank(two @ torch.eye(2, 7)) == pytest.approx(expected, rel=1e-4)
    assert effective_rank(torch.eye(7, 2) @ two) == pytest.approx(expected, rel=1e-4)
    features = noise(40, 12)
    shares = torch.linalg.svdvals(features.double())
    shares = shares / shares.sum() + 1e-7
    assert effective_rank(features) == pytest.approx(math.exp(-(shares * shares.log()).sum().item()), rel=1e-6)
    assert effective_rank(torch.zeros(4, 3)) == pytest.approx(1, abs=1e-3)
    assert math.isnan(effective_rank(torch.full((4, 3), math.inf)))


# what a line of a healthy run holds
HEALTHY = {
    "loss_cls": 0.8 * LN_K,
    "teacher_temperature": 0.04,
    "teacher_entropy": 0.6 * LN_K,
    "teacher_entropy_share": 0.6,
    "mean_entropy": 0.95 * LN_K,
    "patch_entropy": 0.6 * LN_K,
    "patch_mean_entropy": 0.9 * LN_K,
    "feature_std": 0.6,
    "negative_cosine": 0.5,
    "centre_share_cls": 0.95,
    "skipped_steps": 0,
}
SHARP = {"teacher_entropy": 0.0, "teacher_entropy_share": 0.0}
COLLAPSED = {**SHARP, "mean_entropy": 0.01}
UNIFORM = {"teacher_entropy": LN_K, "teacher_entropy_share": 1.0, "mean_entropy": LN_K, "loss_cls": LN_K}


def watched(changes: dict[str, Any], steps: list[int], config: HealthConfig | None = None) -> dict[str, int]:
    """The step of the first line with each alarm, when every line has the same values."""
    watch, begun = Watch(config or HealthConfig(), K, epoch=150.0), {}
    for step in steps:
        for name in watch.see({"step": step, **HEALTHY, **changes}):
            begun[name] = step
        assert set(begun) >= set(watch.ringing)
    return begun


@pytest.mark.parametrize(
    "changes, alarms",
    [
        ({}, {}),
        ({"teacher_entropy": None, "mean_entropy": None, "feature_std": math.nan}, {}),
        (SHARP, {"hard_targets": 30}),
        ({**SHARP, "teacher_temperature": 1e-4}, {"hard_targets": 30}),
        ({**COLLAPSED, "teacher_temperature": 1e-4}, {"hard_targets": 30}),
        (COLLAPSED, {"one_prototype": 30}),
        ({"mean_entropy": math.log(2.1)}, {}),
        ({"mean_entropy": math.log(1.9)}, {"one_prototype": 30}),
        ({"patch_mean_entropy": 0.01}, {"one_prototype_of_patches": 30}),
        ({"patch_entropy": 0.0}, {"hard_targets_of_patches": 30}),
        ({**COLLAPSED, "patch_entropy": 0.0, "patch_mean_entropy": 0.0}, {"one_prototype": 30}),
        ({"centre_share_cls": 0.0, "mean_entropy": 0.9 * LN_K}, {"no_centring": 30}),
        ({"centre_share_cls": 0.0, "mean_entropy": LN_K}, {}),
        ({"feature_std": 0.01}, {"equal_features": 30}),
        (UNIFORM, {"uniform_targets": 320}),
        ({"loss_cls": LN_K}, {"flat_loss": 320}),
    ],
)
def test_which_alarm_and_when(changes, alarms):
    """10 steps after the first line that is judged; 2 epochs of 150 steps for what only time can tell."""
    assert watched(changes, list(range(0, 1000, 10))) == alarms


def test_what_is_flat_needs_some_steps_also_in_a_tiny_set():
    watch = Watch(HealthConfig(), K, epoch=4.0)
    begun = [step for step in range(0, 300) if watch.see({"step": step, **HEALTHY, **UNIFORM})]
    assert begun == [20 + FLAT_STEPS]


def test_a_sign_that_stops_begins_anew():
    watch = Watch(HealthConfig(), K, 150.0)
    begun = {}
    for step in range(0, 100):
        changes = {} if step in (25, 60) else COLLAPSED
        for name in watch.see({"step": step, **HEALTHY, **changes}):
            begun.setdefault(name, []).append(step)
    assert begun == {"one_prototype": [36, 71]}


def test_the_text_names_the_cause_and_the_cure():
    watch = Watch(HealthConfig(first_step=0, lasting=0), K, 150.0)
    watch.see({"step": 0, **HEALTHY, **SHARP, "teacher_temperature": 1e-4})
    text = watch.ringing["hard_targets"]
    assert "0.0000 of ln K" in text
    assert "the teacher temperature is 0.0001; raise schedules.teacher_temperature" in text
    watch.see({"step": 1, **HEALTHY, **COLLAPSED})
    assert "1.01 prototypes in use; centring is off or too weak" in watch.ringing["one_prototype"]


def test_skipped_steps_are_an_alarm_of_their_own():
    watch = Watch(HealthConfig(), K, 150.0)
    begun = []
    for step, skipped in enumerate([0, 2, 3, 3, 4]):
        begun.append(watch.see({"step": step, **HEALTHY, "skipped_steps": skipped}))
        assert ("skipped_steps" in watch.ringing) == (step in (1, 2, 4))
    assert begun == [[], ["skipped_steps"], [], [], ["skipped_steps"]]
    assert watch.ringing["skipped_steps"].startswith("1 step(s) since the line before were skipped")


def test_a_skipped_step_says_nothing_about_the_model():
    """It neither ends nor begins an alarm, and what lasts goes on."""
    watch = Watch(HealthConfig(), K, 150.0)
    for step in range(0, 40):
        broken = dict.fromkeys(HEALTHY) | {"not_finite": ["loss"], "skipped_steps": 1}
        watch.see({"step": step, **(broken if step in (25, 35) else {**HEALTHY, **COLLAPSED, "skipped_steps": 1})})
        assert ("one_prototype" in watch.ringing) == (step >= 30)
