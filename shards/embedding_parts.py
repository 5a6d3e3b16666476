"""An embedding table under way: every chunk of rows is a file of its own beside the table.

Any number of processes write parts, each the whole file or nothing, so a kill costs the chunks that were being
computed and the same command goes on. What is joined in the end depends on the rows alone.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recipes.errors import UserError
from recipes.record import write_json
from shards.embeddings import FORMAT_VERSION, TABLE, Keys, read_array, read_facts, write_array, write_table

STAMP = "parts.json"
UNTOLD = ("ckpt",)  # facts that may differ when a run goes on: the same weights may lie somewhere else


def _compared(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in UNTOLD}


def _refuse_other(path: Path, old: dict[str, Any], new: dict[str, Any], way_out: str) -> None:
    before, after = _compared(old), _compared(new)
    for name in dict.fromkeys([*after, *before]):
        if before.get(name) != after.get(name):
            raise UserError(f"{path} was made with {name} {before.get(name)}, now it is {after.get(name)}; {way_out}")


class Parts:
    """The parts of the table `out`, in the folder `<out>.parts`."""

    def __init__(self, out: Path | str, rows: int, chunk: int, dtype: str, facts: dict[str, Any]):
        """rows: of the table. chunk: rows a part. dtype: float32 or float16, on disk. facts: what the table is made
        from, JSON-able; a table or parts of other facts are refused."""
        self.out, self.rows, self.chunk, self.dtype = Path(out), rows, chunk, dtype
        self.facts = json.loads(json.dumps(facts))  # as they will be read again: tuples are lists
        self.folder = self.out.with_name(f"{self.out.name}.parts")
        self.numbers = range(-(-rows // chunk))

    def complete(self) -> bool:
        """Whether the table is there already; UserError if there is another one or something else."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        if not (self.out / TABLE).is_file():
            if self.folder.is_dir() and self.out.is_dir():
                return False  # a joining that was cut off
            raise UserError(f"{self.out} exists already and is no embedding table; choose another --out or delete it")
        table = read_facts(self.out / TABLE, "embedding table")
        told = {**table["facts"], "dtype": table.get("dtype")}
        _refuse_other(self.out, told, {**self.facts, "dtype": self.dtype}, "choose another --out or delete it")
        shutil.rmtree(self.folder, ignore_errors=True)  # left when killed right after the joining
        return True

    def begin(self) -> None:
        """Make the folder, or go on with the parts that are there; UserError if they belong to another table."""
        stamp = self.folder / STAMP
        facts = {**self.facts, "rows": self.rows, "chunk": self.chunk, "dtype": self.dtype}
        if stamp.is_file():
            old = read_facts(stamp, "folder of parts")["facts"]
            _refuse_other(self.folder, old, facts, f"choose another --out or delete {self.folder}")
        elif self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise UserError(f"{self.folder} is in the way and not from an embedding run; delete it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(stamp, {"format_version": FORMAT_VERSION, "facts": facts})
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror or error}") from error

    def path(self, number: int) -> Path:
        """File of a part."""
        return self.folder / f"features-{number:06d}.npy"

    def span(self, number: int) -> range:
        """Rows of a part."""
        return range(number * self.chunk, min(self.rows, (number + 1) * self.chunk))

    def share(self, rank: int, ranks: int) -> tuple[list[int], int]:
        """The parts that process `rank` has to make, and how many rows of its share are there already."""
        own = self.numbers[rank::ranks]
        missing = [number for number in own if not self.path(number).is_file()]
        return missing, sum(len(self.span(number)) for number in set(own) - set(missing))

    def save(self, number: int, features: np.ndarray) -> None:
        """Keep the features [n, D] of a part. UserError if one is not finite."""
        assert len(features) == len(self.span(number))
        with np.errstate(over="ignore"):  # told below
            stored = features.astype(self.dtype)
        if not np.isfinite(stored).all():
            row = self.span(number)[int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0])]
            raise UserError(f"the features of row {row} are not finite; try --precision no and without --half")
        try:
            write_array(self.path(number), stored)
        except OSError as error:
            raise UserError(f"{self.path(number)} cannot be written: {error.strerror or error}") from error

    def _read(self, number: int) -> np.ndarray:
        return read_array(self.path(number), [self.dtype])

    def join(self, pids: np.ndarray, camids: np.ndarray, keys: Keys) -> None:
        """Write the table, in the memory of one part, and remove the parts. pids, camids: int64 [N]."""
        missing = [number for number in self.numbers if not self.path(number).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} parts of {self.out} are missing, first {self.path(missing[0])}; run it again"
            )
        dim = self._read(0).shape[1]

        def blocks() -> Iterator[np.ndarray]:
            for number in self.numbers:
                block = self._read(number)
                if block.shape != (len(self.span(number)), dim):
                    raise UserError(f"{self.path(number)} has shape {block.shape}; delete it and run it again")
                yield block

        write_table(self.out, blocks(), (self.rows, dim), (pids, camids), keys, self.facts, self.dtype)
        shutil.rmtree(self.folder)
