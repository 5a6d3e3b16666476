"""The full state of a run for resume, and the teacher as an exported model.

A checkpoint is a folder `samples-<n>` with `tensors.safetensors` and `manifest.json`, a model one with
`model.safetensors` and `config.json`; committed.py says how they come to lie there whole, how damage is found.
"""

import re
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain import architecture, committed, foreign, hub
from pretrain.backbone import Backbone
from pretrain.model_config import empty_model, model_arguments
from pretrain.optim import load_optimizers, optimizer_tensors
from pretrain.positions import Kernel, fit_prefix, resize_positions, resizing
from recipes.errors import UserError
from recipes.load import Section
from recipes.record import differences

STATE_VERSION, MODEL_VERSION = 2, 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"
FIRST_MANIFEST = "state.json"  # its name in format 1


class CheckpointConfig(Section):
    """When to save."""

    every_epochs: float = Field(1.0, gt=0)  # full state
    keep: int = Field(2, ge=1)  # newest full states; with 2, one is left should the newest be damaged
    teacher_every_epochs: float = Field(20.0, gt=0)  # exported teachers, all kept: the last is not always the best
    teacher_newest_every_epochs: float | None = Field(None, gt=0)  # more of them between those; None = no more
    teacher_newest: int = Field(5, ge=1)  # newest of these that are kept
    asynchronous: bool = True  # write while the next steps run; takes the memory of one more state on the host
    max_failed: int = Field(3, ge=1)  # saves in a row that the disk may refuse before the run stops


Trained = tuple[nn.Module, Sequence[torch.optim.Optimizer]]  # a module with its optimisers
Recipe = tuple[Mapping[str, Any], Collection[str]]  # resolved recipe as a tree, keys that may differ in a state


def state_tensors(modules: Mapping[str, nn.Module], trained: Trained) -> dict[str, Tensor]:
    """The whole state by name: that of modules by their name, and that of the optimisers of one of them."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    model, optimizers = trained
    for optimizer in optimizers:
        for key, value in optimizer_tensors(optimizer, model).items():
            tensors[f"optimizer.{key}"] = value
    return tensors


def write_state(folder: Path, tensors: Mapping[str, Tensor], samples: int, keep: int, facts: Mapping[str, Any]) -> None:
    """Put a state into `folder`; the older ones beyond `keep` go after that. OSError where the disk refuses."""
    whole = {**facts, "format_version": STATE_VERSION, "samples": samples}
    committed.commit(folder / f"samples-{samples:012d}", tensors, (TENSORS, MANIFEST), whole, sealed=True)
    forget_old(folder, keep)


def forget_old(folder: Path, keep: int) -> None:
    """Delete the states that are not among the `keep` newest, and what killed processes left."""
    committed.discard(states(folder)[:-keep])
    committed.tidy(folder)


def save_state(
    folder: Path, modules: dict[str, nn.Module], trained: Trained, samples: int, keep: int, **facts: Any
) -> None:
    """`write_state` of what modules and optimisers hold now. facts: JSON-able, to be had back from `load_state`."""
    write_state(folder, state_tensors(modules, trained), samples, keep, facts)


def states(folder: Path) -> list[Path]:
    """Complete states in a folder, oldest first; whether they are sound is not looked at."""
    return sorted(path for path in folder.glob("samples-*") if re.fullmatch(r"samples-\d{12}", path.name))


def facts_of(state: Path) -> dict[str, Any]:
    """What `write_state` wrote beside the tensors. Damaged where it is not that; UserError on another format."""
    if not (state / MANIFEST).exists() and (state / FIRST_MANIFEST).is_file():
        facts = committed.read_facts(state / FIRST_MANIFEST, sealed=False)  # format 1 had no checksums
        known = (1,)
    else:
        facts, known = committed.read_facts(state / MANIFEST, sealed=True), (STATE_VERSION,)
    if facts.get("format_version") not in known:
        raise UserError(
            f"checkpoint {state} has format {facts.get('format_version')}, this version reads {STATE_VERSION} and 1; "
            "go on with the version of this project that wrote it, or choose another --out"
        )
    return facts


def check_state(state: Path) -> dict[str, Any]:
    """The facts of a state whose files are all what was written. Damaged, or UserError, as `facts_of`."""
    facts = facts_of(state)
    if facts.get("samples") != int(state.name.removeprefix("samples-")):
        raise committed.Damaged(f"{state} is damaged (it holds the state of {facts.get('samples')} samples)")
    if facts["format_version"] > 1:
        committed.check_files(state, facts)
    else:
        committed.check_tensors(state / TENSORS)  # all that can be seen without a checksum
    return facts


def newest_sound(folder: Path, aside: bool = False) -> Path | None:
    """The newest state that is what was written; None where there is none. UserError where all are damaged.

    Newer ones that are damaged are named on the screen, and moved out of the way if `aside`.
    """
    faults = []
    for state in reversed(states(folder)):
        try:
            check_state(state)
        except committed.Damaged as error:
            faults.append(str(error))
            print(f"warning: checkpoint {state.name} is not used: {error}", file=sys.stderr, flush=True)
            if aside:
                spoilt = state.with_name(f"{state.name}.damaged")
                shutil.rmtree(spoilt, ignore_errors=True)
                state.rename(spoilt)
                print(f"warning: it is kept as {spoilt}; delete it when you like", file=sys.stderr, flush=True)
            continue
        if faults:
            print(f"warning: going on from {state.name}, the one before", file=sys.stderr, flush=True)
        return state
    if faults:
        raise UserError(
            f"none of the checkpoints in {folder} is sound ({faults[0]}); choose another --out to begin anew, and give "
            "--ckpt with an exported teacher of this run to go on from that"
        )
    return None


def read_state(state: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of what `write_state` wrote, by module, and its facts. Damaged, or UserError, as `facts_of`."""
    facts = check_state(state)
    try:
        return load_file(state / TENSORS), facts
    except (OSError, ValueError, SafetensorError) as error:
        raise committed.Damaged(f"{state / TENSORS} is damaged ({error})") from error


