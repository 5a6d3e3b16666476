"""Checkpoints of other projects in: DINO, iBOT, DINOv2, TransReID-SSL, PASS, PersonViT, MSN, timm.

docs/checkpoints.md lists them. Every key of a file is taken or left out for a stated reason (foreign_styles.py), the
rest is an error. Nothing in a file is executed (untrusted.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from pretrain import architecture, committed, untrusted
from pretrain.architecture import Grid
from pretrain.foreign_styles import Sorted, Unwrapped, bare_keys, settings, sort_keys, unwrap
from pretrain.model_config import model_arguments
from pretrain.positions import fit_prefix, resizing
from recipes.errors import UserError

TIMM = "timm:"  # `--ckpt timm:NAME`: pretrained weights that timm fetches
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")  # .tar: MSN's files end with .pth.tar
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # of a folder in the layout of the Hub
READ_BESIDE = {"args", "student", "ibot_loss", "dino_loss", "epoch"}  # beside the teacher in a training file


@dataclass(frozen=True)
class Report:
    """What became of every key of a file."""

    source: str  # the file, or timm:NAME
    style: str
    taken: dict[str, str]  # timm's name -> key in the file
    left_out: dict[str, str]  # key in the file -> why
    reshaped: dict[str, str] = field(default_factory=dict)  # timm's name -> from which grid to which, and how
    notes: tuple[str, ...] = ()
    part: str = "of the backbone"  # what the taken tensors are

    def resized(self, old: Grid, new: Grid, kernel: str) -> "Report":
        """With position embeddings of another grid, if it is another one."""
        if old == new:
            return self
        return replace(self, reshaped={**self.reshaped, "pos_embed": resizing(old, new, kernel)})

    def sentence(self) -> str:
        """In one line: what was taken from where, what was not, and what was changed."""
        reasons = ", ".join(f"{count} keys left out ({why})" for why, count in self._counts().items())
        changes = [f"{name} {how}" for name, how in self.reshaped.items()]
        parts = [f"{len(self.taken)} tensors of {self.source} ({self.style})", reasons, *changes]
        return "; ".join(part for part in parts if part)

    def _counts(self) -> dict[str, int]:
        reasons = list(self.left_out.values())
        return {why: reasons.count(why) for why in dict.fromkeys(reasons)}

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.style}", f"  taken      {len(self.taken)} tensors {self.part}"]
        for why, count in self._counts().items():
            keys = [key for key, reason in self.left_out.items() if reason == why]
            lines.append(f"  left out   {count:3d} ({', '.join(keys[:2])}{', ...' if count > 2 else ''}): {why}")
        lines += [f"  reshaped   {name} {how}" for name, how in self.reshaped.items()]
        return "\n".join([*lines, *(f"  note       {note}" for note in self.notes)])


class Found(NamedTuple):
    """What a file holds. D = embedding dimension, K = prototypes."""

    tensors: dict[str, Tensor]  # the backbone by timm's names, float32; they load strictly into ...
    arguments: dict[str, Any]  # ... the timm model of these, see backbone.timm_arguments
    report: Report
    head: dict[str, Tensor]  # the teacher's projection head by the names of heads.Head; {} when there is none
    centres: dict[str, Tensor]  # "cls", "patches" -> [K], as far as they are there
    mask: Tensor | None  # the student's mask embedding [1, D]
    settings: dict[str, Any]  # arguments of the training; {} when they are not there
    normalize: dict[str, list[float]] | None  # mean and std of the images; None: the file does not tell

    def config(self) -> dict[str, Any]:
        """What stands in config.json of an exported model of ours."""
        normalize = {"normalize": self.normalize} if self.normalize else {}
        # without folders: this text travels with the model
        source = replace(self.report, source=Path(self.report.source).name).sentence()
        return {"kind": "backbone", "timm": self.arguments, **normalize, "source": source}


def is_foreign(ckpt: str | Path) -> bool:
    """Whether `--ckpt` names weights that this project did not write: timm:NAME, a file, or a folder as on the Hub."""
    path = Path(ckpt)
    if str(ckpt).startswith(TIMM):
        return True
    if path.is_dir():
        return "architecture" in _json(path / CONFIG)
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():  # ours, also with a damaged config
        return "architecture" in _json(path.parent / CONFIG)
    return path.is_file() and path.suffix in SUFFIXES


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none."""
    try:
        return committed.read_object(path)
    except UserError:  # whoever needs it will say so
        return {}


