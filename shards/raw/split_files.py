"""A file, or one that was cut into numbered parts for the way (`x.tar.001`, `x.tar.002`, ...), read by byte ranges.

A cut file goes by the path of its first part. Nothing is joined on disk.
"""

import functools
import os
import re
from bisect import bisect_right
from typing import NamedTuple

from recipes.errors import UserError
from shards.schema import BadSample

PART = re.compile(r"(?P<stem>.+)\.(?P<number>\d{2,5}|(?!gz|xz)[a-z]{2})")  # letters: as the program `split` writes them
SAMPLE_LIMIT = 2**27  # bytes; no crop is that large, and a header that claims so is wrong or hostile
OPEN_FILES = 64  # descriptors a process


class Parts(NamedTuple):
    """The pieces of a file in their order."""

    paths: tuple[str, ...]
    ends: tuple[int, ...]  # bytes from the start of the whole to the end of each piece


class _Descriptor:
    """An open file that closes itself when nobody holds it any more, so that a cache may drop it at any time."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        number = getattr(self, "number", None)
        if number is not None:
            os.close(number)


@functools.lru_cache(maxsize=OPEN_FILES)
def _open(path: str) -> _Descriptor:
    return _Descriptor(path)


def part_number(suffix: str) -> int:
    """'003' -> 3; 'aa' -> 0, 'ab' -> 1."""
    return int(suffix) if suffix.isdigit() else (ord(suffix[0]) - ord("a")) * 26 + ord(suffix[1]) - ord("a")


def is_later_part(path: str) -> bool:
    """Whether a path is that of a part behind the first, whose number is 0 or 1. UserError if the first is missing."""
    match = PART.fullmatch(os.path.basename(path))
    number = part_number(match["number"]) if match else 0
    if not match or number == 0:
        return False
    earlier = [_sibling(path, match["number"], first) for first in (0, 1) if first < number]
    if number > 1 and not any(map(os.path.isfile, earlier)):
        raise UserError(f"{earlier[-1]} is missing, the first part of the file that {path} belongs to; fetch it")
    return any(map(os.path.isfile, earlier))


def _sibling(path: str, suffix: str, number: int) -> str:
    """The path of another part of the same file."""
    if suffix.isdigit():
        other = str(number).zfill(len(suffix))
    else:
        other = chr(ord("a") + number // 26) + chr(ord("a") + number % 26)
    return path[: -len(suffix)] + other


@functools.lru_cache(maxsize=1024)
def find_parts(path: str) -> Parts:
    """The pieces of the file of which `path` is the first or only one. UserError if one in the middle is missing."""
    match = PART.fullmatch(os.path.basename(path))
    paths = [path]
    if match:
        suffix = match["number"]
        with os.scandir(os.path.dirname(path) or ".") as entries:
            found = [PART.fullmatch(entry.name) for entry in entries if entry.name.startswith(match["stem"])]
        numbers = [
            part_number(part["number"])
            for part in found
            if part and part["stem"] == match["stem"] and len(part["number"]) == len(suffix)
        ]
        paths = [_sibling(path, suffix, number) for number in range(part_number(suffix), max(numbers) + 1)]
        for piece in paths:
            if not os.path.isfile(piece):
                raise UserError(f"{piece} is missing, one of {len(paths)} parts of one file; fetch it")
    ends, end = [], 0
    for piece in paths:
        end += os.stat(piece).st_size
        ends.append(end)
    return Parts(tuple(paths), tuple(ends))


def size_of(path: str) -> int:
    """Bytes of the whole file."""
    return find_parts(path).ends[-1]


def read_range(path: str, offset: int, length: int) -> bytes:
    """Bytes [offset, offset + length) of the whole file. Module-level, so that a record can hold it.

    BadSample if the file ends before, or if more is asked for than any crop has.
    """
    if not 0 <= length <= SAMPLE_LIMIT:
        raise BadSample(f"{path} at byte {offset}: {length:,} bytes are no crop; the limit is {SAMPLE_LIMIT:,}")
    data = _read(path, offset, length)
    if len(data) < length:
        raise BadSample(f"{path} ends in the middle of a sample, at byte {offset + len(data)}; fetch it again")
    return data


def _read(path: str, offset: int, length: int) -> bytes:
    """At most `length` bytes from `offset` on."""
    paths, ends = find_parts(path)
    pieces = []
    number = bisect_right(ends, offset)
    while length > 0 and number < len(paths):
        start = ends[number - 1] if number else 0
        data = os.pread(_open(paths[number]).number, min(length, ends[number] - offset), offset - start)
        if not data:
            break  # the file became shorter
        pieces.append(data)
        offset, length = offset + len(data), length - len(data)
        number += offset >= ends[number]
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Window:
    """The whole file as an object that can be read and sought, without a buffer: for programs that jump through it."""

    def __init__(self, path: str, limit: int):
        """limit: bytes that may be read at once; more is a UserError, since no header is that long."""
        self.path, self.limit = path, limit
        self.size, self.place = size_of(path), 0

    def read(self, length: int = -1) -> bytes:
        """The next `length` bytes, fewer at the end."""
        if not 0 <= length <= self.limit:
            raise UserError(f"{self.path} claims a header of {length:,} bytes at byte {self.place}; it is damaged")
        data = _read(self.path, self.place, length)
        self.place += len(data)
        return data

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place; it may lie behind the end."""
        self.place = place + (0, self.place, self.size)[whence]
        return self.place

    def tell(self) -> int:
        """Where the next read begins."""
        return self.place
