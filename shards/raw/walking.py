"""Folders of images, walked as a stream: nothing is listed as a whole, so a million files begin to come at once."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from recipes.errors import UserError
from shards.raw.split_files import SAMPLE_LIMIT
from shards.schema import BadSample, Record

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
NOT_IMAGES = {"thumbs.db", "desktop.ini"}  # what file managers leave behind
FORBIDDEN = re.compile(r"[.\s]")  # in a key


def read_file(path: str) -> bytes:
    """Content of a file. Module-level, so that a record which holds it can go to another process.

    BadSample if it has more bytes than any crop.
    """
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size > SAMPLE_LIMIT:
            raise BadSample(f"{path} has {os.fstat(file.fileno()).st_size:,} bytes; no crop is that large")
        return file.read()


def make_key(name: str) -> str:
    """A relative path, '/' between its parts, as a key."""
    key = FORBIDDEN.sub("_", name) if FORBIDDEN.search(name) else name
    return key[1:] if key.startswith("__") else key  # webdataset passes over what lies in a folder like __this__


def with_dots(suffixes: Sequence[str]) -> tuple[str, ...]:
    """Endings as people write them -> lower case, with the dot."""
    return tuple("." + ending.lower().lstrip(".") for ending in suffixes)


def without_suffix(name: str) -> str:
    """The name of a file up to its last dot."""
    return name.rpartition(".")[0] or name


def walk_files(root: str | os.PathLike[str]) -> Iterator[tuple[str, str, str]]:
    """Regular files below root in no particular order, as (path, folder, name).

    folder: relative to root and with '/' at its end, or "". Links are followed and each folder is entered once; names
    that begin with a dot are passed over. UserError for a folder that cannot be listed.
    """
    waiting = [(os.fspath(root), "")]
    entered: set[tuple[int, int]] = set()
    while waiting:
        path, folder = waiting.pop()
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    if entry.is_file():
                        if name.lower() not in NOT_IMAGES:
                            yield entry.path, folder, name
                    elif entry.is_dir():
                        waiting.append((entry.path, f"{folder}{name}/"))
        except OSError as error:
            raise UserError(
                f"folder {path} cannot be listed completely ({error.strerror}); mend or remove it"
            ) from error


def file_records(
    files: Iterable[tuple[str, str, str]],
    split: str,
    endings: tuple[str, ...] | None = None,
    keep_suffix: bool = False,
    basename: bool = False,
) -> Iterator[Record]:
    """One record without labels for each of `files` (as `walk_files` gives them).

    endings: lower case, with the dot; None = every file. keep_suffix: the suffix is part of the key. basename: the key
    is the name of the file without its folders.
    """
    before, prefix = None, ""
    for path, folder, name in files:
        if endings is not None and not name.lower().endswith(endings):
            continue
        if folder is not before:
            before, prefix = folder, "" if basename else make_key(folder)
        stem = name if keep_suffix else name.rpartition(".")[0] or name
        key = FORBIDDEN.sub("_", stem) if FORBIDDEN.search(stem) else stem
        if not prefix and key.startswith("__"):
            key = key[1:]
        yield Record(prefix + key, split, partial(read_file, path), origin=path)
