"""Optimiser and learning rate of fine-tuning, as in TransReID-SSL and PersonViT."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from recipes.load import Section


class OptimConfig(Section):
    """SGD as published, or AdamW."""

    kind: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(4e-4, gt=0)
    bias_lr_factor: float = Field(2.0, gt=0)  # for parameters whose name contains "bias"
    momentum: float = Field(0.9, ge=0, lt=1)  # SGD
    weight_decay: float = Field(1e-4, ge=0)  # on everything
    epochs: int = Field(120, ge=1)
    warmup_epochs: float = Field(20.0, ge=0)  # linear from warmup_factor * lr, the same start for biases
    warmup_factor: float = Field(0.01, ge=0, le=1)
    end_factor: float = Field(0.002, ge=0, le=1)  # the cosine ends at end_factor * lr
    by: Literal["epoch", "step"] = "epoch"  # how often the rate changes; published: each epoch


def learning_rate(progress: float, base: float, config: OptimConfig) -> float:
    """The rate at `progress` epochs (0 = start). base: config.lr, or that times the bias factor.

    After the warm-up the cosine is not shifted: it counts from epoch 0, so the rate never reaches `base`.
    """
    start, end = config.warmup_factor * config.lr, config.end_factor * config.lr
    if progress < config.warmup_epochs:
        return start + progress * (base - start) / config.warmup_epochs
    return end + 0.5 * (base - end) * (1 + math.cos(math.pi * progress / config.epochs))


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Group 0: weights; group 1: biases, with their own rate."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if ("bias" in n) == bias], "lr": config.lr} for bias in (False, True)]
    if config.kind == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, epoch: float, config: OptimConfig) -> float:
    """Set the rates for a moment in epochs (fraction included); returns that of the weights."""
    progress = epoch if config.by == "step" else math.floor(epoch)
    for group, factor in zip(optimizer.param_groups, (1.0, config.bias_lr_factor), strict=True):
        group["lr"] = learning_rate(progress, factor * config.lr, config)
    return optimizer.param_groups[0]["lr"]
