"""Weights of CLIP from a local file, without running anything in it.

The files that its authors publish are programs of TorchScript. Only the tensors are taken out of them: the pickle
inside is read with a reader that knows plain containers, tensors and named attributes, and the code beside it is never
looked at. Whatever else holds the same weights (a state dict of torch, safetensors) is read as any file of strangers.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain import pickled, untrusted
from pretrain.foreign_styles import bare_keys, unwrap
from recipes.errors import UserError

STORAGES = {
    f"{name}Storage": kind
    for name, kind in (("Float", torch.float32), ("Half", torch.float16), ("BFloat16", torch.bfloat16),
                       ("Double", torch.float64), ("Long", torch.int64), ("Int", torch.int32), ("Bool", torch.bool))
}  # fmt: skip
MOST_ENTRIES = 1 << 16


class Stored(NamedTuple):
    """Where the numbers of a tensor lie."""

    storage: tuple[str, torch.dtype, int]  # name in the archive, type, count
    offset: int  # numbers before the first
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Holder:
    """Stands in for a module of the program: its attributes by name."""

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


def _rebuilt(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Stored:
    return Stored(storage, offset, tuple(size), tuple(stride))


def _nothing(*_: Any) -> None:
    """Stands in for lists of numbers and the like, which are no weights."""


class _Reader(pickle.Unpickler):
    """Knows what a saved program holds, and refuses the rest."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return Holder
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")):
            return _rebuilt if name == "_rebuild_tensor_v2" else lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle":
            return _nothing
        raise pickle.UnpicklingError(f"it wants {module}.{name}")

    def persistent_load(self, told: Any) -> tuple[str, torch.dtype, int]:
        kind, dtype, key, _, count = told
        if kind != "storage" or dtype not in STORAGES.values() or not isinstance(key, str) or type(count) is not int:
            raise pickle.UnpicklingError(f"it wants {str(told)[:80]}")
        return key, dtype, count


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Stored]]:
    """The tensors below a module, with their dotted names."""
    for key, part in value.state.items():
        path = f"{name}.{key}" if name else str(key)
        if isinstance(part, Stored):
            yield path, part
        elif isinstance(part, Holder) and hasattr(part, "state"):
            yield from _tensors(part, path)


def _load(archive: zipfile.ZipFile, root: PurePosixPath, stored: Stored, name: str) -> Tensor:
    """The numbers of a tensor, in memory of their own."""
    key, dtype, count = stored.storage
    entry = archive.getinfo(str(root / "data" / key))
    last = stored.offset + sum((side - 1) * step for side, step in zip(stored.size, stored.stride, strict=True))
    fits = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == count * dtype.itemsize
    if not fits or min((stored.offset, *stored.stride, *stored.size)) < 0 or (math.prod(stored.size) and last >= count):
        raise ValueError(f"{name} is no plain tensor")
    # memory comes from the file, so a view may not claim more numbers than it has
    if math.prod(stored.size) > count:
        raise ValueError(f"{name} claims more numbers than are there")
    numbers = torch.frombuffer(bytearray(archive.read(entry)), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    return numbers.as_strided(stored.size, stored.stride, stored.offset).clone()


def _read_program(path: Path) -> dict[str, Tensor] | None:
    """The weights in a TorchScript file; None: the file is another thing."""
    with zipfile.ZipFile(path) as archive:
        entries = [PurePosixPath(entry.filename) for entry in archive.infolist()]
        program = next((entry for entry in entries if entry.name == "data.pkl"), None)
        if program is None or not any("code" in entry.parts for entry in entries):
            return None
        if len(entries) > MOST_ENTRIES or archive.getinfo(str(program)).file_size > pickled.LONGEST:
            raise ValueError("it lists more than a model has")
        data = archive.read(str(program))
        pickled.check(data, 1, path)
        whole = _Reader(io.BytesIO(data)).load()
        if not isinstance(whole, Holder) or not hasattr(whole, "state"):
            raise ValueError("it holds no module")
        return {name: _load(archive, program.parent, stored, name) for name, stored in _tensors(whole)}


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a CLIP file by the names of its authors (`visual.conv1.weight`, `token_embedding.weight`, ...).

    UserError for a file that is missing, damaged, or wants more than data.
    """
    try:
        found = _read_program(path) if zipfile.is_zipfile(path) else None
    except UserError:
        raise
    except (*untrusted.DAMAGED, RecursionError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as a saved program of torch ({told}); fetch it again") from error
    if found is not None:
        return found
    state = untrusted.tensors_of(unwrap(untrusted.read(path), str(path)).state, str(path))
    return {key: state[source] for key, source in bare_keys(state).items()}
