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
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain import pickled
from recipes.errors import UserError

HEADER = 8 << 20  # bytes of the header of a safetensors file; one tensor takes about 100, and its objects 1,500
DIRECTORY = 16 << 20  # bytes of the list of entries in the zip that torch writes; one a tensor, about 100 bytes each

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


def _directory_size(path: Path) -> int:
    """Bytes that the list of entries at the end of a zip claims; zipfile makes objects of all of them."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 98))  # the longest comment, and the records before it
        tail = file.read()
    end = tail.rfind(b"PK\5\6")
    large = tail[end - 76 : end - 20] if end >= 76 else b""  # the record with 64-bit numbers, where there is one
    told = large[40:48] if large.startswith(b"PK\6\6") else tail[end + 12 : end + 16]
    return int.from_bytes(told, "little")


def _check_zip(path: Path) -> None:
    """torch stores without compression, each name once; what is compressed may be far larger than the file."""
    if _directory_size(path) > DIRECTORY:
        raise UserError(f"{path} lists more entries than a checkpoint has tensors; it is refused")
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
