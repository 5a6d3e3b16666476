"""The table of embeddings on disk: one feature a row, with identity, camera and key of its image.

A table is a folder of `features.npy`, `pids.npy`, `camids.npy`, `keys.npy` (bytes of one width) and `table.json`, which
is removed first and written last, so a folder that has it is complete: a save that was killed is noticed by `load`,
never read as half old, half new. Rows may be as many as LUPerson has: blocks are written as they come, and features can
be mapped instead of read.
"""

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from recipes import plain_json
from recipes.errors import UserError, naming
from recipes.whole import plain
from shards import arrays

TABLE = "table.json"
FORMAT_VERSION = 1
LABELS = {"pids": np.int64, "camids": np.int64}  # name -> type on disk and in memory
FEATURES = ("float32", "float16")  # what features may be


class Keys(Sequence[str]):
    """Keys of samples: bytes of one width in memory, strings to whoever asks for one.

    names: bytes [N], UTF-8.
    """

    def __init__(self, keys: Iterable[str] | np.ndarray):
        if isinstance(keys, Keys):
            self.names = keys.names
        elif isinstance(keys, np.ndarray) and keys.dtype.kind == "S":
            self.names = keys
        else:
            self.names = np.array([key.encode("utf-8", "surrogateescape") for key in keys] or np.zeros(0, "S1"), "S")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row):  # int -> str, slice or array of rows -> Keys
        found = self.names[row]
        return Keys(found) if isinstance(found, np.ndarray) else found.decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (name.decode("utf-8", "surrogateescape") for name in self.names)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Keys):
            return np.array_equal(self.names, other.names)
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"Keys({list(self[:3])}{'...' if len(self) > 3 else ''}, {len(self)} in all)"


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write under a temporary name in the same folder, then rename, so `path` never holds half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """Save one array as .npy, completely or not at all."""
    _write(path, lambda file: np.save(file, np.ascontiguousarray(array), allow_pickle=False))


def read_array(path: Path, dtypes: Sequence[Any], mapped: bool = False) -> np.ndarray:
    """An array of one of the types, or of kind "S" for `bytes`. UserError if it is missing, damaged or of another."""
    try:
        with open(path, "rb") as file:
            found = arrays.check_size(file).dtype
        if not any(found.kind == "S" if dtype is bytes else found == dtype for dtype in dtypes):
            expected = " or ".join("bytes" if dtype is bytes else str(np.dtype(dtype)) for dtype in dtypes)
            raise UserError(f"{path} holds {found}, expected {expected}; write it again")
        return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except UserError:  # a ValueError, too
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} lacks {path.name}; write it again") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable .npy file ({error}); write it again") from error


def read_facts(path: Path, what: str) -> dict[str, Any]:
    """The JSON object that is written last into a folder. what: says what the folder should be."""
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"{what} {folder} does not exist")
    try:
        tree = plain_json.parse(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no {path.name}: it is no {what}, or its writing was cut off; write it again"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); write the {what} again") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("facts"), dict):
        raise UserError(f"{path} must hold an object with `facts`; write the {what} again")
    if tree.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {tree.get('format_version')}, this version reads {FORMAT_VERSION}; "
            f"write the {what} again"
        )
    return tree


