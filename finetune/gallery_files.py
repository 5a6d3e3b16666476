"""The files of a gallery: one generation at a time, replaced as a whole.

    GALLERY/gallery.json            which model, which index, how many images; names the generation that counts
    GALLERY/generation-<n>/         index.faiss, ids.npy, keys.npy, sources.npy, pids.npy, camids.npy; vectors.f32 where
                                    the index itself does not hold the vectors

Every change writes a new generation, then replaces gallery.json, then removes the old generation: a reader, or a kill
at any moment, meets the old gallery or the new one.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finetune.vector_index import VectorIndex
from recipes import locks
from recipes.errors import UserError, disk_sentence
from recipes.record import write_json
from shards.embeddings import Keys, read_array, read_facts, write_array

FACTS, INDEX, VECTORS, LOCK = "gallery.json", "index.faiss", "vectors.f32", ".lock"
FORMAT_VERSION = 1
COLUMNS = {"ids": np.int64, "sources": np.int64, "pids": np.int64, "camids": np.int64}


class Columns:
    """What is known about each image. sources: int64 [N], place in the gallery's list of sources."""

    def __init__(self, ids: np.ndarray, sources: np.ndarray, pids: np.ndarray, camids: np.ndarray, keys: Keys):
        self.ids, self.sources, self.pids, self.camids, self.keys = ids, sources, pids, camids, keys

    @classmethod
    def empty(cls) -> "Columns":
        """Of no images."""
        return cls(*(np.zeros(0, dtype) for dtype in COLUMNS.values()), Keys([]))

    def __getitem__(self, rows: np.ndarray) -> "Columns":
        return Columns(*(getattr(self, name)[rows] for name in COLUMNS), self.keys[rows])

    def __add__(self, other: "Columns") -> "Columns":
        joined = (np.concatenate([getattr(self, name), getattr(other, name)]) for name in COLUMNS)
        return Columns(*joined, Keys(np.concatenate([self.keys.names, other.keys.names])))

    def save(self, folder: Path) -> None:
        """One file a column."""
        for name in COLUMNS:
            write_array(folder / f"{name}.npy", getattr(self, name))
        write_array(folder / "keys.npy", self.keys.names)

    @classmethod
    def load(cls, folder: Path, images: int) -> "Columns":
        """What `save` wrote; UserError where it is missing, damaged or not of so many images."""
        columns = [read_array(folder / f"{name}.npy", [dtype]) for name, dtype in COLUMNS.items()]
        keys = read_array(folder / "keys.npy", [bytes])
        if {len(column) for column in (*columns, keys)} != {images}:
            raise UserError(
                f"the files in {folder} do not hold the {images} images of {FACTS}; build the gallery again"
            )
        return cls(*columns, Keys(keys))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Nobody else changes the gallery meanwhile; UserError if somebody does, or the disk does not take it.

    Where the change fails, nothing stays of it: on a full disk that is the room that is missing.
    """
    try:
        with locks.holding(folder / LOCK, f"another process is changing the gallery {folder}", "wait for it"):
            try:
                yield
            except Exception:  # what an interruption leaves goes with the next change, as after a kill
                _tidy(folder)
                raise
    except OSError as error:
        told = disk_sentence(error) or error
        raise UserError(f"gallery {folder} cannot be written, what was there before is as it was: {told}") from error


def _tidy(folder: Path) -> None:
    """Remove the generations that do not count."""
    try:
        counts = generation(folder, read_gallery(folder)["generation"])
    except UserError as error:
        if (folder / FACTS).exists():  # damaged: which one counts is not known
            print(f"warning: {error}", file=sys.stderr)
            return
        counts = None
    for path in folder.glob("generation-*"):
        if path != counts:
            shutil.rmtree(path, ignore_errors=True)


def mapped(path: Path, rows: int, dim: int) -> np.ndarray:
    """Float32 [rows, dim] of a file, mapped; UserError where it has another size."""
    size = path.stat().st_size if path.is_file() else -1
    if size != rows * dim * 4:
        raise UserError(f"{path} does not hold {rows} vectors of {dim} numbers; build the gallery again")
    return np.memmap(path, np.float32, "r", shape=(rows, dim)) if rows else np.zeros((0, dim), np.float32)


def generation(folder: Path, number: int) -> Path:
    """Folder of a generation."""
    return folder / f"generation-{number:06d}"


def read_gallery(folder: Path) -> dict[str, Any]:
    """gallery.json; UserError where there is none or it is of another version."""
    return read_facts(folder / FACTS, "gallery")["facts"]


def fresh(folder: Path, number: int) -> Path:
    """An empty folder for a generation."""
    draft = generation(folder, number)
    shutil.rmtree(draft, ignore_errors=True)  # left by a kill
    draft.mkdir()
    return draft


def load(folder: Path) -> tuple[dict[str, Any], Columns, VectorIndex]:
    """gallery.json and what it names."""
    while True:
        facts = read_gallery(folder)
        here = generation(folder, facts["generation"])
        try:
            columns = Columns.load(here, facts["images"])
            stored = mapped(here / VECTORS, facts["images"], facts["dim"]) if facts["vectors"] else None
            return (
                facts,
                columns,
                VectorIndex.load(here / INDEX, facts["factory"], columns.ids, stored, facts["nprobe"]),
            )
        except UserError:
            if read_gallery(folder)["generation"] == facts["generation"]:
                raise
            # somebody replaced the generation while it was being read


def commit(folder: Path, facts: dict[str, Any], columns: Columns, index: VectorIndex) -> dict[str, Any]:
    """Make the next generation, whose vectors are written already, the one that counts; returns the new facts."""
    facts = facts | {"generation": facts["generation"] + 1, "images": len(columns.ids), "nprobe": index.nprobe,
                     "vectors": not index.exact}  # fmt: skip
    draft = generation(folder, facts["generation"])
    try:
        columns.save(draft)
        index.save(draft / INDEX)
        if index.exact:
            (draft / VECTORS).unlink(missing_ok=True)
        for path in (*draft.iterdir(), draft):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        write_json(folder / FACTS, {"format_version": FORMAT_VERSION, "facts": facts})
    except RuntimeError as error:  # of faiss, on a full disk for example
        raise UserError(f"gallery {folder} cannot be written, what was there before is as it was: {error}") from error
    for old in folder.glob("generation-*"):
        if old != draft:
            shutil.rmtree(old, ignore_errors=True)
    return facts
