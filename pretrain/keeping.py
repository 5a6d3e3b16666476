"""What a pretraining keeps on disk while it goes: full states, and exported teachers."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from pretrain import checkpoint, committed
from pretrain.checkpoint import CheckpointConfig
from pretrain.saving import Job, Writer
from recipes.errors import UserError


def passing_teachers(folder: Path) -> list[Path]:
    """The exported teachers in a folder that are not kept for ever, oldest first; what cannot be read is left out."""
    found = {}
    for path in folder.glob("epoch-*"):
        try:
            config = committed.read_facts(path / checkpoint.CONFIG, sealed=False)
            if config["kept"] == "newest":
                found[path] = int(config["samples"])
        except (ValueError, KeyError, TypeError):  # Damaged is a ValueError
            continue
    return sorted(found, key=found.__getitem__)


class Keeper:
    """Saves what is due after a step, on the main process; `with Keeper(...)` waits at its end for what is being
    written."""

    def __init__(
        self,
        out: Path,
        config: CheckpointConfig,
        steps: int,
        steps_per_epoch: float,
        batch: int,
        recipe: Mapping[str, Any] | None = None,
    ):
        """recipe: the resolved one, which each state tells."""
        self.out, self.config, self.steps, self.steps_per_epoch, self.batch = out, config, steps, steps_per_epoch, batch
        self.told = {"recipe": recipe} if recipe else {}
        self.writer, self.main = Writer(config.asynchronous, config.max_failed), PartialState().is_main_process
        self.saved = -1  # step of the newest state that was asked for
        self.ready = False  # the memory for the copies is there

    def _due(self, step: int, every_epochs: float) -> bool:
        """Whether step `step` (counted from 1) is the first one past a multiple of `every_epochs`."""
        length = every_epochs * self.steps_per_epoch
        return int(step / length) > int((step - 1) / length)

    def snapshot(self, step: int) -> str | None:
        """Name of the teacher that is kept for ever after that many steps; that of the end has one, too."""
        if step == self.steps or self._due(step, self.config.teacher_every_epochs):
            return self._name(step)
        return None

    def _name(self, step: int) -> str:
        return f"epoch-{step / self.steps_per_epoch:07.2f}"

    def _teachers(self, step: int) -> list[tuple[Path, dict[str, Any]]]:
        """Folders of the exported teachers that are due, and what their config says beside the rest."""
        found: list[tuple[Path, dict[str, Any]]] = []
        snapshot, newest = self.out / "teachers" / self._name(step), self.config.teacher_newest_every_epochs
        if self._due(step, self.config.teacher_every_epochs):
            found.append((snapshot, {"kept": "always"}))
        elif newest and self._due(step, newest):
            self.writer.wait()  # the name may be taken by one that is kept for ever, and still under way
            if not snapshot.exists():
                found.append((snapshot, {"kept": "newest"}))
        if step == self.steps:
            found.append((self.out / "teacher", {}))
        return found

    def after(
        self,
        step: int,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        facts: Mapping[str, Any],
        stop: bool = False,
    ) -> None:
        """`step` optimiser steps are done; stop: it was the last one of this process, so all is on disk afterwards.

        modules: "student", "teacher" and the rest of the state. facts go into the config of an exported teacher.
        """
        if not self.main:
            return
        self.writer.poll()
        last, teachers = step == self.steps, self._teachers(step)
        state, now = last or stop or self._due(step, self.config.every_epochs), last or stop
        if not (teachers or state):
            self._prepare(modules, optimizer)
            return
        if now:
            self.writer.wait()  # the state of this step may be under way already
        vit, prefix = modules["teacher"].backbone.vit, "teacher.backbone.vit."
        live = {f"{prefix}{key}": value for key, value in vit.state_dict().items()}
        live = checkpoint.state_tensors(modules, (modules["student"], [optimizer])) if state else live
        tensors = live if now else self.writer.copy(live)
        exported = {**facts, "epochs": round(step / self.steps_per_epoch, 3), "samples": step * self.batch}
        weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        jobs: list[Job] = []
        # teachers first: a run killed before its state is saved does the step again, one killed after it does not
        for folder, more in teachers:
            given = modules["teacher"].backbone, exported | more, weights
            jobs.append(functools.partial(checkpoint.save_teacher, folder, *given))
        jobs += [self._prune] if teachers else []
        if state and not (self.saved == step and self.writer.failed == 0):
            folder, kept = self.out / "checkpoints", self.config.keep
            given = tensors, step * self.batch, kept, self.told
            jobs.append(functools.partial(checkpoint.write_state, folder, *given))
            self.saved = step
        titles = [f"the teacher {folder.name}" for folder, _ in teachers] + ["the state"] * state
        self.writer.submit(f"{' and '.join(titles)} of step {step}", jobs, now)

    def _prepare(self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Once, when the optimiser has its moments: get the memory for the copies."""
        if not self.ready:
            self.writer.prepare(checkpoint.state_tensors(modules, (modules["student"], [optimizer])))
            self.ready = True

    def _prune(self) -> None:
        folder = self.out / "teachers"
        committed.discard(passing_teachers(folder)[: -self.config.teacher_newest])
        committed.tidy(folder)

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is being written."""
        self.writer.wait()
        if self.main:
            self._prune()


def resume(
    folder: Path,
    modules: Mapping[str, nn.Module],
    trained: checkpoint.Trained,
    recipe: checkpoint.Recipe,
    keep: int,
    accelerator: Accelerator,
) -> dict[str, Any] | None:
    """`checkpoint.load_state` of the newest sound state, the same one on all processes; None where there is none.

    The main process chooses, so it alone moves damaged ones aside. It also deletes what a killed process left there,
    above all states beyond the `keep` newest.
    """
    told: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            told[0] = checkpoint.newest_sound(folder, aside=True)
            checkpoint.forget_old(folder, keep)
        except UserError as error:
            told[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(told)
    if told[1]:
        raise UserError(told[1])
    return checkpoint.load_state(told[0], modules, trained, recipe) if told[0] else None
