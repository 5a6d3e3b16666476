"""Tars and zips of crops, one or a folder full, whole or cut into parts, read where they lie.

Nothing is unpacked to disk. The name of a member becomes a key and nothing else; links and devices are passed over.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from recipes.errors import UserError
from shards.raw.split_files import Window, find_parts, is_later_part, read_range, size_of
from shards.raw.walking import IMAGE_ENDINGS, make_key, walk_files, without_suffix
from shards.raw.zips import read_member, refuse_spanned, walk_zip
from shards.schema import Record

NAME = re.compile(  # what an archive, or a part of one, is called
    r"(?P<stem>.+)\.(?:tar|zip|tgz|tar\.(?:gz|bz2|xz|zst)|7z|rar)(?:\.(?:\d{2,5}|[a-z]{2}))?|(?P<bare>.+)\.\d{3}",
    re.IGNORECASE,
)
VOLUME = re.compile(r".+\.z\d\d", re.IGNORECASE)
BLOCK = 512  # bytes; the unit of a tar
HEADER_LIMIT = 2**20  # bytes of one header of a tar, with the long name that may belong to it
UNPACK = {  # first bytes -> what it is, and the command that makes something of it that can be read in place
    b"\x1f\x8b": ("gzip", "gunzip -c > {out}.tar"),
    b"BZh": ("bzip2", "bunzip2 -c > {out}.tar"),
    b"\xfd7zXZ": ("xz", "xz -dc > {out}.tar"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc > {out}.tar"),
}
OTHERS = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar"}


class Archive(NamedTuple):
    """One archive."""

    path: str  # of the file or of its first part
    stem: str  # relative path without the endings


class Member(NamedTuple):
    """One image in an archive."""

    name: str  # relative, '/' between its parts
    read: partial  # gives its bytes


def is_archive(name: str) -> bool:
    """Whether a file of this name is an archive, or a part of one."""
    return bool(NAME.fullmatch(name) or VOLUME.fullmatch(name))


def _stem(name: str) -> str:
    match = NAME.fullmatch(name)
    return (match["stem"] or match["bare"]) if match else without_suffix(name)


def find_archives(path: Path) -> list[Archive]:
    """The archive at `path`, or those below the folder `path`, in the order of their paths.

    UserError if there are none, or if images lie among them, which would be left out without a word.
    """
    if path.is_file():
        files = [(str(path), "", path.name)]
        if not VOLUME.fullmatch(path.name) and is_later_part(str(path)):
            raise UserError(f"{path} is a later part of a file that was cut; give its first part, or the folder")
    elif path.is_dir():
        files = list(_archives_below(path))
    else:
        raise UserError(f"{path} does not exist; give a tar or zip, or the folder that holds them")
    for file, _, name in files:
        if VOLUME.fullmatch(name):
            refuse_spanned(file)
    found = [Archive(file, folder + _stem(name)) for file, folder, name in files if not is_later_part(file)]
    if not found:
        raise UserError(f"{path} holds no tars or zips; give the folder that holds them, or one archive")
    return sorted(found)


def _archives_below(path: Path) -> Iterator[tuple[str, str, str]]:
    for file, folder, name in walk_files(path):
        if is_archive(name):
            yield file, folder, name
        elif name.lower().endswith(IMAGE_ENDINGS):
            raise UserError(
                f"{path} holds archives and images ({file}); give a folder with one of the two, or one archive"
            )


def _kind(path: str) -> str:
    """'tar' or 'zip', by the first bytes. UserError with what to run for what cannot be read in place."""
    head = read_range(path, 0, min(BLOCK, size_of(path)))
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    if head.startswith(b"PK\7\x08"):
        refuse_spanned(path)
    parts = find_parts(path).paths
    pieces = path if len(parts) == 1 else path[: path.rindex(".") + 1] + "?" * len(path.rpartition(".")[2])
    out = os.path.join(os.path.dirname(path), os.path.basename(_stem(os.path.basename(path))))
    for magic, (kind, command) in UNPACK.items():
        if head.startswith(magic):
            raise UserError(
                f"{path} is compressed with {kind} and cannot be read by position; run: cat {pieces} | "
                f"{command.format(out=out)}"
            )
    for magic, kind in OTHERS.items():
        if head.startswith(magic):
            raise UserError(f"{path} is a {kind} archive; unpack it (7z x {path}) and give the folder")
    return "tar"


def _relative(name: str) -> str:
    """The name of a member with '/' between its parts and without './' in front."""
    name = name.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:]
    return name


def _wanted(name: str, endings: tuple[str, ...], path: str) -> bool:
    """Whether a member is an image; the notes that macOS puts beside images under the same ending are none.

    UserError if it is one whose name points out of the archive's own folder.
    """
    if not name.lower().endswith(endings) or "__MACOSX/" in name or name.rpartition("/")[2].startswith("."):
        return False
    if name.startswith("/") or name[1:2] == ":" or ".." in name.split("/"):
        raise UserError(
            f"{path} holds {name!r}, a name that points outside of the folder it is unpacked to; archives of crops "
            "have no such names. If you trust it, pack it again with relative names"
        )
    return True


def _tar_members(path: str, endings: tuple[str, ...]) -> Iterator[Member]:
    try:
        with tarfile.open(
            fileobj=Window(path, HEADER_LIMIT), mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            before = -1
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile keeps all headers otherwise
                if tar.offset <= before or member.size < 0:  # sizes may be negative, and lead in a circle
                    raise UserError(f"tar {path} is damaged near byte {max(before, 0)}; fetch it again")
                before = tar.offset
                name = _relative(member.name)
                if not member.isreg() or not _wanted(name, endings, path):
                    continue
                if member.issparse():
                    raise UserError(
                        f"{member.name} in {path} is stored with holes; pack the tar again without --sparse"
                    )
                yield Member(name, partial(read_range, path, member.offset_data, member.size))
            end = tar.offset
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, LookupError) as error:  # of hostile headers
        raise UserError(f"{path} is not a whole tar ({error}); fetch it, or the part that is missing, again") from error
    window = Window(path, HEADER_LIMIT)
    window.seek(end)
    if window.read(BLOCK) != bytes(BLOCK):
        raise UserError(f"tar {path} is cut short at byte {end}; fetch it, or the part that is missing, again")


def members(path: str, endings: tuple[str, ...]) -> Iterator[Member]:
    """The images with these endings (lower case, with the dot) of one archive, listed as a stream."""
    if _kind(path) == "tar":
        yield from _tar_members(path, endings)
        return
    for entry in walk_zip(path, endings):
        name = _relative(entry.name)
        if _wanted(name, endings, path):
            place = (entry.header, entry.packed, entry.size, entry.method, entry.crc)
            yield Member(name, partial(read_member, path, *place))


def archive_records(path: Path, split: str, endings: tuple[str, ...], basename: bool) -> Iterator[Record]:
    """One record without labels for each image in the archives at `path`.

    basename: the key is the last part of the member's name; otherwise it is the archive and the whole name.
    """
    empty = True
    for archive in find_archives(path):
        for name, read in members(archive.path, endings):
            empty = False
            key = make_key(without_suffix(name.rpartition("/")[2] if basename else f"{archive.stem}/{name}"))
            yield Record(key, split, read, origin=f"{name} in {archive.path}")
    if empty:
        raise UserError(f"the archives of {path} hold no images ({', '.join(endings)}); look into them")
