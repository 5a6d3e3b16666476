"""Checkpoint files of strangers, read without running anything in them.

A `.pth` file is a pickle, and a pickle is a program. torch's restricted reader builds tensors and plain containers; to
these are added here the settings of argparse and the numbers of numpy, which the training files of DINO and its
descendants hold. Whatever else a file asks for is refused by name. What makes a short file take gigabytes, or end the
process, is refused before it is read (pickled.py).
"""

import argparse
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain import pickled
from recipes.errors import UserError
from shards.raw import zips

HEADER = 8 << 20  # bytes of the header of a safetensors file; one tensor takes about 100, and its objects 1,500
ENTRIES = 200_000  # of the zip that torch writes: one a tensor

# what a cut or altered file makes torch's reader raise
DAMAGED = (
    *(RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError),
    *(OverflowError, NotImplementedError, MemoryError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError),
)


class NumberType:
    """Stands in for numpy.dtype in a pickle: the types of plain numbers only."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"[<>=|]?[fiub][1248]", code):
            raise pickle.UnpicklingError(f"numpy type {code!r} is no plain number")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        """state: numpy's, whose second entry is the byte order."""
        order = state[1] if state[1] in ("<", ">") else ""
        self.code = order + self.code.lstrip("<>=|")


def number(kind: NumberType, data: bytes) -> float | int | bool:
    """Stands in for numpy's way to rebuild a scalar: a plain Python number."""
    return np.frombuffer(data, np.dtype(kind.code), 1)[0].item()


def path_text(*parts: str) -> str:
    """Stands in for pathlib: a path in the settings of a run stays text."""
    return str(PurePosixPath(*parts))


ALLOWED = [
    argparse.Namespace,
    (NumberType, "numpy.dtype"),
    *((number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((path_text, f"pathlib{part}.PosixPath") for part in ("", "._local")),
]


def read(path: Path) -> Any:
    """Content of a `.safetensors` or torch file. Tensors may still lie in the file: copy what is to be kept.

    Raises UserError for a file that is damaged or that wants more than data.
    """
    try:
        if path.suffix == ".safetensors":
            check_header(path)
            return load_file(path)
        packed = zipfile.is_zipfile(path)
        if packed:
            _check_zip(path)
        else:
            _check_old(path)
        with torch.serialization.safe_globals(ALLOWED):
            # a training file is mostly optimiser state: mapped, that part is never read
            return torch.load(path, map_location="cpu", mmap=packed, weights_only=True)
    except UserError:  # a ValueError, too
        raise
    except SafetensorError as error:
        raise UserError(f"{path} is no intact safetensors file ({error}); fetch it again") from error
    except DAMAGED as error:
        raise UserError(_explained(path, error)) from error


def check_header(path: Path) -> None:
    """Raise UserError if a safetensors file has a header that no model needs: its objects may take all memory."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > HEADER:
        raise UserError(
            f"{path} is no intact safetensors file (its header claims {length:,} bytes; {HEADER:,} are allowed)"
        )


def _check_zip(path: Path) -> None:
    """torch stores without compression, each name once; what is compressed may be far larger than the file."""
    if zips.count_entries(str(path)) > ENTRIES:
        raise UserError(f"{path} holds more than {ENTRIES:,} entries; no checkpoint has so many tensors: it is refused")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        squeezed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        if squeezed:
            raise UserError(
                f"{path} is a compressed archive ({squeezed[0]}); a checkpoint of torch is not: it is refused"
            )
        if len({entry.filename for entry in entries}) < len(entries):
            raise UserError(f"{path} holds two entries of one name; a checkpoint of torch does not: it is refused")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                if entry.file_size > pickled.LONGEST:
                    raise UserError(f"{path}: {entry.filename} has {entry.file_size:,} bytes; it is refused")
                pickled.check(archive.read(entry), 1, path)


def _check_old(path: Path) -> None:
    """Before torch 1.6: five pickles, then the tensors."""
    with path.open("rb") as file:
        pickled.check(file.read(pickled.LONGEST), 5, path)


def _explained(path: Path, error: BaseException) -> str:
    """Why a file cannot be read, for its user."""
    text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]  # without torch's advice to trust it
    wanted = re.search(r"GLOBAL ([\w.]+)", text)
    if wanted:
        return (
            f"{path} wants to call {wanted[1]}: such a file can run any program, so it is refused. If you trust it, "
            "load it where it was made, and save only its state dict: torch.save(model.state_dict(), FILE)"
        )
    return f"{path} cannot be read as a checkpoint ({type(error).__name__}: {text[:200]}); fetch it again"


def tensors_of(state: Any, where: str) -> dict[str, Tensor]:
    """The state dict, checked: text keys and dense tensors on the host that are no larger than their memory.

    Raises UserError naming the first other entry.
    """
    for key, value in state.items():
        if not isinstance(key, str):
            raise UserError(f"{where}: the key {key!r} is no name of a parameter")
        if type(value) not in (Tensor, nn.Parameter):
            raise UserError(f"{where}: {key} is a {type(value).__name__}, not a tensor; this is no state dict")
        dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        # an expanded view of a few bytes may claim any size
        if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{where}: {key} of shape {tuple(value.shape)} is no plain tensor; the file is refused")
    return dict(state)


# keyword arguments of timm.create_model that are about files, the network and devices, and not about the network's form
FACTORY = {
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir"),
    *("scriptable", "exportable", "no_jit", "device", "dtype", "features_only", "kwargs_filter"),
}
MOST = {"depth": 256}  # blocks
NUMBER, TEXT = 1 << 16, re.compile(r"[A-Za-z0-9_.]{0,80}")
SPARE = 20_000_000  # numbers that a model may have beyond those of its file: a head that is not stored


def model_arguments(found: Any, where: str) -> dict[str, Any]:
    """What a config.json tells about a model, checked: timm's name of it and plain numbers and words.

    UserError for anything else, such as the path of another file, which timm would read.
    """
    if not isinstance(found, dict) or not isinstance(found.get("model_name"), str):
        raise UserError(f"{where}: its config.json does not tell the timm arguments of the model; export it again")
    for name, value in found.items():
        if name in FACTORY or not TEXT.fullmatch(name) or not _plain(value, MOST.get(name, NUMBER)):
            raise UserError(
                f"{where}: its config.json asks timm for {name[:80]} = {repr(value)[:80]}, which is no number or word "
                "that describes a model; it is refused"
            )
    return found


def _plain(value: Any, most: int) -> bool:
    if isinstance(value, list):
        return len(value) <= 64 and all(_plain(part, most) and not isinstance(part, list) for part in value)
    if isinstance(value, str):
        return TEXT.fullmatch(value) is not None
    return value is None or (isinstance(value, int | float) and abs(value) <= most)


def check_amount(build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError unless `build` makes a model about as large as its weights, before any memory is taken for it."""
    try:
        with torch.device("meta"):
            wanted = sum(value.numel() for value in build().state_dict().values())
    except UserError:  # a ValueError, too
        raise
    except (*DAMAGED, ArithmeticError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: timm cannot build what its config.json describes ({told})") from error
    there = sum(value.numel() for value in tensors.values())
    if wanted > 2 * there + SPARE:
        raise UserError(
            f"{where}: its config.json describes a model of {wanted:,} numbers, its weights hold {there:,}; it is refused"
        )
