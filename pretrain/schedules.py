"""Everything that changes during a run, as a pure function of the step."""

import math
from typing import NamedTuple

from pydantic import Field

from recipes.load import Section


class SchedulesConfig(Section):
    """Lengths in epochs; an epoch is as many samples as the data set holds."""

    epochs: float = Field(300.0, gt=0)
    warmup_epochs: float = Field(10.0, ge=0)  # linear, from 0
    lr: float = Field(5e-4, gt=0)  # for a global batch of 256; scaled linearly with it
    lr_cap: float = Field(2e-3, gt=0)  # the scaled rate is not taken above this
    lr_end: float = Field(1e-6, ge=0)
    weight_decay: float = Field(0.04, ge=0)
    weight_decay_end: float = Field(0.4, ge=0)
    momentum: float = Field(0.996, ge=0, le=1)  # of the teacher
    momentum_end: float = Field(1.0, ge=0, le=1)
    teacher_temperature_start: float = Field(0.04, gt=0)
    teacher_temperature: float = Field(0.07, gt=0)
    teacher_temperature_epochs: float = Field(30.0, ge=0)  # linear warm-up, one value an epoch
    freeze_last_layer_epochs: float = Field(1.0, ge=0)  # prototypes do not learn before


class Values(NamedTuple):
    """The scheduled values of one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    freeze_last_layer: bool


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from start (progress 0) to end (progress 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def peak_lr(config: SchedulesConfig, batch: int) -> float:
    """Linear scaling rule with a cap. batch: global."""
    return min(config.lr * batch / 256, config.lr_cap)


def at(step: int, steps: int, steps_per_epoch: float, batch: int, config: SchedulesConfig) -> Values:
    """The values of `step`, 0 <= step < steps."""
    peak, warmup = peak_lr(config, batch), config.warmup_epochs * steps_per_epoch
    if step < warmup:
        lr = peak * step / warmup
    else:
        lr = cosine((step - warmup) / max(steps - warmup, 1), peak, config.lr_end)
    progress, epoch = step / steps, int(step / steps_per_epoch)
    rise = min(epoch / max(config.teacher_temperature_epochs - 1, 1), 1) if config.teacher_temperature_epochs else 1
    low, high = config.teacher_temperature_start, config.teacher_temperature
    return Values(
        lr=lr,
        weight_decay=cosine(progress, config.weight_decay, config.weight_decay_end),
        momentum=cosine(progress, config.momentum, config.momentum_end),
        teacher_temperature=low + (high - low) * rise,
        freeze_last_layer=step < config.freeze_last_layer_epochs * steps_per_epoch,
    )
