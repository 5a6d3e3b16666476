"""AdamW in two groups, gradient clipping, frozen prototypes; the state of an optimiser by the names of parameters."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recipes.load import Section

Share = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW; its rate and decay come from schedules.py."""

    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    clip: float | None = Field(3.0, gt=0)  # longest gradient; None = no clipping
    clip_by: Literal["parameter", "global"] = "parameter"  # DINO clips each tensor by itself


def decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to biases and other one-dimensional parameters (norms).

    Position, CLS and mask embeddings are decayed, as in DINO and iBOT.
    """
    return not (name.endswith(".bias") or parameter.ndim == 1)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Group 0 has weight decay, group 1 has none; parameters keep the order of `named_parameters`."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if decayed(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not decayed(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def set_values(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Learning rate of both groups, weight decay of the first."""
    for index, group in enumerate(optimizer.param_groups):
        group["lr"] = lr
        group["weight_decay"] = weight_decay if index == 0 else 0.0


@torch.no_grad()
def clip_gradients(model: nn.Module, config: OptimConfig, each: dict[str, Tensor] | None = None) -> Tensor:
    """Shorten gradients to config.clip, each tensor by itself or all together; returns the global norm before.

    each: gets the norm before of each parameter that has a gradient, by its name; nothing is read from the device.
    """
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    gradients = [gradient for _, gradient in named]
    norms = torch.stack(torch._foreach_norm(gradients))
    total = torch.linalg.vector_norm(norms)
    if each is not None:
        each.clear()
        each.update(zip((name for name, _ in named), norms.unbind(), strict=True))
    if config.clip is not None:
        longest = norms if config.clip_by == "parameter" else total.expand(len(gradients))
        torch._foreach_mul_(gradients, (config.clip / (longest + 1e-6)).clamp(max=1.0).unbind())
    return total


def step(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Take the step where finite [] is True; else leave weights, moments and step counts as they are.

    The host does not wait for the answer: torch's fused AdamW reads it on the device, as it does for a GradScaler. The
    gradients are gone afterwards.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    inner.found_inf = (~finite).float()
    optimizer.step()
    optimizer.zero_grad()


def freeze_last_layer(model: nn.Module) -> None:
    """Drop the gradients of the prototypes, so that this step does not move them."""
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """State of the optimiser keyed `<parameter name>//<what>`, independent of the order of groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}//{what}": value
        for parameter, state in optimizer.state.items()
        for what, value in state.items()
    }


def load_optimizers(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the state of `optimizer_tensors` back, to each optimiser that of its parameters."""
    parameters = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for optimizer in optimizers:
        optimizer.state.clear()
    for key, value in tensors.items():
        name, _, what = key.partition("//")
        parameter = parameters[name]
        # the step counter stays where torch keeps it: with fused AdamW beside the parameter
        owner[parameter].state[parameter][what] = value.to(parameter.device).clone()
