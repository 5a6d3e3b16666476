"""Checkpoint files of strangers, read without running anything in them.

A `.pth` file is a pickle, and a pickle is a program. torch's restricted reader builds tensors and plain containers; to
these are added here the settings of argparse and the numbers of numpy, which the training files of DINO and its
descendants hold. Whatever else a file asks for is refused by name.
"""

import argparse
import pickle
import re
import struct
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from recipes.errors import UserError

# what a cut or altered file makes torch's reader raise
DAMAGED = (
    *(RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError),
    *(OverflowError, NotImplementedError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError),
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
            return load_file(path)
        packed = zipfile.is_zipfile(path)
        if packed:
            _refuse_compressed(path)
        with torch.serialization.safe_globals(ALLOWED):
            # a training file is mostly optimiser state: mapped, that part is never read
            return torch.load(path, map_location="cpu", mmap=packed, weights_only=True)
    except UserError:  # a ValueError, too
        raise
    except SafetensorError as error:
        raise UserError(f"{path} is no intact safetensors file ({error}); fetch it again") from error
    except DAMAGED as error:
        raise UserError(_explained(path, error)) from error


def _refuse_compressed(path: Path) -> None:
    """torch stores without compression; what is compressed may be far larger than the file."""
    with zipfile.ZipFile(path) as archive:
        squeezed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if squeezed:
        raise UserError(f"{path} is a compressed archive ({squeezed[0]}); a checkpoint of torch is not: it is refused")


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
        if not isinstance(value, Tensor):
            raise UserError(f"{where}: {key} is a {type(value).__name__}, not a tensor; this is no state dict")
        dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        # an expanded view of a few bytes may claim any size
        if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"{where}: {key} of shape {tuple(value.shape)} is no plain tensor; the file is refused")
    return dict(state)
