"""Some samples of a set as records, to be packed as a set of their own."""

import os
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from recipes.errors import UserError
from shards import index
from shards.catalogue import read_records
from shards.images import BadImage
from shards.reader import ShardReader
from shards.remote import is_remote
from shards.schema import UNKNOWN, Record
from shards.unpacked import UnpackedSplit

NO_LABELS = 2  # bytes of `{}`


def read_slice(path: str, offset: int, length: int, crc: int) -> bytes:
    """Bytes of a file, which must have this crc32. Module-level, so that a record with it can go to another process."""
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), length, offset)
    if zlib.crc32(data) != crc:
        raise BadImage(f"{path} is damaged at byte {offset}: {length} bytes there do not match the index")
    return data


def _captions(path: str, row: np.void, key: str) -> tuple[str, ...]:
    offset, length = int(row["meta_offset"]), int(row["meta_length"])
    if length <= NO_LABELS:
        return ()
    return index.read_meta(read_slice(path, offset, length, int(row["meta_crc"])), key)[2]


def records(reader: ShardReader, rows: np.ndarray) -> Iterator[Record]:
    """The samples in `rows` (int64, sorted) of a reader without keep-list, as they were packed.

    UserError if the shards have to be fetched: what is packed is read where it lies.
    """
    assert reader.kept is None, "rows count the samples of the whole set"
    splits = [split for entry in reader.identity["sets"] for split in entry["splits"]]
    start = 0
    for part, split, end in zip(reader.parts, splits, reader.ends, strict=True):
        mine = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
        start = end
        if isinstance(part, UnpackedSplit):
            yield from read_records(part.spool, part.offsets[mine])
            continue
        if any(map(is_remote, [part.index[0], *(path for path, _, _ in part.tars)])):
            raise UserError(
                f"{part.index[0]} or its shards lie elsewhere; copy the set to a local folder to pack from it"
            )
        whole = index.load(part.index[0])
        for row in mine:
            found = whole[row]
            key = bytes(found["key"]).decode("utf-8", "surrogateescape")
            path = part.tars[found["shard"]][0]
            pid, camid = (None if value == UNKNOWN else value for value in (int(found["pid"]), int(found["camid"])))
            read = partial(read_slice, path, int(found["offset"]), int(found["length"]), int(found["crc"]))
            yield Record(key, split, read, pid, camid, _captions(path, found, key), f"{key} in {path}")


def described(reader: ShardReader, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the manifest of the new set says about its source: the parent and how the samples were chosen."""
    titles = dict.fromkeys(str(source.get("title", source.get("name", "?"))) for source in reader.sources)
    title = f"{' + '.join(titles)}, {facts['kept']} of {facts['of']} kept ({facts['by']})"
    return [{"name": "subset", "title": title, **facts, "parent": facts["set"], "parent_sources": reader.sources}]