def load_state(
    state: Path, modules: Mapping[str, nn.Module], trained: Trained, recipe: Recipe | None = None
) -> dict[str, Any]:
    """Restore what `write_state` wrote; returns its facts, "samples" among them. UserError where it does not fit.

    recipe: what this run computes; a state that tells another one is refused with all that differs.
    """
    tensors, facts = read_state(state)
    if recipe and "recipe" in facts and (told := differences(facts["recipe"], *recipe)):
        raise UserError(f"checkpoint {state} is of another recipe: {'; '.join(told)}; give the old values to go on")
    for name, module in modules.items():
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        if not own and facts["format_version"] == 1:
            continue  # a part that it did not know yet stays fresh
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            first = " ".join(str(error).split())[:300]
            raise UserError(
                f"checkpoint {state} was written by another version of this project ({first}); choose another --out, "
                f"and give --ckpt {state.parent.parent} to go on from its teacher"
            ) from error
    try:
        own = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        load_optimizers(trained[1], trained[0], own)
    except KeyError as error:
        raise UserError(f"checkpoint {state}: its optimiser knows {error}, which the model has not") from error
    return facts


def save_model(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Export a model: its weights and what rebuilds it."""
    whole = {"format_version": MODEL_VERSION, **config}
    committed.commit(folder, tensors, (WEIGHTS, CONFIG), whole, sealed=False)


def save_teacher(
    folder: Path, backbone: Backbone, facts: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Export a teacher backbone: plain timm weights, those of now or `tensors`. facts: normalisation, samples seen."""
    whole = {"kind": "backbone", "timm": backbone.arguments, **facts}
    save_model(folder, tensors or backbone.vit.state_dict(), whole)


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
        committed.recover(candidate)
        if (candidate / WEIGHTS).is_file():
            folder = candidate
            break
    else:
        raise UserError(
            f"--ckpt {path} is no checkpoint: expected a folder with {WEIGHTS} and {CONFIG}, "
            "as pretrain/run.py writes to OUT/teacher and finetune/run.py to OUT/model"
        )
    try:
        config = committed.read_facts(folder / CONFIG, sealed=False)
        if committed.FILES in config:  # one that was made by hand, or before there were sums, has none
            committed.check_files(folder, config)
        config.pop(committed.FILES, None)
        if config.get("format_version", MODEL_VERSION) != MODEL_VERSION:
            raise ValueError(f"it has format {config['format_version']}, this version reads {MODEL_VERSION}")
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"--ckpt {folder} cannot be read ({error}); it needs intact {WEIGHTS} and {CONFIG}") from error
    if "timm" in config:
        model_arguments(config["timm"], f"--ckpt {folder}")
    return tensors, config


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
    found = model_arguments(config.get("timm"), f"--ckpt {path}")
    if not {"img_size", "patch_size"} <= found.keys():
        raise UserError(f"--ckpt {path}: {CONFIG} does not tell img_size and patch_size of the model; export it again")
    empty_model(lambda: Backbone(found), f"--ckpt {path}", own)
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
    told = architecture.differences(found, wanted)
    if told:
        raise UserError(f"--ckpt {path} does not fit the recipe's backbone section: {'; '.join(told)}")
    backbone = Backbone(wanted, drop_path=drop_path)
    try:
        grid, places = patch_grid(found), architecture.prefix_places(backbone.vit)
        tensors = fit_prefix(tensors, tensors["pos_embed"].shape[1] - grid[0] * grid[1], places)
        if grid != backbone.grid:
            resized = resize_positions(tensors["pos_embed"], grid, backbone.grid, places, kernel)
            tensors = tensors | {"pos_embed": resized}
        backbone.vit.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"--ckpt {path}: weights and {CONFIG} do not belong together: {first}") from error
    return backbone
