"""The full state of a run for resume, and the teacher as an exported model.

A checkpoint is a folder `samples-<n>` with `tensors.safetensors` and `state.json`; it is written under another name and
renamed, so a folder of that name is complete. A model is a folder with `model.safetensors` and `config.json`.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pretrain import foreign, hub
from pretrain.architecture import differences, prefix_places
from pretrain.backbone import Backbone
from pretrain.positions import Kernel, fit_prefix, resize_positions, resizing
from recipes.errors import UserError
from recipes.load import Section

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class CheckpointConfig(Section):
    """When to save."""

    every_epochs: float = Field(1.0, gt=0)  # full state
    keep: int = Field(2, ge=1)  # newest full states
    teacher_every_epochs: float = Field(20.0, gt=0)  # exported teachers, all kept: the last is not always the best
    teacher_newest_every_epochs: float | None = Field(None, gt=0)  # more of them between those; None = no more
    teacher_newest: int = Field(5, ge=1)  # newest of these that are kept


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _commit(folder: Path, tensors: dict[str, Tensor], file: str, facts: tuple[str, dict[str, Any]]) -> None:
    """Write a folder of one tensor file and one JSON file under a temporary name, flush it, put it in place."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial / file)
    (partial / facts[0]).write_text(json.dumps(facts[1], indent=1) + "\n")
    for path in (partial / file, partial / facts[0], partial):
        _fsync(path)
    if folder.exists():
        _discard([folder])
    partial.rename(folder)
    _fsync(folder.parent)


def _discard(folders: list[Path]) -> None:
    """Delete folders of one parent; a kill in between leaves no half one under its name, the next call tidies up."""
    for folder in folders:
        hidden = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
    for hidden in folders[0].parent.glob(".*.old") if folders else ():
        shutil.rmtree(hidden)


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


Trained = tuple[nn.Module, Sequence[torch.optim.Optimizer]]  # a module with its optimisers


def save_state(
    folder: Path, modules: dict[str, nn.Module], trained: Trained, samples: int, keep: int, **facts: Any
) -> None:
    """Save modules by name and the optimisers of one of them; older states beyond `keep` go after that."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    model, optimizers = trained
    for optimizer in optimizers:
        for key, value in optimizer_tensors(optimizer, model).items():
            tensors[f"optimizer.{key}"] = value
    facts = {**facts, "format_version": FORMAT_VERSION, "samples": samples}
    _commit(folder / f"samples-{samples:012d}", tensors, "tensors.safetensors", ("state.json", facts))
    _discard(states(folder)[:-keep])


def states(folder: Path) -> list[Path]:
    """Complete states in a folder, oldest first."""
    found = folder.glob("samples-*") if folder.is_dir() else []
    return sorted(path for path in found if re.fullmatch(r"samples-\d{12}", path.name))


def facts_of(state: Path) -> dict[str, Any]:
    """What `save_state` wrote beside the tensors. UserError on a damaged state, and on one of another format."""
    try:
        facts = json.loads((state / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {state} is damaged ({error}); delete it to go on from the one before") from error
    if facts.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {state} has format {facts.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    return facts


def read_state(state: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of what `save_state` wrote, by module, and its facts. UserError on a damaged state."""
    facts = facts_of(state)
    try:
        return load_file(state / "tensors.safetensors"), facts
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"checkpoint {state} is damaged ({error}); delete it to go on from the one before") from error


def load_state(state: Path, modules: dict[str, nn.Module], trained: Trained) -> dict[str, Any]:
    """Restore what `save_state` wrote; returns its facts, "samples" among them. UserError where it is damaged or does
    not fit."""
    tensors, facts = read_state(state)
    for name, module in modules.items():
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            first = " ".join(str(error).split())[:300]
            raise UserError(
                f"checkpoint {state} was written by another version of this project ({first}); choose another --out, "
                f"and give --ckpt {state.parent.parent} to go on from its teacher"
            ) from error
    own = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
    load_optimizers(trained[1], trained[0], own)
    return facts