def read(
    ckpt: str | Path, grid_hint: Grid | None = None, likely: Grid | None = None, heads: int | None = None
) -> Found:
    """A checkpoint of another project. grid_hint, likely: see architecture.grid_of. heads: of the attention.

    Raises UserError naming keys, shapes or globals for a file that is damaged, that wants to run something, or that
    holds anything but one of the known layouts.
    """
    where, path = str(ckpt), Path(ckpt)
    if str(ckpt).startswith(TIMM):
        return _from_timm(str(ckpt).removeprefix(TIMM), where)
    hub = _json((path if path.is_dir() else path.parent) / CONFIG)
    if path.is_dir():
        path = path / WEIGHTS
        if not path.is_file():
            raise UserError(f"{where} has a {CONFIG} but no {WEIGHTS} beside it; convert the weights to safetensors")
    file = unwrap(untrusted.read(path), where)
    state = untrusted.tensors_of(file.state, where)
    found = sort_keys(file, state, where)
    architecture.need_vit(found.backbone, where)
    if path.name == WEIGHTS and "architecture" in hub:
        arguments, normalize = _of_hub(hub, where)
        return _checked(file, found, arguments, normalize, where)
    grid_hint = grid_hint or _told_grid(settings(file.beside), found.backbone)
    tensors, grid = whole_positions(found, grid_hint, likely, where)
    arguments = architecture.timm_arguments_of(tensors, grid, where, heads)
    found = found._replace(backbone=tensors)
    return _checked(file, found, arguments, found.style.normalize, where)


def whole_positions(
    found: Sorted, hint: Grid | None, likely: Grid | None, where: str
) -> tuple[dict[str, Tensor], Grid]:
    """Tensors whose pos_embed has places for CLS and all registers, and the grid of the patches."""
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in found.backbone.items()}
    prefix = 1 + (tensors["reg_token"].shape[1] if "reg_token" in tensors else 0)
    length = tensors["pos_embed"].shape[1]
    fault: UserError | None = None
    for places in dict.fromkeys([prefix, 1, 0] if found.places is None else [found.places]):
        try:
            grid = architecture.grid_of(length - places, hint, likely, where)
        except UserError as error:
            fault = fault or error  # that of the usual layout is told
            continue
        try:
            return fit_prefix(tensors, places, prefix), grid
        except (KeyError, RuntimeError) as error:
            told = " ".join(str(error.args[0]).split())[:200]
            raise UserError(
                f"{where} is not exactly one plain ViT: cls_token, reg_token and pos_embed do not fit together ({told})"
            ) from error
    assert fault is not None
    raise fault


def _told_grid(args: Mapping[str, Any], tensors: dict[str, Tensor]) -> Grid | None:
    """The grid by the arguments of a training of TransReID-SSL or PASS: they tell height and width of its images."""
    sides = [args.get(name) for name in ("height", "width", "patch_size")]
    if not all(isinstance(side, int) and side > 0 for side in sides):
        return None
    grid = sides[0] // sides[2], sides[1] // sides[2]
    return grid if tensors["pos_embed"].shape[1] - math.prod(grid) in (0, 1) else None


def _checked(file: Unwrapped, found: Sorted, arguments: dict[str, Any], normalize: dict | None, where: str) -> Found:
    """Everything together, after the strict comparison with the model of those arguments."""
    architecture.check_keys(found.backbone, arguments, where)
    own = {name: _own(tensor) for name, tensor in found.backbone.items()}
    head, centres, mask = _heads(file, found, where)
    notes = [] if normalize else ["the file does not tell mean and std of its images: those of the recipe are used"]
    epoch = file.beside.get("epoch")
    # checkpoint0220.pth of DINO and iBOT comes after epoch 220 counted from 0, and says 221 inside
    notes += [f"{epoch} epochs done, by the count in the file"] if isinstance(epoch, int) else []
    asides = sorted(str(key) for key in file.beside if key not in READ_BESIDE)
    notes += [f"not read: {', '.join(asides)}"] if asides else []
    report = Report(where, found.style.name, found.origin, found.left_out, {}, tuple(notes))
    return Found(own, arguments, report, head, centres, mask, settings(file.beside), normalize)


