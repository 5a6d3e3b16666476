"""The manifest of a shard set: read from a folder or an URL, and the part of it that describes a split."""

import json
import os
import zlib
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from recipes.errors import UserError
from shards import index, remote
from shards.schema import FORMAT_VERSION, MANIFEST, Manifest, SplitCount


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
        tree = json.loads(text)
        found = tree.get("format_version") if isinstance(tree, dict) else None
        if isinstance(found, int) and found != FORMAT_VERSION:
            raise UserError(f"{where} has format {found}, this version reads {FORMAT_VERSION}; pack the set again")
        return Manifest.model_validate(tree)
    except (ValidationError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is damaged ({str(error).splitlines()[0]}); pack the set again") from error