def write_table(
    folder: Path | str,
    blocks: Iterable[np.ndarray],
    shape: tuple[int, int],
    labels: tuple[np.ndarray, np.ndarray],
    keys: Keys,
    facts: dict[str, Any],
    dtype: str = "float32",
) -> None:
    """Write a table block by block, in the memory of one block; a table that is already there is replaced.

    blocks: features [n, D] in the order of the rows, together of `shape` [N, D]. labels: pids and camids, int64 [N].
    dtype: float32 or float16. facts: what the table was made from, JSON-able.
    """
    folder = Path(folder)
    assert dtype in FEATURES, dtype

    def features(file: BinaryIO) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        rows = 0
        for block in blocks:
            assert block.shape == (len(block), shape[1]), f"a block of {block.shape} for {shape}"
            file.write(np.ascontiguousarray(block, dtype).data)
            rows += len(block)
        assert rows == shape[0], f"{rows} rows for {shape}"

    table = {"format_version": FORMAT_VERSION, "rows": shape[0], "dim": shape[1], "dtype": dtype, "facts": facts}
    columns = {**dict(zip(LABELS, labels, strict=True)), "keys": keys.names}
    drafts = {"features.npy": features} | {
        f"{name}.npy": functools.partial(np.save, arr=np.ascontiguousarray(column), allow_pickle=False)
        for name, column in columns.items()
    }
    drafts[TABLE] = lambda file: file.write(json.dumps(plain(table), indent=2, allow_nan=False).encode() + b"\n")
    beside = {name: folder / f".{name}.{os.getpid()}.tmp" for name in drafts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, write in drafts.items():
                with naming(folder / name), open(beside[name], "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            (folder / TABLE).unlink(missing_ok=True)
            for name, draft in beside.items():  # the table last; from here on nothing needs room on the disk
                os.replace(draft, folder / name)
        finally:
            for draft in beside.values():
                draft.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"embedding table {folder} cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """Rows of one split in the order of its index."""

    features: np.ndarray  # float32 or float16 [N, D]; inner products of rows are the scores
    pids: np.ndarray  # int64 [N]; > 0 identity, 0 distractor, -1 junk, UNKNOWN no label
    camids: np.ndarray  # int64 [N]; 0-based camera, UNKNOWN no label
    keys: Keys  # N keys of the samples; strings or an array of bytes are taken too
    facts: dict[str, Any] = field(default_factory=dict)  # what it was made from; {} where nobody told

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", Keys(self.keys))
        for name, dtype in LABELS.items():
            array = getattr(self, name)
            assert array.dtype == dtype, f"{name} must be {np.dtype(dtype)}, not {array.dtype}"
        rows = len(self.keys)
        assert self.features.ndim == 2
        assert self.features.dtype in FEATURES, f"features must be {' or '.join(FEATURES)}, not {self.features.dtype}"
        assert len(self.features) == rows, f"features {self.features.shape}, {rows} keys"
        assert self.pids.shape == self.camids.shape == (rows,), f"{self.pids.shape}, {self.camids.shape}, {rows} keys"

    def __len__(self) -> int:
        return len(self.keys)

    def save(self, folder: Path | str) -> None:
        """Write the table into `folder` (made where missing); a table that is already there is replaced."""
        shape, dtype = self.features.shape, str(self.features.dtype)
        write_table(folder, [self.features], shape, (self.pids, self.camids), self.keys, self.facts, dtype)

    @classmethod
    def load(cls, folder: Path | str, mapped: bool = False) -> "EmbeddingTable":
        """Read the table in `folder`; UserError where it is missing, incomplete or its parts do not fit together.

        mapped: features stay on disk as they are, float32 or float16, and are read where they are touched. Else they
        are float32 in memory.
        """
        folder = Path(folder)
        table = read_facts(folder / TABLE, "embedding table")
        features = read_array(folder / "features.npy", FEATURES, mapped)
        columns = {name: read_array(folder / f"{name}.npy", [dtype]) for name, dtype in LABELS.items()}
        keys = read_array(folder / "keys.npy", [bytes])
        rows = table.get("rows")
        expected = {"features": (rows, table.get("dim")), "keys": (rows,)} | dict.fromkeys(LABELS, (rows,))
        for name, array in {"features": features, "keys": keys, **columns}.items():
            if array.shape != expected[name]:
                raise UserError(
                    f"{folder / name}.npy has shape {array.shape}, but {TABLE} says {expected[name]}; "
                    "write the table again"
                )
        if not mapped:
            features = features.astype(np.float32, copy=False)
        return cls(features, columns["pids"], columns["camids"], Keys(keys), table["facts"])
