"""What a pretraining starts from when not from random weights: another one of ours, or a file of another project."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain import checkpoint, foreign, hub
from pretrain.backbone import Backbone
from pretrain.foreign_styles import MASK, PROJECTION
from recipes.errors import UserError

SCRATCH = "none"  # `--ckpt none`: random weights


def _copy(module: nn.Module, tensors: dict[str, Tensor], ckpt: str) -> None:
    """Load what is given; everything else of the module stays. Both must know every key and shape."""
    own = module.state_dict()
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            have = tuple(own[name].shape) if name in own else "nothing"
            raise UserError(
                f"--ckpt {ckpt}: {name} is {tuple(tensor.shape)} there and {have} in this recipe; "
                "its backbone and heads must be those of the checkpoint"
            )
    module.load_state_dict(own | tensors)


def start_from(ckpt: str, modules: dict[str, nn.Module]) -> str:
    """Load `ckpt` into fresh modules (student, teacher, centres) and tell in a sentence what was taken.

    ckpt: "none"; the run folder of a pretraining (then student and teacher both get the teacher of its newest sound
    checkpoint with the heads, the student also the mask embedding, and the centres go on); an exported teacher (then
    the heads stay fresh); or what foreign.py reads (then student and teacher get the backbone, and heads and centres if
    the file has those of this recipe).
    """
    if ckpt == SCRATCH:
        return "random weights"
    ckpt = hub.local(ckpt)
    if foreign.is_foreign(ckpt):
        return _start_from_foreign(ckpt, modules)
    state = checkpoint.newest_sound(Path(ckpt) / "checkpoints")
    if state is None:
        backbone, _ = checkpoint.load_backbone(Path(ckpt), _arguments(modules["student"]))
        _take_backbone(backbone, modules)
        return f"the backbone of {ckpt}, fresh heads"
    tensors = checkpoint.read_state(state)[0]
    parts = {name: {} for name in ("student", "teacher", "centres")}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        if part in parts:
            parts[part][rest] = tensor
    if not modules["student"].mim:  # the checkpoint may have been trained with the MIM term, this run is without it
        parts = {
            part: {name: tensor for name, tensor in given.items() if name in modules[part].state_dict()}
            for part, given in parts.items()
        }
    masks = {name: tensor for name, tensor in parts["student"].items() if name == "backbone.mask_embedding"}
    _copy(modules["student"], parts["teacher"] | masks, ckpt)
    _copy(modules["teacher"], parts["teacher"], ckpt)
    _copy(modules["centres"], parts["centres"], ckpt)
    return f"teacher, heads and centres of {state}"


def _arguments(student: nn.Module) -> dict:
    backbone = student.backbone
    assert isinstance(backbone, Backbone)
    return backbone.arguments


def _take_backbone(backbone: Backbone, modules: dict[str, nn.Module]) -> None:
    """The same weights for student and teacher."""
    for name in ("student", "teacher"):
        modules[name].backbone.vit.load_state_dict(backbone.vit.state_dict())


def _start_from_foreign(ckpt: str, modules: dict[str, nn.Module]) -> str:
    """The backbone always, or an error; head, centres and mask embedding if they fit. The sentence tells which."""
    student, wanted = modules["student"], _arguments(modules["student"])
    found = foreign.read(ckpt, likely=checkpoint.patch_grid(wanted))
    backbone = checkpoint.build_backbone(ckpt, found.tensors, found.arguments, wanted)
    _take_backbone(backbone, modules)
    fits = {name: head_for(modules[name].head, found.head, student.mim) for name in ("student", "teacher")}
    faults = [fault for _, fault in fits.values() if fault]
    taken, fresh, used = [], [], set()
    if faults:
        fresh.append(f"heads and centres ({faults[0]})")
    else:
        for name, (tensors, _) in fits.items():
            modules[name].head.load_state_dict(tensors)
        taken, used = ["its head"], {PROJECTION}
        for kind, centring in modules["centres"].items():
            there = found.centres.get(kind)
            fits_here = there is not None and there.shape == centring.centre.shape
            if fits_here:
                centring.centre.copy_(there)
            (taken if fits_here else fresh).append(f"the centre of {kind}")
    if student.mim and found.mask is not None:
        with torch.no_grad():
            student.backbone.mask_embedding.copy_(found.mask)
        taken, used = [*taken, "its mask embedding"], {*used, MASK}
    left = {key: why for key, why in found.report.left_out.items() if why not in used}
    grid = checkpoint.patch_grid(found.arguments)
    report = replace(found.report, left_out=left).resized(grid, backbone.grid, "bilinear")
    told = f"; {', '.join(taken)}" if taken else ""
    return f"{report.sentence()}{told}" + (f"; fresh {', '.join(fresh)}" if fresh else "")


def head_for(head: nn.Module, theirs: dict[str, Tensor], mim: bool) -> tuple[dict[str, Tensor], str]:
    """The state dict of `head` from the head of DINO or iBOT, and ""; or {} and why it does not fit.

    theirs: by the names of heads.Head, {} when there is none. iBOT writes the prototypes twice where CLS and patch
    tokens share them.
    """
    own, given = head.state_dict(), dict(theirs)
    if not given:
        return {}, "the file has none"
    second = [name for name in given if name.startswith("last_layer2.")]
    if "last_layer2.weight_v" not in own:
        pairs = [(given[name], given.get(name.replace("last_layer2", "last_layer"))) for name in second]
        if mim and not all(other is not None and torch.equal(own_part, other) for own_part, other in pairs):
            return {}, "its patch tokens have prototypes of their own, which heads.shared=false would take"
        given = {name: tensor for name, tensor in given.items() if name not in second}
    for name in dict.fromkeys([*own, *given]):
        there, here = (tuple(state[name].shape) if name in state else "missing" for state in (given, own))
        if there != here:
            return {}, f"{name} is {there} there and {here} in this recipe"
    fixed = [name for name, _ in head.named_buffers() if not torch.equal(given[name], own[name].cpu())]
    if fixed:
        return {}, f"{fixed[0]} has learned lengths there, which heads.norm_last_layer=false would take"
    return given, ""
