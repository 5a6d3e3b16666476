"""Optimiser and learning rate of fine-tuning: as in TransReID-SSL and PersonViT, or as in fast-reid's BoT."""

import math
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from timm.models import group_parameters
from torch import nn

from finetune.backbones import TimmBackbone
from finetune.branches import SoftBranch
from pretrain.backbone import Backbone
from recipes.errors import UserError
from recipes.load import Section


class OptimConfig(Section):
    """SGD and the cosine of the published ViTs, Adam and the steps of BoT's ResNet-50, or AdamW."""

    kind: Literal["sgd", "adam", "adamw"] = "sgd"  # adam: its weight decay is part of the gradient, unlike adamw's
    lr: float = Field(4e-4, gt=0)
    bias_lr_factor: float = Field(2.0, gt=0)  # for parameters whose name contains "bias"
    # the rate shrinks by this factor from each block of the backbone to the one below it; 1: the same for all. A ViT:
    # neck and final norm 1, last block once, embeddings depth + 1 times (BEiT, arXiv 2106.08254)
    layer_decay: float = Field(1.0, gt=0, le=1)
    momentum: float = Field(0.9, ge=0, lt=1)  # SGD, without Nesterov
    weight_decay: float = Field(1e-4, ge=0)  # on everything, biases, norms and positions included
    bias_weight_decay: float | None = Field(
        None, ge=0
    )  # for parameters whose name contains "bias"; null: as the others
    epochs: int = Field(120, ge=1)
    warmup_epochs: float = Field(20.0, ge=0)  # linear from warmup_factor * lr, the same start for biases
    # steps; in place of warmup_epochs, and the cosine then runs over the epochs that are left, as in fast-reid
    warmup_steps: int | None = Field(None, ge=0)
    warmup_factor: float = Field(0.01, ge=0, le=1)
    # after the warm-up; "tail": the same until `tail_start`, then exponentially down to tail_factor at the end
    schedule: Literal["cosine", "steps", "tail"] = "cosine"
    end_factor: float = Field(0.002, ge=0, le=1)  # the cosine ends at end_factor * lr
    steps: tuple[float, ...] = (40.0, 90.0)  # epochs, growing: from each on the rate is `gamma` times what it was
    gamma: float | tuple[float, ...] = 0.1  # of the steps, in (0, 1]; or one for each of them
    tail_start: float = Field(150.0, ge=0)  # epochs; AlignedReID's reproduction
    tail_factor: float = Field(0.001, gt=0, le=1)
    by: Literal["epoch", "step"] = "epoch"  # how often the rate changes; published: each epoch

    @field_validator("steps")
    @classmethod
    def _growing(cls, steps: tuple[float, ...]) -> tuple[float, ...]:
        if list(steps) != sorted(set(steps)) or any(step <= 0 for step in steps):
            raise ValueError(f"steps must be growing epochs above 0, not {steps}")
        return steps

    @model_validator(mode="after")
    def _one_factor_a_step(self) -> "OptimConfig":
        if isinstance(self.gamma, tuple) and len(self.gamma) != len(self.steps):
            raise ValueError(
                f"gamma has {len(self.gamma)} factors for {len(self.steps)} steps; give one for each, or one"
            )
        if not all(0 < factor <= 1 for factor in self.factors):
            raise ValueError(f"gamma must lie in (0, 1], not {self.gamma}")
        if self.warmup_steps is not None and (self.schedule != "cosine" or self.by != "epoch"):
            raise ValueError("warmup_steps is for schedule=cosine with by=epoch; give warmup_epochs instead")
        if self.schedule == "tail" and not self.tail_start < self.epochs:
            raise ValueError(f"tail_start={self.tail_start:g} must come before the end, epochs={self.epochs}")
        return self

    @property
    def factors(self) -> tuple[float, ...]:
        """Of each step."""
        return self.gamma if isinstance(self.gamma, tuple) else (self.gamma,) * len(self.steps)


def _after_steps(epoch: float, base: float, config: OptimConfig, length: int) -> float:
    """With `warmup_steps`: linear by the step, then the cosine by the epoch, over those that begin after the warm-up;
    biases start at the same factor of their own rate."""
    step, warmup = round(epoch * length), config.warmup_steps
    if step < warmup:
        return base * (config.warmup_factor + (1 - config.warmup_factor) * step / warmup)
    first, end = math.ceil(warmup / length), config.end_factor * config.lr
    done = max(0, math.floor(epoch) - first) / max(1, config.epochs - first)
    return end + 0.5 * (base - end) * (1 + math.cos(math.pi * done))


