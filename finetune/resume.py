"""The state of a fine-tune, so that a killed one goes on as if nothing had happened.

Epochs are short, so states stand between two of them. A run that is asked to stop does not wait for the end of its
epoch: that state tells how many batches of it are done, and the same batches are asked for again.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from pydantic import Field

from finetune.methods.base import Method
from pretrain import checkpoint, keeping
from pretrain.saving import Writer
from recipes.errors import UserError
from recipes.load import Section

# keys of the recipe that may differ when a run is continued: they do not change what it computes
FREE_KEYS = ("benchmark.workers", "benchmark.strips", "benchmark.nearest", "log_every", "resume", "ranks")


class ResumeConfig(Section):
    """When the state is saved."""

    every_epochs: int = Field(5, ge=1)  # and after the last one
    keep: int = Field(2, ge=1)  # newest states; with 2, one is left should the newest be damaged
    asynchronous: bool = True  # write while the next steps run; takes the memory of one more state on the host
    max_failed: int = Field(3, ge=1)  # saves in a row that the disk may refuse before the run stops


class Position(NamedTuple):
    """How far a fine-tune is."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimiser steps done
    images: int = 0  # seen by all processes
    batch: int = 0  # batches done of the epoch under way


class Keeper:
    """Saves and restores the state of one fine-tune."""

    def __init__(
        self,
        out: Path,
        config: ResumeConfig,
        epochs: int,
        method: Method,
        optimisers: Sequence[torch.optim.Optimizer],
        recipe: checkpoint.Recipe = ({}, ()),
        apart: Mapping[str, Any] | None = None,
    ):
        """epochs: of the whole run. recipe: the resolved one, and the keys that may differ when a run is continued.
        apart: state beside the method's own, see `Method.apart`."""
        self.folder, self.config, self.epochs, self.recipe = out / "checkpoints", config, epochs, recipe
        self.modules, self.trained = {"method": method, **(apart or {})}, (method, optimisers)
        self.writer = Writer(config.asynchronous, config.max_failed)
        self.saved: Position | None = None
        self.main = PartialState().is_main_process

    def restore(self, accelerator: Accelerator) -> Position:
        """Load the newest sound state on all processes; the start where there is none."""
        facts = keeping.resume(self.folder, self.modules, self.trained, self.recipe, self.config.keep, accelerator)
        if facts is None:
            return Position()
        return Position(int(facts["epoch"]), int(facts["step"]), int(facts["samples"]), int(facts.get("batch", 0)))

    def after(self, position: Position, stop: bool = False) -> None:
        """Save what is due at `position`: at the end of some epochs, and at a stop. The main process does it."""
        if not self.main:
            return
        self.writer.poll()
        ended = position.batch == 0
        last = ended and position.epoch == self.epochs
        if not (stop or last or (ended and position.epoch % self.config.every_epochs == 0)):
            return
        self.writer.wait()  # this very state may be under way
        if position == self.saved and not self.writer.failed:
            return
        live = checkpoint.state_tensors(self.modules, self.trained)
        wrong = [name for name, value in live.items() if value.is_floating_point() and not value.isfinite().all()]
        if wrong:
            raise UserError(
                f"step {position.step}: {wrong[0]} is not finite, so no state is saved and the ones before stay "
                "as they are; lower optim.lr or set precision=no"
            )
        tensors = live if stop or last else self.writer.copy(live)
        facts: Mapping[str, Any] = {"epoch": position.epoch, "step": position.step, "batch": position.batch}
        facts |= {"recipe": self.recipe[0]} if self.recipe[0] else {}
        job = functools.partial(checkpoint.write_state, self.folder, tensors, position.images, self.config.keep, facts)
        self.writer.submit(f"the state of step {position.step}", [job], now=stop or last)
        self.saved = position

    def close(self) -> None:
        """Wait for what is being written."""
        self.writer.wait()
