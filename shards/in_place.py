"""A set of tars that lie elsewhere, made by others: only the index and the manifest are written, nothing is copied.

The tars are those of webdataset or img2dataset: the members of a sample stand next to each other and share their name
up to the first dot. They may lie in several folders or behind URLs; the manifest has their absolute paths.
"""

import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from recipes.errors import UserError
from recipes.progress import Meter
from shards import index, remote
from shards.manifests import save_index
from shards.processes import spread
from shards.schema import FORMAT_VERSION, MANIFEST, SPLITS, Manifest, ShardEntry, index_name
from shards.tars import sync_folder, write_file
from shards.verification import local_copy

SKIPPED = "skipped.txt"  # beside the manifest, one sentence a sample that was left out
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class _Found(NamedTuple):
    """What a tar holds."""

    place: str  # path or URL
    size: int  # bytes
    crc32: int  # of the whole file
    rows: np.ndarray
    faults: list[str]  # sentences


def expand(places: Sequence[str]) -> list[str]:
    """Paths and URLs of tars, folders that hold some, and `{000..127}` in them -> paths and URLs of single tars.

    Those of a folder and the folders below it are in the order of their paths. UserError if there are none, or one is
    named twice.
    """
    tars: list[str] = []
    for place in itertools.chain.from_iterable(map(_numbered, places)):
        if remote.is_remote(place):
            tars.append(place)
        elif os.path.isdir(place):
            inside = sorted(str(path) for path in Path(place).rglob("*.tar") if path.is_file())
            if not inside:
                raise UserError(f"folder {place} holds no tars (*.tar)")
            tars += map(os.path.abspath, inside)
        else:
            tars.append(os.path.abspath(place))
    if not tars:
        raise UserError("no tars are given; name tars, folders that hold some, or URLs")
    seen: set[str] = set()
    for tar in tars:
        if tar in seen:
            raise UserError(f"{tar} is given twice")
        seen.add(tar)
    return tars


def _numbered(place: str) -> Iterator[str]:
    """`x{08..11}.tar` -> x08.tar, x09.tar, x10.tar, x11.tar; anything else as it is."""
    found = RANGE.search(place)
    if found is None:
        yield place
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _numbered(f"{place[: found.start()]}{number:0{len(first)}}{place[found.end() :]}")


def _inspect(place: str) -> _Found:
    """Scan one tar. Module-level for the pool."""
    with local_copy(place) as path:
        scan = index.inspect_tar(path, whole=True)
    faults = [fault.sentence.replace(str(path), place) for fault in scan.faults]
    return _Found(place, scan.size, scan.crc32, scan.rows, faults)


def _repeated(rows: np.ndarray, tars: list[str]) -> tuple[np.ndarray, list[str]]:
    """Which rows have a key that an earlier row has, bool [N], and a sentence about each."""
    order = np.argsort(rows["key"], kind="stable")
    keys = rows["key"][order]
    sentences, again = [], np.zeros(len(rows), dtype=bool)
    for place in np.flatnonzero(keys[1:] == keys[:-1]) + 1:
        first, second = (tars[int(rows["shard"][order[number]])] for number in (place - 1, place))
        sentences.append(f"{first} and {second} both hold the key {keys[place].decode('utf-8', 'backslashreplace')}")
        again[order[place]] = True
    return again, sentences


def _digest(entries: list[ShardEntry], rows: np.ndarray) -> str:
    """sha256 over names, sizes and crc32 of the tars and all keys."""
    content = hashlib.sha256()
    for entry in entries:
        content.update(f"{entry.name}\n{entry.size} {entry.crc32} {entry.samples}\n".encode("utf-8", "surrogateescape"))
    for start in range(0, len(rows), 1 << 16):
        content.update(b"\n".join(rows["key"][start : start + (1 << 16)].tolist()) + b"\n")
    return content.hexdigest()


def _write(
    out: Path, split: str, entries: list[ShardEntry], rows: np.ndarray, skipped: list[str], places: Sequence[str]
) -> Manifest:
    """Write the set beside and rename it."""
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        raise UserError(f"{partial} is in the way; delete it or choose another --out")
    try:
        partial.mkdir(parents=True)
        count = save_index(rows, partial / index_name(split))
        if skipped:
            write_file(partial / SKIPPED, "".join(f"{sentence}\n" for sentence in skipped))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            sources=[{"name": "in_place", "places": list(places)}],
            packing={"plan": _digest(entries, rows)},
            splits={split: count},
            shards=entries,
            skipped=len(skipped),
        )
        write_file(partial / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        partial.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def index_in_place(
    places: Sequence[str],
    out: Path | str,
    split: str,
    workers: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
) -> Manifest:
    """Make the set `out` of tars that stay where they are: `manifest.json` and `index-<split>.npy`.

    places: tars, folders that hold some, URLs; `{000..127}` counts. workers: processes, None = one a core. on_bad:
    what is damaged, half or there twice is refused, or left out and listed in skipped.txt. UserError naming the tar.
    """
    out = Path(os.path.abspath(out))
    if split not in SPLITS:
        raise UserError(f"{split!r} is no split; known are {', '.join(SPLITS)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out or delete it")
    tars = expand(places)
    found: list[_Found] = []
    skipped: list[str] = []
    with Meter(len(tars), "indexing", "tars") as meter:
        for tar in spread(_inspect, tars, workers, alone=2):
            if tar.faults and on_bad == "error":
                raise UserError(f"{tar.faults[0]}, or leave such samples out with on_bad=skip")
            skipped += tar.faults
            tar.rows["shard"] = len(found)
            found.append(tar)
            meter.advance()
    rows = index.join([tar.rows for tar in found])
    again, sentences = _repeated(rows, tars)
    if sentences and on_bad == "error":
        raise UserError(f"{sentences[0]}; keys must be unique in a set, index such tars as sets of their own")
    rows, skipped = rows[~again], skipped + sentences
    if not len(rows):
        raise UserError(f"{tars[0]}{' and the others' if len(tars) > 1 else ''} hold no samples (key.jpg, key.json)")
    counts = np.bincount(rows["shard"], minlength=len(found))
    rows["shard"] = (np.cumsum(counts > 0) - 1)[rows["shard"]]  # tars without any sample are left out
    entries = [
        ShardEntry(name=tar.place, split=split, samples=int(count), size=tar.size, crc32=tar.crc32)
        for tar, count in zip(found, counts, strict=True)
        if count
    ]
    return _write(out, split, entries, rows, skipped, places)
