"""The state of a fine-tune at the end of an epoch, so that a killed one goes on as if nothing had happened.

Epochs are short, so a state stands between two of them: the batches of the next one follow from its number alone, also
for methods that cluster the set anew before each epoch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field

from finetune.methods.base import Method
from pretrain import checkpoint
from recipes.load import Section


class ResumeConfig(Section):
    """When the state is saved."""

    every_epochs: int = Field(5, ge=1)  # and after the last one
    keep: int = Field(1, ge=1)  # newest states


class Position(NamedTuple):
    """How far a fine-tune is."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimiser steps done
    images: int = 0  # seen by all processes


def restore(out: Path, method: Method, optimisers: Sequence[torch.optim.Optimizer]) -> Position:
    """Load the newest state below OUT into method and optimisers; the start where there is none."""
    states = checkpoint.states(out / "checkpoints")
    if not states:
        return Position()
    facts = checkpoint.load_state(states[-1], {"method": method}, (method, optimisers))
    return Position(int(facts["epoch"]), int(facts["step"]), int(facts["samples"]))


def reached(out: Path) -> int:
    """Epochs that the newest state stands after; 0 where there is none."""
    states = checkpoint.states(out / "checkpoints")
    return int(checkpoint.facts_of(states[-1])["epoch"]) if states else 0


def save(
    out: Path,
    config: ResumeConfig,
    position: Position,
    epochs: int,
    method: Method,
    optimisers: Sequence[torch.optim.Optimizer],
) -> None:
    """Save the state if it is due after `position.epoch` of `epochs`."""
    if position.epoch % config.every_epochs and position.epoch != epochs:
        return
    facts = {"epoch": position.epoch, "step": position.step}
    trained = method, optimisers
    checkpoint.save_state(out / "checkpoints", {"method": method}, trained, position.images, config.keep, **facts)
