"""Images in an LMDB: the environment opened once a process, keys as a stream, values as raw bytes.

A value is handed on as it is and never interpreted here; whether it is an image is found out when it is decoded.
"""

import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import lmdb
import numpy as np

from recipes.errors import UserError
from shards.schema import BadSample

FILE = "data.mdb"
MAGIC = (0xBEEFC0DE).to_bytes(4, "little")
MAGIC_AT = 16  # bytes from the start of the file, behind the header of its first page
VALUE_LIMIT = 2**27  # bytes; no crop is that large
KEY_LIMIT = 511  # bytes; LMDB itself has no longer keys
LOOK = 1000  # entries of a folder among which the folder of an LMDB is looked for
CHUNK = 4096  # names taken from an array at a time

_opening = threading.Lock()
_by_path: dict[str, lmdb.Environment] = {}
_by_place: dict[tuple[int, int], lmdb.Environment] = {}  # device and inode -> the same


def is_lmdb(path: Path) -> bool:
    """Whether a file begins like an LMDB."""
    try:
        with path.open("rb") as file:
            return file.read(MAGIC_AT + 4)[MAGIC_AT:] == MAGIC
    except OSError:
        return False


def find_lmdb(path: Path) -> Path | None:
    """The LMDB's file: `path` itself, or `data.mdb` in it or in a folder directly inside it; None if there is none.

    UserError if there are several.
    """
    if path.is_file():
        return path if is_lmdb(path) else None
    if (path / FILE).is_file():
        return path / FILE
    with os.scandir(path) as entries:  # no more than a look: there may be millions of images
        some = sorted(entry.name for entry in itertools.islice(entries, LOOK) if entry.is_dir())
    inside = [path / name / FILE for name in some if (path / name / FILE).is_file()]
    if len(inside) > 1:
        raise UserError(
            f"{path} holds more than one LMDB; give one of {', '.join(str(file.parent) for file in inside)}"
        )
    return inside[0] if inside else None


def _environment(file: str) -> lmdb.Environment:
    """A new environment. UserError if the file is no LMDB or cut short."""
    try:
        env = lmdb.open(file, subdir=False, readonly=True, lock=False, readahead=False, meminit=False)
        needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    except lmdb.Error as error:
        raise UserError(f"{file} is no LMDB that can be read ({error}); fetch or copy it again") from error
    size = os.stat(file).st_size
    if size < needed:
        env.close()
        # to touch a page behind the end of the file would end the process without a word
        raise UserError(f"{file} is cut short: it has {size:,} bytes of {needed:,}; fetch or copy it again")
    return env


def open_lmdb(file: str) -> lmdb.Environment:
    """The read-only environment of this process, which stays open. UserError if the file is no LMDB or cut short."""
    env = _by_path.get(file)
    if env is None:
        with _opening:  # LMDB refuses to open a file twice in one process
            status = os.stat(file)
            place = (status.st_dev, status.st_ino)  # under whatever name
            env = _by_place.get(place) or _environment(file)
            _by_path[file] = _by_place[place] = env
    return env


def _start_afresh() -> None:
    """A forked process must not use the environments of its parent, nor wait for a lock that nobody will give back."""
    global _opening
    _opening = threading.Lock()
    for env in _by_place.values():
        env.close()
    _by_path.clear()
    _by_place.clear()


os.register_at_fork(after_in_child=_start_afresh)


def count_entries(file: str) -> int:
    """Entries of an LMDB, images or not."""
    return open_lmdb(file).stat()["entries"]


def read_value(file: str, key: str) -> bytes:
    """The bytes under a key. Module-level, so that a record which holds it can go to another process."""
    try:
        with open_lmdb(file).begin(buffers=True) as transaction:
            value = transaction.get(key.encode("utf-8", "surrogateescape"))
            if value is None:
                raise BadSample(f"LMDB {file} has no entry {key!r}")
            if len(value) > VALUE_LIMIT:
                raise BadSample(f"entry {key!r} of LMDB {file} has {len(value):,} bytes; no crop is that large")
            return bytes(value)
    except lmdb.Error as error:
        raise BadSample(f"entry {key!r} of LMDB {file} cannot be read ({error})") from error


def reader(file: str, key: str) -> partial:
    """`read_value` with its arguments, to be put into a record."""
    return partial(read_value, file, key)


def walk_keys(file: str) -> Iterator[str]:
    """All keys of an LMDB in its own order, except those like `__len__` that hold notes about it."""
    try:
        with open_lmdb(file).begin() as transaction, transaction.cursor() as cursor:
            for key in cursor.iternext(keys=True, values=False):
                if not (key.startswith(b"__") and key.endswith(b"__")):
                    yield key.decode("utf-8", "surrogateescape")
    except lmdb.Error as error:
        raise UserError(f"LMDB {file} cannot be read ({error}); fetch or copy it again") from error


def pack_names(names: Sequence[str]) -> np.ndarray:
    """Names as a sorted array of bytes: some 20 bytes a name instead of 80."""
    width = max((len(name.encode("utf-8", "surrogateescape")) for name in names), default=1) or 1
    encoded = (name.encode("utf-8", "surrogateescape") for name in names)
    array = np.fromiter(encoded, dtype=f"S{width}", count=len(names))
    array.sort()  # the order of the LMDB, so that looking up goes through it from front to end
    return array


def look_up(file: str, names: np.ndarray) -> Iterator[tuple[str, bool]]:
    """Each of `names` (bytes, [N]) and whether the LMDB has it; no value is read."""
    try:
        with open_lmdb(file).begin(buffers=True) as transaction, transaction.cursor() as cursor:
            for start in range(0, len(names), CHUNK):
                for key in names[start : start + CHUNK].tolist():
                    there = 0 < len(key) <= KEY_LIMIT and cursor.set_key(key)
                    yield key.decode("utf-8", "surrogateescape"), there
    except lmdb.Error as error:
        raise UserError(f"LMDB {file} cannot be read ({error}); fetch or copy it again") from error
