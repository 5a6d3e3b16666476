"""The manifest of a shard set: read from a folder or an URL, and the part of it that describes a split.

A set may come from somebody else, so its manifest says nothing about files beyond the set: a name is that of a file
beside it. Only a manifest on a disk of ours, as shards/build.py writes it for tars that lie elsewhere, may name whole
paths and URLs.
"""

import os
import re
import zlib
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from recipes import plain_json
from recipes.errors import UserError
from shards import index, remote
from shards.schema import FORMAT_VERSION, MANIFEST, SPLITS, Manifest, SplitCount

LARGEST = 1 << 62  # of a count or size in bytes; what the system calls take
PLAIN = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,255}")  # the name of a file beside the manifest
LOCAL = ("file", "local", "memory")  # schemes of fsspec that lead to no other machine


def tar_place(folder: str, name: str) -> str:
    """Path or URL of a tar of a set: beside the manifest, or anywhere if its name is a whole path or an URL."""
    return name if remote.is_remote(name) or os.path.isabs(name) else f"{folder}/{name}"


def file_crc(path: Path) -> int:
    """crc32 of a whole file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def save_index(rows: np.ndarray, path: Path) -> SplitCount:
    """Write the index of a split and describe it for the manifest."""
    index.save(rows, path)
    pids, camids = np.unique(rows["pid"]), np.unique(rows["camid"])
    return SplitCount(
        images=len(rows),
        identities=int((pids > 0).sum()),
        cameras=int((camids >= 0).sum()),
        index_size=path.stat().st_size,
        index_crc32=file_crc(path),
    )


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of a shard set in a folder or at an URL. Raises UserError when there is none."""
    where = f"{folder}/{MANIFEST}"
    if remote.is_remote(str(folder)):
        text = remote.read_bytes(where)
    else:
        path = Path(folder)
        if not (path / MANIFEST).is_file():
            what = "does not exist" if not path.exists() else f"is no shard set (it holds no {MANIFEST})"
            raise UserError(
                f"shard set {folder} {what}; pack one with `python shards/build.py SOURCE:PATH --out {folder}`"
            )
        text = (path / MANIFEST).read_bytes()
    try:
        tree = plain_json.parse(text)
        found = tree.get("format_version") if isinstance(tree, dict) else None
        if isinstance(found, int) and found != FORMAT_VERSION:
            raise UserError(f"{where} has format {found}, this version reads {FORMAT_VERSION}; pack the set again")
        manifest = Manifest.model_validate(tree)
    except (ValidationError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is damaged ({str(error).splitlines()[0]}); pack the set again") from error
    _check(manifest, where)
    return manifest


def _check(manifest: Manifest, where: str) -> None:
    """Raise UserError for counts and names that no set has."""
    rows = [*manifest.splits.values(), *manifest.shards]
    numbers = [value for row in rows for value in row.model_dump().values() if isinstance(value, int)]
    if not all(0 <= number < LARGEST for number in numbers):
        raise UserError(f"{where} is damaged (it has counts or sizes below 0 or beyond reason); pack the set again")
    if not isinstance(manifest.packing.get("plan"), str):
        raise UserError(f"{where} is damaged (packing.plan is missing); pack the set again")
    for split in (*manifest.splits, *(entry.split for entry in manifest.shards)):
        if split not in SPLITS:
            raise UserError(f"{where} is damaged ({split[:80]!r} is no split); pack the set again")
    for entry in manifest.shards:
        fault = _fault(entry.name, remote.is_remote(where))
        if fault:
            raise UserError(f"{where} names the tar {entry.name[:200]!r}, {fault}; pack or index the set again")


def _fault(name: str, fetched: bool) -> str | None:
    """What is wrong with the name of a tar. fetched: the manifest comes from an URL."""
    if PLAIN.fullmatch(name):
        return None
    if fetched:
        return "which is no file beside it, and a set behind an URL holds its own tars"
    if remote.is_remote(name):
        # `::` makes fsspec open one file inside another
        known = name.partition("://")[0].lower() not in LOCAL and "::" not in name and name.isprintable()
        return None if known else "which is no URL of a file on another machine"
    try:
        whole = os.path.isabs(os.fsencode(name)) and "\0" not in name and ".." not in name.split("/")
    except UnicodeEncodeError:
        whole = False
    return None if whole else "which is neither a file beside it nor a whole path or URL"
