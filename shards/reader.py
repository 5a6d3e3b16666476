"""Samples of one or several shard sets by their row number: random access through the index, one `pread` a sample."""

import functools
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from recipes.errors import UserError
from shards import index
from shards.schema import FORMAT_VERSION, MANIFEST, SPLITS, Manifest, Sample, index_name

OPEN_FILES = 64  # shards held open at a time by one process


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a shard set. Raises UserError when the folder is none."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        what = "does not exist" if not Path(folder).exists() else f"is no shard set (it holds no {MANIFEST})"
        raise UserError(f"shard set {folder} {what}; pack one with `python shards/build.py SOURCE:PATH --out {folder}`")
    try:
        manifest = Manifest.model_validate_json(path.read_text())
    except (ValidationError, ValueError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); pack the set again") from error
    if manifest.format_version != FORMAT_VERSION:
        found = manifest.format_version
        raise UserError(f"{path} has format {found}, this version reads {FORMAT_VERSION}; pack the set again")
    return manifest


class ShardReader:
    """The samples of the given splits of the given sets, in the order of sets, splits, shards.

    `reader[row]` is a Sample. pids, camids: int64 [N], UNKNOWN where a sample has none. shard_sizes: int64 [S].
    Raises UserError naming the folder, and for a sample whose bytes do not have the crc of the index, the shard.
    """

    def __init__(self, paths: Sequence[Path | str], splits: Sequence[str] | str):
        splits = [splits] if isinstance(splits, str) else list(splits)
        for split in splits:
            if split not in SPLITS:
                raise UserError(f"{split!r} is no split; known are {', '.join(SPLITS)}")
        self.tars: list[Path] = []
        sizes: list[int] = []
        parts: list[tuple[np.ndarray, int]] = []  # rows of an index, number of its first tar
        for folder in map(Path, paths):
            manifest = read_manifest(folder)
            taken = [split for split in splits if split in manifest.splits]
            if not taken:
                have = ", ".join(manifest.splits)
                raise UserError(f"shard set {folder} holds none of the splits {', '.join(splits)}; it has {have}")
            for split in taken:
                parts.append((index.load(folder / index_name(split)), len(self.tars)))
                shards = [shard for shard in manifest.shards if shard.split == split]
                self.tars += [folder / shard.name for shard in shards]
                sizes += [shard.samples for shard in shards]
        self.parts = parts
        self.ends = np.cumsum([len(rows) for rows, _ in parts])
        self.shard_sizes = np.array(sizes, dtype=np.int64)
        if int(self.shard_sizes.sum()) != len(self):
            raise UserError(f"manifest and index of {', '.join(map(str, paths))} count different samples; pack again")
        self.files: OrderedDict[int, int] = OrderedDict()  # tar number -> file descriptor
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @functools.cached_property
    def pids(self) -> np.ndarray:
        return np.concatenate([rows["pid"] for rows, _ in self.parts]).astype(np.int64)

    @functools.cached_property
    def camids(self) -> np.ndarray:
        return np.concatenate([rows["camid"] for rows, _ in self.parts]).astype(np.int64)

    @functools.cached_property
    def keys(self) -> list[str]:
        return [key.decode() for rows, _ in self.parts for key in rows["key"]]

    def __getitem__(self, row: int) -> Sample:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = int(np.searchsorted(self.ends, row, side="right"))
        rows, first_tar = self.parts[part]
        entry = rows[row - (int(self.ends[part - 1]) if part else 0)]
        tar = first_tar + int(entry["shard"])
        key = entry["key"].decode()
        image = self._read(tar, int(entry["offset"]), int(entry["length"]))
        if zlib.crc32(image) != int(entry["crc"]):
            raise UserError(f"sample {key!r} in {self.tars[tar]} is damaged: its bytes do not match the index")
        captions: tuple[str, ...] = ()
        if entry["meta_length"]:
            meta = self._read(tar, int(entry["meta_offset"]), int(entry["meta_length"]))
            _, _, captions = index.read_meta(meta, f"{key} in {self.tars[tar]}")
        return Sample(key, image, int(entry["pid"]), int(entry["camid"]), captions)

    def _read(self, tar: int, offset: int, length: int) -> bytes:
        with self.lock:  # another thread may close the descriptor between look-up and read
            descriptor = self.files.pop(tar, None)
            if descriptor is None:
                try:
                    descriptor = os.open(self.tars[tar], os.O_RDONLY)
                except OSError as error:
                    raise UserError(f"cannot open shard {self.tars[tar]}: {error.strerror}") from error
            self.files[tar] = descriptor
            if len(self.files) > OPEN_FILES:
                os.close(self.files.popitem(last=False)[1])
            return os.pread(descriptor, length, offset)

    def close(self) -> None:
        """Close the shards."""
        while self.files:
            os.close(self.files.popitem()[1])

    def __getstate__(self) -> dict:
        # a worker opens its own descriptors
        return {**self.__dict__, "files": OrderedDict(), "lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.lock = threading.Lock()
