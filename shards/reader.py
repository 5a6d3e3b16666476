"""Samples of one or several sets by their row number: random access, one `pread` for the row and one for the bytes."""

import functools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.errors import UserError
from shards import keep_list, remote, unpacked
from shards.cache import CacheConfig, ShardCache
from shards.manifests import read_manifest
from shards.packed import PackedSplit
from shards.schema import SPLITS, Sample
from shards.unpacked import UnpackedSplit


class ShardReader:
    """The samples of the given splits of the given sets, in the order of sets, splits, shards.

    paths: each the folder or the URL of a packed set, or SOURCE:PATH for a data set in its own folder. keep: a
    keep-list (see keep_list.py); only its samples are there then. cache: where the shards of remote sets go. captions:
    also read the captions, which costs a second read a sample.
    `reader[row]` is a Sample; BadSample if its bytes are damaged. pids, camids: int64 [N], UNKNOWN where a sample has
    none. keys: bytes [N]. shard_sizes: int64 [S]. identity: tells sets and splits apart, keep-list aside. sources: what
    the sets were packed from. Raises UserError naming the folder.
    """

    def __init__(
        self,
        paths: Sequence[Path | str],
        splits: Sequence[str] | str,
        keep: Path | None = None,
        cache: CacheConfig | None = None,
        captions: bool = False,
    ):
        splits = [splits] if isinstance(splits, str) else list(splits)
        for split in splits:
            if split not in SPLITS:
                raise UserError(f"{split!r} is no split; known are {', '.join(SPLITS)}")
        self.parts: list[PackedSplit | UnpackedSplit] = []
        self.sources: list[dict[str, Any]] = []
        sets = []
        store = ShardCache(cache or CacheConfig())
        for path in map(str, paths):
            if unpacked.is_source(path):
                have, digest, sources = unpacked.splits_of(path)
                taken = [split for split in splits if split in have]
                self.parts += [UnpackedSplit(path, split) for split in taken]
            else:
                manifest = read_manifest(path)
                have, digest, sources = list(manifest.splits), manifest.packing["plan"], manifest.sources
                taken = [split for split in splits if split in have]
                held = (
                    store if remote.is_remote(path) or any(remote.is_remote(e.name) for e in manifest.shards) else None
                )
                self.parts += [PackedSplit(path, manifest, split, held, captions) for split in taken]
            if not taken:
                raise UserError(
                    f"shard set {path} holds none of the splits {', '.join(splits)}; it has {', '.join(have)}"
                )
            sets.append({"plan": digest, "splits": taken})
            self.sources += sources
        self.ends = np.cumsum([len(part) for part in self.parts]).tolist()
        self.total = self.ends[-1] if self.ends else 0
        for part in self.parts:
            part.share_files(len(part) / max(1, self.total))
        self.shard_sizes = np.concatenate([np.zeros(0, np.int64), *(part.shard_sizes for part in self.parts)])
        self.first_shard = np.cumsum([0, *(len(part.shard_sizes) for part in self.parts)]).tolist()
        self.identity = {"sets": sets, "samples": self.total}
        self.kept: np.ndarray | None = None
        if keep is not None:
            rows = keep_list.load(Path(keep), self)
            ends = np.cumsum(self.shard_sizes)
            self.shard_sizes = np.diff(np.searchsorted(rows, ends), prepend=0)
            self.kept, self.total = rows, len(rows)

    def __len__(self) -> int:
        return self.total

    def _column(self, name: str) -> np.ndarray:
        whole = np.concatenate([part.column(name) for part in self.parts])
        return whole if self.kept is None else whole[self.kept]

    @functools.cached_property
    def pids(self) -> np.ndarray:
        return self._column("pid").astype(np.int64)

    @functools.cached_property
    def camids(self) -> np.ndarray:
        return self._column("camid").astype(np.int64)

    @property
    def keys(self) -> np.ndarray:
        return self._column("key")

    def __getitem__(self, row: int) -> Sample:
        if not 0 <= row < self.total:
            raise IndexError(f"row {row} of {self.total}")
        if self.kept is not None:
            row = int(self.kept[row])
        part = bisect_right(self.ends, row)
        return self.parts[part][row - self.ends[part - 1] if part else row]

    def ahead(self, shards: Iterable[int]) -> None:
        """These shards (places in `shard_sizes`) will be read soon: fetch what is remote, in the background."""
        for shard in shards:
            part = bisect_right(self.first_shard, shard) - 1
            self.parts[part].ahead([shard - self.first_shard[part]])

    @property
    def remote(self) -> bool:
        """Whether any shard has to be fetched."""
        return any(isinstance(part, PackedSplit) and part.cache is not None for part in self.parts)

    def close(self) -> None:
        """Close the shards."""
        for part in self.parts:
            part.close()
