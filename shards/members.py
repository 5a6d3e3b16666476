"""The members of a tar, found by walking its headers. Nothing is extracted and no link is followed.

By hand and not by `tarfile`, because that needs more time for one header than the crc32 of the image behind it takes,
and because it ends at a damaged header: here the walk goes on at the next whole one, and what was wrong is noted.
Formats: v7, ustar, GNU (long names, base-256 sizes), pax (POSIX.1-2001). Sparse files are refused.
"""

import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from recipes.errors import UserError

BLOCK = 512  # bytes; the unit of a tar
WINDOW = 1 << 20  # bytes read at a time; small enough to be in the cache of a core when they are summed
SEARCH = 1 << 16  # bytes read at a time where a header is looked for; a multiple of BLOCK
ZEROS = bytes(BLOCK)
WITHOUT_DATA = frozenset(b"123456")  # types of links, devices, folders and pipes
PAX, LONG_NAME, PASSED_OVER, SPARSE = frozenset(b"xX"), ord("L"), frozenset(b"gK"), ord("S")
REGULAR = frozenset(b"\x000\x37")  # v7, ustar, contiguous
AGAIN = "fetch or build this tar again"


class Fault(NamedTuple):
    """Something that is wrong with a tar."""

    kind: str  # "truncated", "damaged header", "half sample", "duplicate key"...; the same for all faults of a kind
    key: str  # of the sample, "" where it is not known
    position: int  # bytes from the start of the tar to the header that it begins at
    sentence: str  # for people; names the tar


class Member(NamedTuple):
    """A regular file in a tar."""

    name: bytes
    header: int  # bytes from the start of the tar to its first header
    offset: int  # and to its data
    size: int  # bytes
    doubtful: bool  # it follows damage, where a header with the rest of its name may have been


class Header(NamedTuple):
    """What a header block says."""

    name: bytes
    size: int  # bytes
    kind: int  # the type flag