def save_model(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Export a model: its weights and what rebuilds it."""
    _commit(folder, tensors, WEIGHTS, (CONFIG, {"format_version": FORMAT_VERSION, **config}))


def save_teacher(folder: Path, backbone: Backbone, facts: dict[str, Any]) -> None:
    """Export a teacher backbone: plain timm weights. facts: normalisation, samples seen and the like."""
    save_model(folder, backbone.vit.state_dict(), {"kind": "backbone", "timm": backbone.arguments, **facts})


def passing_teachers(folder: Path) -> list[Path]:
    """The exported teachers in a folder that are not kept for ever, oldest first; what cannot be read is left out."""
    found = {}
    for path in folder.glob("epoch-*"):
        try:
            config = json.loads((path / CONFIG).read_text())
            if config["kept"] == "newest":
                found[path] = int(config["samples"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=found.__getitem__)


class Keeper:
    """Saves what is due after a step."""

    def __init__(self, out: Path, config: CheckpointConfig, steps: int, steps_per_epoch: float, batch: int):
        self.out, self.config, self.steps, self.steps_per_epoch, self.batch = out, config, steps, steps_per_epoch, batch

    def _due(self, step: int, every_epochs: float) -> bool:
        """Whether step `step` (counted from 1) is the first one past a multiple of `every_epochs`."""
        length = every_epochs * self.steps_per_epoch
        return int(step / length) > int((step - 1) / length)

    def after(
        self, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, facts: dict[str, Any]
    ) -> None:
        """`step` optimiser steps are done. modules: "student", "teacher" and the rest of the state; facts go into the
        config of an exported teacher."""
        last, epochs = step == self.steps, step / self.steps_per_epoch
        exported = {**facts, "epochs": round(epochs, 3), "samples": step * self.batch}
        # teachers first: a run killed before its state is saved does the step again, one killed after it does not
        snapshot, newest = self.out / "teachers" / f"epoch-{epochs:07.2f}", self.config.teacher_newest_every_epochs
        if self._due(step, self.config.teacher_every_epochs):
            save_teacher(snapshot, modules["teacher"].backbone, {**exported, "kept": "always"})
        elif newest and self._due(step, newest):
            if not snapshot.exists():  # a name may be taken by one that is kept for ever, a hundredth of an epoch ago
                save_teacher(snapshot, modules["teacher"].backbone, {**exported, "kept": "newest"})
            _discard(passing_teachers(snapshot.parent)[: -self.config.teacher_newest])
        if last:
            save_teacher(self.out / "teacher", modules["teacher"].backbone, exported)
        if last or self._due(step, self.config.every_epochs):
            trained = modules["student"], [optimizer]
            save_state(self.out / "checkpoints", modules, trained, step * self.batch, self.config.keep)


def load_model(path: Path | str, likely: tuple[int, int] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config of a model.

    path: the folder of an exported model, the run folder around it, its weights file, or what foreign.py reads, which
    comes out as an exported teacher. likely: patch grid (rows, columns) that the recipe asks for.
    """
    path = hub.local(str(path))
    if foreign.is_foreign(path):
        found = foreign.read(path, likely=likely)
        return found.tensors, found.config()
    path = Path(path)
    folder = path.parent if path.is_file() and path.name == WEIGHTS else path
    for candidate in (folder, folder / "model", folder / "teacher"):
        if (candidate / WEIGHTS).is_file():
            folder = candidate
            break
    else:
        raise UserError(
            f"--ckpt {path} is no checkpoint: expected a folder with {WEIGHTS} and {CONFIG}, "
            "as pretrain/run.py writes to OUT/teacher and finetune/run.py to OUT/model"
        )
    try:
        tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds no JSON object")
        return tensors, config
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--ckpt {folder} cannot be read ({error}); it needs intact {WEIGHTS} and {CONFIG}") from error


def load_backbone(
    path: Path | str, wanted: dict[str, Any] | None = None, drop_path: float = 0.0, kernel: Kernel = "bilinear"
) -> tuple[Backbone, dict[str, Any]]:
    """The backbone of an exported teacher, a fine-tuned model or a file of another project, and its config.

    Strict: every key must fit. wanted: timm arguments that it must have (see backbone.timm_arguments); another image
    size is allowed, the position embeddings are resized. Of a file of another project the config's "source" says what
    was taken. Raises UserError naming what differs.
    """
    tensors, config = load_model(path, patch_grid(wanted) if wanted else None)
    prefix = "" if config.get("kind") == "backbone" else "backbone.vit."
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    found = config.get("timm")
    if not isinstance(found, dict):
        raise UserError(f"--ckpt {path}: {CONFIG} does not tell the timm arguments of the model; export it again")
    backbone = build_backbone(path, own, found, wanted or found, drop_path, kernel)
    if "source" in config and patch_grid(found) != backbone.grid:
        told = resizing(patch_grid(found), backbone.grid, kernel)
        config = {**config, "source": f"{config['source']}; pos_embed {told}"}
    return backbone, config


def patch_grid(arguments: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of patches of a model by its timm arguments."""
    height, width = arguments["img_size"]
    return height // arguments["patch_size"], width // arguments["patch_size"]


def build_backbone(
    path: Path | str,
    tensors: dict[str, Tensor],
    found: dict[str, Any],
    wanted: dict[str, Any],
    drop_path: float = 0.0,
    kernel: Kernel = "bilinear",
) -> Backbone:
    """A backbone of the timm arguments `wanted` with the weights of one with the arguments `found`.

    tensors: by timm's names. path: for the errors. UserError when they differ in more than the image size.
    """
    told = differences(found, wanted)
    if told:
        raise UserError(f"--ckpt {path} does not fit the recipe's backbone section: {'; '.join(told)}")
    backbone = Backbone(wanted, drop_path=drop_path)
    try:
        grid, places = patch_grid(found), prefix_places(backbone.vit)
        tensors = fit_prefix(tensors, tensors["pos_embed"].shape[1] - grid[0] * grid[1], places)
        if grid != backbone.grid:
            resized = resize_positions(tensors["pos_embed"], grid, backbone.grid, places, kernel)
            tensors = tensors | {"pos_embed": resized}
        backbone.vit.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"--ckpt {path}: weights and {CONFIG} do not belong together: {first}") from error
    return backbone
