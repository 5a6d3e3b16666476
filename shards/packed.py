"""One split of a packed set: its rows in the index, its bytes in the tars, both read by `pread` where they lie.

Nothing of the index is held in memory, so four million samples cost the processes of a node nothing but the page cache
that they share.
"""

import os
import stat
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import BinaryIO

import numpy as np

from recipes.errors import UserError
from shards import arrays, index, remote
from shards.cache import ShardCache
from shards.manifests import tar_place
from shards.raw.split_files import SAMPLE_LIMIT
from shards.schema import BadSample, Manifest, Sample, index_name

CODES = {"<u4": "I", "<u8": "Q", "<i4": "i", "<i8": "q"}  # numpy's name of a type -> that of struct
ROW = struct.Struct("<" + "".join(CODES[code] for _, code in index.FIELDS))  # a row of the index up to its key
OPEN_FILES = 256  # tars that a reader holds open at a time; an epoch reads from 192 lanes in turn
OPEN_REMOTE = 8  # the same for a set that is fetched: an open tar cannot leave the cache, and opening it again is cheap


def _read_header(file: BinaryIO, path: str) -> tuple[np.dtype, int]:
    """Type of the rows of an index (.npy), and the byte where they begin."""
    try:
        header = arrays.read_header(file)
    except ValueError as error:
        raise UserError(f"index {path} is damaged ({error}); build the set again") from error
    if len(header.shape) != 1 or not index.is_row_type(header.dtype):
        raise UserError(f"index {path} does not hold the fields of a sample index; build the set again")
    return header.dtype, header.start


class PackedSplit:
    """The samples of one split in the order of its index.

    shard_sizes: int64 [S], samples of each tar. `split[row]` is a Sample; BadSample if its bytes are not those that
    were packed.
    """

    def __init__(self, folder: str, manifest: Manifest, split: str, cache: ShardCache | None, captions: bool):
        self.most_open = OPEN_REMOTE if cache else OPEN_FILES
        count = manifest.splits[split]
        entries = [entry for entry in manifest.shards if entry.split == split]
        self.cache, self.captions, self.length = cache, captions, count.images
        self.tars = [(tar_place(folder, entry.name), entry.size, entry.crc32) for entry in entries]
        self.index = (f"{folder}/{index_name(split)}", count.index_size, count.index_crc32)
        self.shard_sizes = np.array([entry.samples for entry in entries], dtype=np.int64)
        if int(self.shard_sizes.sum()) != self.length:
            raise UserError(f"the manifest of {folder} counts different samples in its tars and its splits; pack again")
        self.layout, self.start = self._read_layout()
        self.width = self.layout.itemsize
        self._reset()

    def _reset(self) -> None:
        """Nothing is open: the state of a fresh process."""
        self.files: OrderedDict[int, int] = OrderedDict()  # tar number -> file descriptor
        self.lock = threading.Lock()
        self.rows = -1  # descriptor of the index
        self.unpack = struct.Struct(f"{ROW.format}{self.width - ROW.size}s").unpack

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("files", "lock", "rows", "unpack")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return self.length

    def share_files(self, fraction: float) -> None:
        """Hold only this share of the tars open that a reader may, because it reads other splits too."""
        self.most_open = max(1, int(self.most_open * fraction))

    def _let_go(self) -> bool:
        """Close the tar that was not read for longest, so that the cache may drop it; False if none is open."""
        if not self.files:
            return False
        os.close(self.files.popitem(last=False)[1])
        return True

    def _open(self, place: tuple[str, int, int], let_go: Callable[[], bool] | None = None) -> int:
        """Descriptor of a file of the set, which may have to be fetched. let_go: called when the cache needs room."""
        path, size, crc = place
        if remote.is_remote(path):
            assert self.cache is not None, "a remote set has a cache"
            return self.cache.open(path, size, crc, let_go)
        what = "index" if path.endswith(".npy") else "shard"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for ever
        except OSError as error:
            raise UserError(f"cannot open {what} {path}: {error.strerror}; fetch it or pack the set again") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(f"{what} {path} is no file; fetch it or pack the set again")
        return descriptor

    def _read_layout(self) -> tuple[np.dtype, int]:
        """Type of an index row, and the byte where the rows begin."""
        path = self.index[0]
        with os.fdopen(self._open(self.index), "rb") as file:
            rows, start = _read_header(file, path)
            if os.fstat(file.fileno()).st_size != start + rows.itemsize * self.length:
                raise UserError(f"index {path} does not hold the {self.length} samples of the manifest; pack again")
        return rows, start

    def column(self, name: str) -> np.ndarray:
        """One field of all rows."""
        with os.fdopen(self._open(self.index), "rb") as file:
            rows = np.memmap(file, self.layout, "r", self.start, (self.length,))
            return np.array(rows[name])

    def __getitem__(self, row: int) -> Sample:
        if self.rows < 0:
            self.rows = self._open(self.index)
        entry = os.pread(self.rows, self.width, self.start + row * self.width)
        tar, offset, length, crc, meta_offset, meta_length, meta_crc, pid, camid, name = self.unpack(entry)
        key = name.rstrip(b"\0").decode("utf-8", "surrogateescape")
        captions: tuple[str, ...] = ()
        if self.captions and meta_length:
            data = self._read(tar, meta_offset, meta_length, meta_crc, key, index.META_LIMIT)
            captions = index.read_meta(data, key)[2]
        return Sample(key, self._read(tar, offset, length, crc, key), pid, camid, captions)

    def _read(self, tar: int, offset: int, length: int, crc: int, key: str, most: int = SAMPLE_LIMIT) -> bytes:
        if tar >= len(self.tars) or offset + length > self.tars[tar][1] or length > most:
            raise BadSample(
                f"the index {self.index[0]} places sample {key!r} outside of the tars, or has more than {most:,} bytes "
                "for it; fetch the index again, or pack the set again"
            )
        with self.lock:  # another thread may close the descriptor between look-up and read
            descriptor = self.files.pop(tar, None)
            if descriptor is None:
                descriptor = self._open(self.tars[tar], self._let_go)
            self.files[tar] = descriptor
            if len(self.files) > self.most_open:
                self._let_go()
            try:
                data = os.pread(descriptor, length, offset)
            except OSError as error:
                raise BadSample(f"sample {key!r} in {self.tars[tar][0]} cannot be read ({error.strerror})") from error
        if zlib.crc32(data) != crc:
            raise BadSample(f"sample {key!r} in {self.tars[tar][0]} is damaged: its bytes do not match the index")
        return data

    def ahead(self, tars: Iterable[int]) -> None:
        """These tars will be read soon."""
        if self.cache is not None:
            self.cache.ahead(place for tar in tars if remote.is_remote((place := self.tars[tar])[0]))

    def close(self) -> None:
        """Close what is open."""
        while self.files:
            os.close(self.files.popitem()[1])
        if self.rows >= 0:
            os.close(self.rows)
            self.rows = -1
