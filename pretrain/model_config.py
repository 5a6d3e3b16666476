"""What the config.json of a model says about its network, checked before anything is built of it.

The file may come from somebody else. timm's `create_model` takes from the same arguments the form of a network and the
paths of files to read, and a network of any size can be described in a line.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pretrain.untrusted import DAMAGED
from recipes.errors import UserError

# keyword arguments of timm.create_model that are about files, the network and devices, and not about the network's form
FACTORY = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir"),
    *("scriptable", "exportable", "no_jit", "device", "dtype", "features_only", "kwargs_filter"),
}
MOST = dict.fromkeys(("depth", "depths", "layers"), 256)  # blocks
PIXELS = ("img_size", "patch_size")  # height and width; both sides
NUMBER, TEXT = 1 << 16, re.compile(r"[A-Za-z0-9_.]{0,80}")
M = TypeVar("M", bound=nn.Module)
SPARE = 20_000_000  # numbers that a model may have beyond those of its file: a head that is not stored


def model_arguments(found: Any, where: str) -> dict[str, Any]:
    """What a config.json tells about a model, checked: timm's name of it and plain numbers and words.

    UserError for anything else, such as the path of another file, which timm would read.
    """
    if not isinstance(found, dict) or not isinstance(found.get("model_name"), str):
        raise UserError(f"{where}: its config.json does not tell the timm arguments of the model; export it again")
    for name, value in found.items():
        if name in PIXELS and not _are_pixels(value, 2 if name == "img_size" else 0):
            raise UserError(f"{where}: its config.json has {name} = {repr(value)[:80]}, which are no pixels; refused")
        if name in FACTORY or not TEXT.fullmatch(name) or not _plain(value, MOST.get(name, NUMBER)):
            raise UserError(
                f"{where}: its config.json asks timm for {name[:80]} = {repr(value)[:80]}, which is no number or word "
                "that describes a model; it is refused"
            )
    return found


def _are_pixels(value: Any, sides: int) -> bool:
    numbers = value if sides else [value]
    fits = isinstance(numbers, list) and len(numbers) == max(1, sides)
    return fits and all(type(number) is int and 0 < number <= NUMBER for number in numbers)


def _plain(value: Any, most: int) -> bool:
    if isinstance(value, list):
        return len(value) <= 64 and all(_plain(part, most) and not isinstance(part, list) for part in value)
    if isinstance(value, str):
        return TEXT.fullmatch(value) is not None
    return value is None or (isinstance(value, int | float) and abs(value) <= most)


def empty_model(build: Callable[[], M], where: str, tensors: Mapping[str, Tensor] | None = None) -> M | None:
    """What `build` makes of stored arguments, without memory for its weights: shapes only.

    tensors: the weights that belong to it; a model far larger than these is refused. UserError for arguments that no
    model can be built of. None for the few networks of timm that cannot be built without memory.
    """
    try:
        with torch.device("meta"):
            model = build()
    except (*DAMAGED, ArithmeticError) as error:  # a UserError is a ValueError
        told = " ".join(str(error).split())[:300]
        if "meta tensor" in told:
            return None
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: nothing can be built of what its config.json describes ({told})") from error
    wanted = sum(value.numel() for value in model.state_dict().values())
    there = sum(value.numel() for value in (tensors or {}).values())
    if tensors is not None and wanted > 2 * there + SPARE:
        raise UserError(
            f"{where}: its config.json describes a model of {wanted:,} numbers, its weights hold {there:,}; refused"
        )
    return model
