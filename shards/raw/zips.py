"""Zip archives: their directory read as a stream, their members by position.

`zipfile` keeps an object for each member, gigabytes for an archive of millions; here none is kept. Names of members are
text for keys, never paths.
"""

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from recipes.errors import UserError
from shards.raw.split_files import SAMPLE_LIMIT, Window, read_range, size_of
from shards.schema import BadSample

END = struct.Struct("<4s4H2LH")  # end of the directory
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
ENTRY = struct.Struct("<4s4B4HL2L5H2L")  # one member in the directory
LOCAL = struct.Struct("<4s2B4HL2L2H")  # in front of a member's bytes
BLOCK = 2**20  # bytes of the directory read at once
STORED, DEFLATED = 0, 8
METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "ppmd", 99: "encryption"}


class Entry(NamedTuple):
    """One regular member."""

    name: str
    header: int  # bytes from the start of the archive to the member's local header
    packed: int  # bytes in the archive
    size: int  # bytes unpacked
    method: int  # STORED or DEFLATED
    crc: int  # of the unpacked bytes


class _Directory(NamedTuple):
    entries: int
    size: int
    offset: int


def _damaged(path: str, fault: str) -> UserError:
    return UserError(f"zip {path} {fault}; it is damaged or cut short, fetch it again")


def _find_directory(path: str) -> _Directory:
    """Where the directory lies, from the record at the end of the archive."""
    size = size_of(path)
    window = Window(path, BLOCK)
    window.seek(max(0, size - 65_557))  # the record, and the longest comment that may stand behind it
    start, tail = window.tell(), window.read(min(size, 65_557))
    at = tail.rfind(b"PK\5\6")
    while at >= 0 and tail[at + END.size - 2 : at + END.size] != struct.pack("<H", len(tail) - at - END.size & 0xFFFF):
        at = tail.rfind(b"PK\5\6", 0, at)  # those four bytes may stand in the comment too
    if at < 0:
        raise _damaged(path, "has no directory at its end")
    _, disk, first_disk, _, entries, length, offset, _ = END.unpack_from(tail, at)
    end = start + at
    locator = at - LOCATOR64.size
    if locator >= 0 and tail.startswith(b"PK\6\7", locator):  # some programs write it for small archives too
        _, _, place, _ = LOCATOR64.unpack_from(tail, locator)
        window.seek(place)
        record = window.read(END64.size)
        if len(record) < END64.size or not record.startswith(b"PK\6\6"):
            raise _damaged(path, "has no 64-bit directory where it says")
        _, _, _, _, disk, first_disk, _, entries, length, offset = END64.unpack(record)
        end = place
    if disk or first_disk:
        refuse_spanned(path)
    if offset + length != end:
        raise _damaged(path, f"has its directory not where it says (bytes {offset} to {offset + length} of {end})")
    return _Directory(entries, length, offset)


def refuse_spanned(path: str) -> None:
    """Archives that PKZIP wrote over several volumes (.z01, .z02, ..., .zip) have to be joined by `zip` itself."""
    stem = os.path.splitext(path)[0]
    raise UserError(
        f"{path} is a volume of a spanned zip (.z01, .z02, ..., .zip), which cannot be read in place; join it with: "
        f"zip -s 0 {stem}.zip --out {stem}-whole.zip"
    )


def _sizes64(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """Replace those of the three numbers that did not fit into 32 bits by those of the extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            rest = extra[at + 4 : at + 4 + length]
            values = iter(struct.unpack(f"<{len(rest) // 8}Q", rest[: len(rest) // 8 * 8]))
            size, packed, header = (next(values, n) if n == 0xFFFFFFFF else n for n in (size, packed, header))
        at += 4 + length
    return size, packed, header


def _decode(name: bytes, flags: int) -> str:
    try:
        return name.decode("utf-8")  # also without the flag for it: many programs forget the flag
    except UnicodeDecodeError:
        return name.decode("utf-8", "surrogateescape") if flags & 0x800 else name.decode("cp437")


def _is_regular(name: str, system: int, attributes: int) -> bool:
    """Whether a member is a file; only Unix systems (3, 19) note links and devices."""
    kind = stat.S_IFMT(attributes >> 16) if system in (3, 19) else 0
    return not name.endswith(("/", "\\")) and kind in (0, stat.S_IFREG)


def walk_zip(path: str, endings: tuple[str, ...]) -> Iterator[Entry]:
    """The regular members with these endings (lower case) in the order of the directory.

    UserError for a damaged or spanned archive, and for a wanted member that is encrypted or packed by a rare method.
    """
    directory = _find_directory(path)
    window = Window(path, BLOCK)
    window.seek(directory.offset)
    buffer, at, left = b"", 0, directory.size
    for _ in range(directory.entries):
        if len(buffer) - at < 3 * 65_536 + ENTRY.size and left:  # a name, an extra field and a comment may be that long
            block = window.read(min(BLOCK, left))
            if not block:
                raise _damaged(path, "ends inside its directory")
            buffer, at, left = buffer[at:] + block, 0, left - len(block)
        if len(buffer) - at < ENTRY.size or not buffer.startswith(b"PK\1\2", at):
            raise _damaged(path, f"names {directory.entries:,} members but lists fewer")
        fields = ENTRY.unpack_from(buffer, at)
        system, flags, method, crc, packed, size = fields[2], fields[5], fields[6], *fields[9:12]
        name_length, extra_length, comment_length = fields[12:15]
        attributes, header = fields[17:19]
        start = at + ENTRY.size
        extra = buffer[start + name_length : start + name_length + extra_length]
        name = _decode(buffer[start : start + name_length], flags)
        at = start + name_length + extra_length + comment_length
        if not name.lower().endswith(endings) or not _is_regular(name, system, attributes):
            continue
        if flags & 1:
            raise UserError(f"{name} in zip {path} is encrypted; unpack the archive with its password first")
        if method not in (STORED, DEFLATED):
            how = METHODS.get(method, f"method {method}")
            raise UserError(f"{name} in zip {path} is packed by {how}; unpack it and give the folder (7z x {path})")
        if 0xFFFFFFFF in (size, packed, header):
            size, packed, header = _sizes64(extra, size, packed, header)
        yield Entry(name, header, packed, size, method, crc)


def read_member(path: str, header: int, packed: int, size: int, method: int, crc: int) -> bytes:
    """The unpacked bytes of a member, checked. Module-level, so that a record can hold it. BadSample if damaged."""
    local = LOCAL.unpack(read_range(path, header, LOCAL.size))
    where = f"zip {path}, member at byte {header}"
    if local[0] != b"PK\3\4":
        raise BadSample(f"{where}: no member begins there; the archive is damaged, fetch it again")
    if size > SAMPLE_LIMIT:
        raise BadSample(f"{where}: {size:,} bytes unpacked are no crop; the limit is {SAMPLE_LIMIT:,}")
    data = read_range(path, header + LOCAL.size + local[10] + local[11], packed)
    if method == DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # one more, to see that it is longer
        except zlib.error as error:
            raise BadSample(f"{where}: {error}; the archive is damaged, fetch it again") from error
    if len(data) != size or zlib.crc32(data) != crc:
        raise BadSample(f"{where}: its bytes do not have the size and crc of the directory; fetch the archive again")
    return data
