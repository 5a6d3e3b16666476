"""What a pretraining starts from when not from random weights: the teacher of another one."""

from pathlib import Path

from torch import Tensor, nn

from pretrain import checkpoint
from pretrain.backbone import Backbone
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

    ckpt: "none", the run folder of a pretraining (then student and teacher both get its teacher with the heads, the
    student also the mask embedding, and the centres go on), or an exported teacher (then the heads stay fresh).
    """
    if ckpt == SCRATCH:
        return "random weights"
    states = checkpoint.states(Path(ckpt) / "checkpoints")
    if not states:
        backbone, _ = checkpoint.load_backbone(Path(ckpt), _arguments(modules["student"]))
        for name in ("student", "teacher"):
            modules[name].backbone.vit.load_state_dict(backbone.vit.state_dict())
        return f"the backbone of {ckpt}, fresh heads"
    tensors = checkpoint.read_state(states[-1])[0]
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
    return f"teacher, heads and centres of {states[-1]}"


def _arguments(student: nn.Module) -> dict:
    backbone = student.backbone
    assert isinstance(backbone, Backbone)
    return backbone.arguments
