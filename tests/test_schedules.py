"""Scheduled values at steps where they can be told by hand."""

import math

import pytest

from pretrain.schedules import SchedulesConfig, at, cosine, peak_lr

CONFIG = SchedulesConfig()  # 300 epochs, 10 of warm-up
STEPS_PER_EPOCH, BATCH = 100.0, 1024
STEPS = 30_000
PEAK = 2e-3


def value(step: int, name: str, config: SchedulesConfig = CONFIG, per_epoch: float = STEPS_PER_EPOCH) -> float:
    return getattr(at(step, int(config.epochs * per_epoch), per_epoch, BATCH, config), name)


@pytest.mark.parametrize(
    "batch, rate", [(256, 5e-4), (64, 1.25e-4), (512, 1e-3), (1024, 2e-3), (1025, 2e-3), (4096, 2e-3)]
)
def test_peak_is_scaled_with_the_batch_and_capped(batch, rate):
    assert peak_lr(CONFIG, batch) == pytest.approx(rate)


def test_the_cap_can_be_moved():
    assert peak_lr(SchedulesConfig(lr=7.5e-4, lr_cap=1.0), 1024) == pytest.approx(3e-3)


@pytest.mark.parametrize("progress, expected", [(0, 3.0), (0.25, 2.7071068), (0.5, 2.0), (0.75, 1.2928932), (1, 1.0)])
def test_half_a_cosine(progress, expected):
    assert cosine(progress, 3.0, 1.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    "step, rate",
    [
        (0, 0.0),
        (1, PEAK / 1000),
        (500, PEAK / 2),
        (999, PEAK * 0.999),
        (1000, PEAK),
        (15_500, 1e-6 + (PEAK - 1e-6) / 2),  # half way from the end of the warm-up
        (1000 + 29_000 // 4, 1e-6 + (PEAK - 1e-6) * (1 + math.sqrt(0.5)) / 2),
        (29_999, 1e-6 + (PEAK - 1e-6) * (math.pi / 29_000) ** 2 / 4),
    ],
)
def test_learning_rate(step, rate):
    assert value(step, "lr") == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize("step, decay", [(0, 0.04), (7500, 0.22 - 0.18 * math.sqrt(0.5)), (15_000, 0.22)])
def test_weight_decay(step, decay):
    assert value(step, "weight_decay") == pytest.approx(decay)


def test_ends_of_weight_decay_and_momentum():
    assert value(STEPS - 1, "weight_decay") == pytest.approx(0.4, abs=1e-7)
    assert value(STEPS - 1, "momentum") == pytest.approx(1.0, abs=1e-9)
    assert value(STEPS - 1, "momentum") < 1.0


@pytest.mark.parametrize("step, momentum", [(0, 0.996), (10_000, 0.997), (15_000, 0.998), (20_000, 0.999)])
def test_momentum(step, momentum):
    # cos(pi / 3) = 1/2, so a third of the way is a quarter of the rise
    assert value(step, "momentum") == pytest.approx(momentum, abs=1e-12)


@pytest.mark.parametrize(
    "epoch, temperature", [(0, 0.04), (1, 0.04 + 0.03 / 29), (10, 0.04 + 0.3 / 29), (29, 0.07), (30, 0.07), (299, 0.07)]
)
def test_temperature_has_one_value_an_epoch(epoch, temperature):
    # numpy.linspace(0.04, 0.07, 30), then constant
    first, last = epoch * 100, epoch * 100 + 99
    assert value(first, "teacher_temperature") == pytest.approx(temperature)
    assert value(last, "teacher_temperature") == value(first, "teacher_temperature")


def test_temperature_without_warm_up_and_with_one_epoch_of_it():
    assert value(0, "teacher_temperature", SchedulesConfig(teacher_temperature_epochs=0)) == 0.07
    one = SchedulesConfig(teacher_temperature_epochs=1)
    assert value(99, "teacher_temperature", one) == 0.04
    assert value(100, "teacher_temperature", one) == 0.07


def test_prototypes_are_frozen_in_the_first_epoch():
    assert value(0, "freeze_last_layer")
    assert value(99, "freeze_last_layer")
    assert not value(100, "freeze_last_layer")
    assert not value(0, "freeze_last_layer", SchedulesConfig(freeze_last_layer_epochs=0))
    assert value(299, "freeze_last_layer", SchedulesConfig(freeze_last_layer_epochs=3))


def test_epochs_that_are_no_whole_number_of_steps():
    # 2.5 steps an epoch: epoch 1 begins with step 3, epoch 2 with step 5
    found = [value(step, "teacher_temperature", per_epoch=2.5) for step in range(6)]
    assert found == pytest.approx([0.04] * 3 + [0.04 + 0.03 / 29] * 2 + [0.04 + 0.06 / 29])
    assert [value(step, "freeze_last_layer", per_epoch=2.5) for step in range(4)] == [True, True, True, False]
    assert value(5, "lr", per_epoch=2.5) == pytest.approx(PEAK * 5 / 25)


def test_without_warm_up_the_rate_starts_at_its_peak():
    assert value(0, "lr", SchedulesConfig(warmup_epochs=0)) == PEAK


def test_a_run_shorter_than_its_warm_up_is_a_piece_of_it():
    short = SchedulesConfig(epochs=5)
    assert value(499, "lr", short) == pytest.approx(PEAK * 0.499)