def _number(field: bytes) -> int:
    """A number in octal digits or in base 256. ValueError if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def parse_header(block: bytes) -> Header | None:
    """The header in 512 bytes, or None if its checksum is wrong or it is none."""
    told = block[148:156]
    try:
        checksum = _number(told) - 8 * 32 + sum(told)  # the checksum counts its own field as eight spaces
        size = _number(block[124:136])
    except ValueError:
        return None
    if block.isascii():
        # the lower half of adler32 is 1 + the sum of the bytes modulo 65,521; 512 ASCII bytes sum to less than that
        fits = checksum == (zlib.adler32(block) & 0xFFFF) - 1
    else:
        total = sum(block)
        fits = checksum in (total, total - 256 * sum(byte > 127 for byte in block))  # old programs sum signed bytes
    if not fits or size < 0:
        return None
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return Header(name, size, block[156])


def _pax_records(data: bytes) -> dict[bytes, bytes] | None:
    """The records `length key=value` of an extended header, None if they are damaged."""
    found, at = {}, 0
    while at < len(data):
        digits = data[at : at + 20].partition(b" ")[0]
        if not digits.isdigit():
            return None
        record = data[at + len(digits) + 1 : at + int(digits)]
        key, equals, value = record[:-1].partition(b"=")
        if record[-1:] != b"\n" or not equals or at + int(digits) > len(data):
            return None
        found[key] = value
        at += int(digits)
    return found


class Tar:
    """A tar that is read once from front to back.

    faults: what `members` found wrong so far. extended: whether there were headers that give names to the next member.
    UserError if the file cannot be opened; OSError if it cannot be read.
    """

    def __init__(self, path: Path | str, whole: bool = False):
        """whole: sum all bytes of the file on the way, for `finish`."""
        self.path, self.whole = path, whole
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for ever
        except FileNotFoundError as error:
            raise UserError(f"tar {path} does not exist") from error
        except OSError as error:
            raise UserError(f"tar {path} cannot be opened: {error.strerror}") from error
        self.size = os.fstat(self.descriptor).st_size
        if stat.S_ISFIFO(os.fstat(self.descriptor).st_mode):
            os.close(self.descriptor)
            raise UserError(f"tar {path} is a pipe; it has to be a file")
        self.faults: list[Fault] = []
        self.extended = False
        self.view = memoryview(bytearray(WINDOW))
        self.start = self.stop = 0  # bytes of the file that the view holds
        self.crc = self.summed = 0  # crc32 of the first `summed` bytes

    def __enter__(self) -> "Tar":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def at(self, offset: int, length: int) -> memoryview:
        """The bytes from `offset` on, until the next call; fewer than `length` at the end of the file."""
        if offset < self.start or offset + length > self.stop:
            self._fill(offset)
        return self.view[offset - self.start : max(0, min(offset + length, self.stop) - self.start)]

    def crc32(self, offset: int, length: int) -> int:
        """crc32 of the bytes from `offset` on."""
        crc = 0
        for begin in range(offset, offset + length, WINDOW):
            crc = zlib.crc32(self.at(begin, min(WINDOW, offset + length - begin)), crc)
        return crc

    def finish(self) -> int:
        """crc32 of the whole file."""
        self._sum_until(self.size)
        return self.crc

    def _read(self, offset: int, length: int) -> int:
        """Read into the view; the number of bytes, which is less than `length` only at the end of the file."""
        done = 0
        while done < length and (got := os.preadv(self.descriptor, [self.view[done:length]], offset + done)):
            done += got
        return done

    def _sum_until(self, offset: int) -> None:
        while self.summed < offset and (got := self._read(self.summed, min(WINDOW, offset - self.summed))):
            self.start = self.stop = 0
            self.crc, self.summed = zlib.crc32(self.view[:got], self.crc), self.summed + got

    def _fill(self, offset: int) -> None:
        if self.whole:
            self._sum_until(offset)  # what was jumped over
        self.start = offset
        self.stop = offset + self._read(offset, WINDOW)
        if self.whole and self.summed < self.stop:
            self.crc = zlib.crc32(self.view[self.summed - offset : self.stop - offset], self.crc)
            self.summed = self.stop

    def _fault(self, place: int, kind: str) -> None:
        """Note that the tar ends or breaks at a byte where a header or the end-of-archive mark is expected."""
        if place == 0 and self.size:
            sentence = f"{self.path} is not a whole, uncompressed tar (it does not begin with a header); {AGAIN}"
        else:
            sentence = (
                f"{self.path} is cut short or damaged: no end-of-archive mark at byte {place}, where its last whole "
                f"member ends; {AGAIN}"
            )
        self.faults.append(Fault(kind, "", place, sentence))

    def _next_header(self, place: int) -> int:
        """The next block from `place` on that is a header, or the size of the file."""
        while place < self.size:
            block = bytes(self.at(place, SEARCH))
            found = block.find(b"ustar", 257)
            while found >= 0:
                if found % BLOCK == 257 and parse_header(block[found - 257 : found - 257 + BLOCK]):
                    return place + found - 257
                found = block.find(b"ustar", found + 1)
            place += SEARCH
        return self.size

    def _end(self, place: int) -> int:
        """At a block of zeros: the place to go on, which is the size of the file where all is well."""
        if self.at(place + BLOCK, BLOCK) != ZEROS:  # a tar ends with two of them
            self._fault(place, "truncated" if place + BLOCK >= self.size else "damaged header")
            return self._next_header(place + BLOCK)
        rest = place + 2 * BLOCK
        while rest < self.size:
            block = bytes(self.at(rest, SEARCH))
            if block.count(0) != len(block):
                sentence = (
                    f"{self.path} goes on after its end-of-archive mark at byte {place}: it was damaged, or tars were "
                    f"put behind one another; {AGAIN}"
                )
                self.faults.append(Fault("bytes after the end", "", place, sentence))
                return self._next_header(rest)
            rest += len(block)
        return self.size

    def _apply(self, header: Header, data: int, told: dict[bytes, bytes]) -> bool:
        """Take what an extended header tells of the member after it; False if it is damaged."""
        if header.kind in PASSED_OVER:
            return data + header.size <= self.size
        if header.size > WINDOW or data + header.size > self.size:
            return False
        self.extended = True
        content = bytes(self.at(data, header.size))
        if header.kind == LONG_NAME:
            told[b"path"] = content.partition(b"\0")[0]
            return True
        records = _pax_records(content)
        told.update(records or {})
        size = (records or {}).get(b"size", b"0")
        return records is not None and size.isdigit() and len(size) < 20  # Python refuses numbers of 5,000 digits

    def members(self) -> Iterator[Member]:
        """All regular files in their order; faults are noted and passed over."""
        place = began = 0  # of the header, and of the first extended header before it
        told: dict[bytes, bytes] = {}  # by extended headers
        doubtful = False
        while True:
            block = bytes(self.at(place, BLOCK))
            header = parse_header(block) if len(block) == BLOCK and block != ZEROS else None
            data = place + BLOCK
            if header is None:
                if block == ZEROS and not told:
                    place, doubtful = self._end(place), True
                    began = place
                    if place >= self.size:
                        return
                    continue
                self._fault(began, "truncated" if data > self.size else "damaged header")
            elif header.kind in PAX or header.kind in PASSED_OVER or header.kind == LONG_NAME:
                if self._apply(header, data, told):
                    place = data + -(-header.size // BLOCK) * BLOCK
                    continue
                self._fault(began, "truncated" if data + header.size > self.size else "damaged header")
            else:
                name = told.get(b"path", header.name)
                # v7 has no type for folders
                folder = header.kind in WITHOUT_DATA or (header.kind == 0 and name.endswith(b"/"))
                size = 0 if folder else int(told.get(b"size", header.size))
                while header.kind == SPARSE and block[482 if data == place + BLOCK else 504]:  # more of its map
                    block, data = bytes(self.at(data, BLOCK)).ljust(BLOCK, b"\0"), data + BLOCK
                if data + size <= self.size:
                    if not folder and (header.kind in REGULAR or header.kind == SPARSE):
                        if header.kind == SPARSE or any(key.startswith(b"GNU.sparse.") for key in told):
                            self._sparse(name, began)
                        else:
                            yield Member(name.rstrip(b"/"), began, data, size, doubtful)
                    place = began = data + -(-size // BLOCK) * BLOCK
                    told, doubtful = {}, False
                    continue
                self._fault(began, "truncated")
            place = began = self._next_header(data)
            told, doubtful = {}, True
            if place >= self.size:
                return

    def _sparse(self, name: bytes, began: int) -> None:
        shown = name.decode("utf-8", "backslashreplace")
        sentence = f"{self.path} holds {shown} as a sparse file; write the tar without --sparse"
        self.faults.append(Fault("sparse file", "", began, sentence))
