"""The table of embeddings on disk: one feature a row, with identity, camera and key of its image.

A table is a folder of `features.npy`, `pids.npy`, `camids.npy` and `keys.json`. `keys.json` is removed first and
written last, so a folder that has it is complete: a save that was killed is noticed by `load`, never read as half old,
half new.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from recipes.errors import UserError

KEYS = "keys.json"
ARRAYS = {"features": np.float32, "pids": np.int64, "camids": np.int64}  # name -> type on disk and in memory


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write under a temporary name in the same folder, then rename, so `path` never holds half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _array(path: Path, dtype: type) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"embedding table {path.parent} lacks {path.name}; write the table again") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a readable .npy file ({error}); write the table again") from error
    if array.dtype != dtype:
        raise UserError(f"{path} holds {array.dtype}, expected {np.dtype(dtype)}; write the table again")
    return array


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """Rows of one split in the order of its index."""

    features: np.ndarray  # float32 [N, D]; inner products of rows are the scores
    pids: np.ndarray  # int64 [N]; > 0 identity, 0 distractor, -1 junk, UNKNOWN no label
    camids: np.ndarray  # int64 [N]; 0-based camera, UNKNOWN no label
    keys: list[str]  # N keys of the samples

    def __post_init__(self) -> None:
        for name, dtype in ARRAYS.items():
            array = getattr(self, name)
            assert array.dtype == dtype, f"{name} must be {np.dtype(dtype)}, not {array.dtype}"
        rows = len(self.keys)
        assert self.features.ndim == 2
        assert len(self.features) == rows, f"features {self.features.shape}, {rows} keys"
        assert self.pids.shape == self.camids.shape == (rows,), f"{self.pids.shape}, {self.camids.shape}, {rows} keys"

    def __len__(self) -> int:
        return len(self.keys)

    def save(self, folder: Path | str) -> None:
        """Write the table into `folder` (made where missing); a table that is already there is replaced."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / KEYS).unlink(missing_ok=True)
            for name in ARRAYS:
                array = np.ascontiguousarray(getattr(self, name))
                _write(folder / f"{name}.npy", lambda file, array=array: np.save(file, array, allow_pickle=False))
            _write(folder / KEYS, lambda file: file.write(json.dumps(list(self.keys)).encode()))
        except OSError as error:
            raise UserError(f"embedding table {folder} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, folder: Path | str) -> "EmbeddingTable":
        """Read the table in `folder`; UserError where it is missing, incomplete or its parts do not fit together."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"embedding table {folder} does not exist; it must be a folder written by an embedding run")
        try:
            keys = json.loads((folder / KEYS).read_bytes())
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} has no {KEYS}: it is no embedding table, or its writing was cut off; write it again"
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / KEYS} is not readable JSON ({error}); write the table again") from error
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise UserError(f"{folder / KEYS} must be a list of strings; write the table again")
        arrays = {name: _array(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
        for name, array in arrays.items():
            if array.ndim != (2 if name == "features" else 1) or len(array) != len(keys):
                raise UserError(
                    f"{folder / name}.npy has shape {array.shape}, but {KEYS} lists {len(keys)} rows; "
                    "write the table again"
                )
        return cls(keys=keys, **arrays)