def _own(tensor: Tensor) -> Tensor:
    """A copy in memory, float32 where it is a number with a fraction."""
    return tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()


def _heads(file: Unwrapped, found: Sorted, where: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """Projection head, centres and mask embedding of DINO and iBOT, as far as they are there."""
    weights = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    head, mask = {}, None
    for key, tensor in found.others.items():
        if key.startswith("head."):
            name = key.removeprefix("head.")
            for new, old in weights.items():  # torch's newer names of a weight-normalised layer
                name = name.replace(new, old)
            head[name] = _own(tensor)
        elif key.endswith(("mask_token", "masked_embed")):
            mask = tensor
    student, loss = file.beside.get("student"), file.beside.get("ibot_loss", file.beside.get("dino_loss"))
    if isinstance(student, Mapping):
        names = bare_keys(student)
        mask = student[names["backbone.masked_embed"]] if "backbone.masked_embed" in names else mask
    stored = {} if mask is None else {"mask": mask}
    if isinstance(loss, Mapping):
        stored |= {kind: loss[name] for kind, name in (("cls", "center"), ("patches", "center2")) if name in loss}
    stored = {name: _own(tensor).flatten() for name, tensor in untrusted.tensors_of(stored, where).items()}
    mask = stored.pop("mask")[None] if "mask" in stored else None
    return head, stored, mask


def _of_hub(hub: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, list[float]] | None]:
    """create_vit's arguments, mean and std, from the config.json of a folder in the layout of the Hub."""
    try:
        name, cfg, given = hub["architecture"], hub.get("pretrained_cfg", {}), hub.get("model_args", {})
        given = {key: value for key, value in given.items() if key not in ("num_classes", "dynamic_img_size")}
        size = list(cfg.get("input_size", (3, 224, 224))[1:])
        told = {key: [float(x) for x in cfg[key]] for key in ("mean", "std") if key in cfg}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {CONFIG} is not one that timm writes ({error})") from error
    if isinstance(given.get("img_size"), int):
        given["img_size"] = [given["img_size"]] * 2
    base = {"model_name": name, "num_classes": 0, "img_size": size, "dynamic_img_size": True}
    vit = architecture.empty_vit(model_arguments(base | given, where))
    sides = {"img_size": list(vit.patch_embed.img_size), "patch_size": vit.patch_embed.patch_size[0]}
    return base | given | sides, told if len(told) == 2 else None


def _from_timm(name: str, where: str) -> Found:
    """Pretrained weights by timm's name, or `local-dir:` and `hf-hub:`; fetching them is timm's business."""
    if name.startswith("local-dir:"):
        return read(name.removeprefix("local-dir:"))
    hub: dict[str, Any] = {}
    try:
        if name.startswith("hf-hub:"):
            cfg, architecture_name, given = timm.models.load_model_config_from_hf(name.removeprefix("hf-hub:"))
            hub = {"architecture": architecture_name, "model_args": given or {}, "pretrained_cfg": cfg}
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError, TypeError) as error:  # no connection is an OSError
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"{where}: timm cannot give these weights ({told}); timm.list_pretrained('vit*') has the names. Without a "
            "connection, fetch them elsewhere and give the file"
        ) from error
    hub = hub or {"architecture": name.partition(".")[0], "pretrained_cfg": dict(model.pretrained_cfg)}
    if not hasattr(model, "patch_embed") or not hasattr(model, "blocks"):
        raise UserError(f"{where} is no Vision Transformer; choose one of timm.list_pretrained('vit*')")
    hub |= {"model_args": {"img_size": list(model.patch_embed.img_size), **(hub.get("model_args") or {})}}
    file = Unwrapped(model.state_dict(), (), {})
    found = sort_keys(file, model.state_dict(), where)
    architecture.need_vit(found.backbone, where)
    arguments, normalize = _of_hub(hub, where)
    return _checked(file, found, arguments, normalize, where)