def learning_rate(progress: float, base: float, config: OptimConfig) -> float:
    """The rate at `progress` epochs (0 = start). base: config.lr, or that times the bias factor.

    After the warm-up the cosine is not shifted: it counts from epoch 0, so the rate never reaches `base`.
    """
    start, end = config.warmup_factor * config.lr, config.end_factor * config.lr
    if progress < config.warmup_epochs:
        return start + progress * (base - start) / config.warmup_epochs
    if config.schedule == "steps":
        return base * math.prod(f for step, f in zip(config.steps, config.factors, strict=True) if progress >= step)
    if config.schedule == "tail":  # the first epoch of the tail is already lower, and the last one at tail_factor
        done = max(0.0, (progress + 1 - config.tail_start) / (config.epochs - config.tail_start))
        return base * config.tail_factor**done
    return end + 0.5 * (base - end) * (1 + math.cos(math.pi * progress / config.epochs))


def levels(backbone: Backbone | TimmBackbone) -> dict[str, int]:
    """How many levels each parameter of a backbone lies below the neck, which is level 0 and trains at the full rate.

    A ViT as in BEiT: final norm 0, last block 1, first block `depth`, tokens, positions and patch embedding depth + 1.
    Another network by the layers that timm tells: the last one 1. UserError where timm knows none.
    """
    if isinstance(backbone, Backbone):
        depth, found = len(backbone.vit.blocks), {}
        for name, _ in backbone.named_parameters():
            head, *rest = name.removeprefix("vit.").split(".")
            found[name] = depth - int(rest[0]) if head == "blocks" else 0 if head in ("norm", "fc_norm") else depth + 1
        return found
    name = backbone.arguments["model_name"]
    try:
        layers = group_parameters(backbone.model, backbone.model.group_matcher(coarse=False), reverse=True)
    except (AttributeError, NotImplementedError) as error:
        raise UserError(f"optim.layer_decay: timm does not tell the layers of {name}; set it to 1") from error
    if len(set(layers.values())) == 1:
        raise UserError(f"optim.layer_decay: for timm {name} is one layer, so nothing can decay; set it to 1")
    return {f"model.{key}": max(layers.values()) + 1 - layer for key, layer in layers.items()}


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Group 0: weights, group 1: biases; with layer_decay two such groups for each level.

    Each group has `bias_factor` and `scale`, from which `set_rate` makes its rate.
    """
    below: dict[str, int] = {}
    if config.layer_decay != 1:
        for prefix, part in module.named_modules():
            if isinstance(part, Backbone | TimmBackbone):
                below |= {f"{prefix}.{name}".lstrip("."): level for name, level in levels(part).items()}
            elif isinstance(part, SoftBranch):  # a copy, as far from the neck as what it is a copy of
                own = levels(module.backbone)
                below |= {f"{prefix}.{name}": own[part.origin(name)] for name, _ in part.named_parameters()}
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = []
    for level in sorted({0, *below.values()}):
        own = [(name, p) for name, p in named if below.get(name, 0) == level]
        for bias in (False, True):
            parameters = [p for name, p in own if ("bias" in name) == bias]
            decay = config.bias_weight_decay if bias and config.bias_weight_decay is not None else config.weight_decay
            factors = {
                "weight_decay": decay,
                "bias_factor": config.bias_lr_factor if bias else 1.0,
                "scale": config.layer_decay**level,
            }
            groups.append({"params": parameters, "lr": config.lr, **factors})
    if config.kind == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    kind = torch.optim.Adam if config.kind == "adam" else torch.optim.AdamW
    return kind(groups, weight_decay=config.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, epoch: float, config: OptimConfig, length: int = 1) -> float:
    """Set the rates for a moment in epochs of `length` steps (fraction included); returns that of the neck."""

    def rate(base: float) -> float:
        if config.warmup_steps is not None:
            return _after_steps(epoch, base, config, length)
        return learning_rate(epoch if config.by == "step" else math.floor(epoch), base, config)

    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * rate(group["bias_factor"] * config.lr)
    return rate(config.lr)
