"""The records of a packing on disk, found by number.

A source of four million images would be gigabytes as objects. Here a record costs 29 bytes of memory; itself it lies in
a spool file, from where any process reads it by its offset.
"""

import hashlib
import os
import pickle
import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from recipes.errors import UserError
from recipes.progress import Meter
from shards.schema import SPLITS, UNKNOWN, Record

STRIDE = 10_000  # records between two looks at the clock
KEY = re.compile(r"[^./\s][^.\s]*")


def _check(record: Record) -> None:
    """Keys become file names in a tar, where the first dot ends the key."""
    if not KEY.fullmatch(record.key):
        where = record.origin or "a record"
        raise UserError(f"{where} has the key {record.key!r}; a key has no dot or white space and no '/' in front")
    if record.split not in SPLITS:
        raise UserError(
            f"{record.origin or record.key} is of split {record.split!r}; known splits are {', '.join(SPLITS)}"
        )
    if len(record.key) > 22 and len(record.key.encode("utf-8", "surrogateescape")) > 90:
        # only long ones are tried, because trying costs as much as writing
        try:
            tarfile.TarInfo(f"{record.key}.json").tobuf(tarfile.USTAR_FORMAT)
        except ValueError as error:
            raise UserError(
                f"{record.origin} has a key too long for a tar ({len(record.key)} characters); shorten it"
            ) from error


class Catalogue:
    """Records in the order in which they came.

    pids, camids: int64, int32 [N], UNKNOWN where a record has none. Numbers of records are 0..N-1.
    """

    def __init__(self, records: Iterable[Record], spool: Path, seed: int):
        """Take the records and write them to `spool`. UserError for a key that cannot stand in a tar or comes twice."""
        self.spool = spool
        offsets, places, kinds = array("q"), array("Q"), array("B")
        pids, camids = array("q"), array("i")
        salt = seed.to_bytes(16, "little")
        content, at = 0, 0
        kind_of = {split: number for number, split in enumerate(SPLITS)}
        with spool.open("wb", buffering=1 << 20) as file, Meter(None, "listing") as meter:
            for record in records:
                if len(offsets) % STRIDE == STRIDE - 1:
                    meter.advance(STRIDE)
                _check(record)
                key, split, read, pid, camid, captions, origin = (
                    *(record.key, record.split, record.read, record.pid),
                    *(record.camid, record.captions, record.origin),
                )
                name = key.encode("utf-8", "surrogateescape")
                offsets.append(at)
                places.append(int.from_bytes(hashlib.blake2b(name, digest_size=8, salt=salt).digest(), "little"))
                kinds.append(kind_of[split])
                pids.append(UNKNOWN if pid is None else pid)
                camids.append(UNKNOWN if camid is None else camid)
                told = repr((key, split, pid, camid, captions)).encode("utf-8", "backslashreplace")
                content += int.from_bytes(hashlib.blake2b(told, digest_size=32).digest(), "little")
                at += file.write(pickle.dumps((key, split, read, pid, camid, captions, origin), protocol=5))
        self.offsets = np.frombuffer(offsets, np.int64) if offsets else np.zeros(0, np.int64)
        self.pids = np.array(pids, np.int64)
        self.camids = np.array(camids, np.int32)
        self.kinds = np.array(kinds, np.uint8)
        # a sum, so that the same records in another order have the same digest
        self.digest = f"{len(offsets)}-{content % 2**256:064x}"
        self._order = self._sorted(np.frombuffer(places, np.uint64) if places else np.zeros(0, np.uint64))

    def __len__(self) -> int:
        return len(self.offsets)

    def _sorted(self, places: np.ndarray) -> np.ndarray:
        """Numbers of all records by the hash of their key; the same for any order in which they came."""
        order = np.argsort(places, kind="stable")
        ranked = places[order]
        for i in np.flatnonzero(ranked[1:] == ranked[:-1]):
            first, second = read_records(self.spool, self.offsets[order[i : i + 2]])
            if first.key == second.key:
                names = [record.origin or "a record" for record in (first, second)]
                raise UserError(
                    f"{' and '.join(sorted(names))} have the same key {first.key!r}; rename one of them "
                    "(of a folder, where only the suffix tells them apart: source.keep_suffix=true; of archives: "
                    "source.keys=path)"
                )
            if first.key > second.key:  # two keys of one hash, about once in four million sets of LUPerson's size
                order[[i, i + 1]] = order[[i + 1, i]]
        return order

    def shuffled(self, split: str) -> np.ndarray:
        """Numbers of the records of a split, int64, in an order that depends on the seed and the keys only."""
        return self._order[self.kinds[self._order] == SPLITS.index(split)]

    def counts(self) -> dict[str, int]:
        """Records of each split that has any."""
        found = np.bincount(self.kinds, minlength=len(SPLITS))
        return {split: int(count) for split, count in zip(SPLITS, found, strict=True) if count}


def read_records(spool: Path | str, offsets: Sequence[int] | np.ndarray) -> Iterator[Record]:
    """The records at these places of a spool.

    The spool is a scratch file of the packing that reads it; never give one that came from somewhere else: it holds
    pickled functions.
    """
    descriptor = os.open(spool, os.O_RDONLY)
    with os.fdopen(descriptor, "rb", buffering=4096) as file:
        for offset in offsets:
            file.seek(int(offset))
            yield Record(*pickle.load(file))
