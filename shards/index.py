"""The sidecar index of a webdataset tar: where each sample lies, so that any of them can be read by its number.

The index is built by scanning the tar, so it serves the tars of other programs too. A tar that is cut short is refused
here: webdataset's own stream ends without a word when the cut falls on a member boundary.
"""

import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from recipes.errors import UserError
from shards.schema import UNKNOWN

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")
META_SUFFIXES = ("json", "txt")  # in order of preference; a .txt is taken as one caption
BLOCK = 512  # bytes; the unit of a tar
FIELDS = [
    ("shard", "<u4"),  # position of the tar in the list that the index was built from
    ("offset", "<u8"),  # bytes from the start of the tar to the encoded image
    ("length", "<u4"),  # bytes of the encoded image
    ("crc", "<u4"),  # crc32 of the encoded image
    ("meta_offset", "<u8"),  # bytes from the start of the tar to the label fields
    ("meta_length", "<u4"),  # bytes of the label fields; 0 = the sample has none
    ("pid", "<i8"),  # UNKNOWN where the sample has none
    ("camid", "<i4"),  # 0-based, UNKNOWN where the sample has none
]


def row_type(key_bytes: int) -> np.dtype:
    """The record type of an index whose longest key has `key_bytes` bytes of UTF-8."""
    return np.dtype([*FIELDS, ("key", f"S{max(1, key_bytes)}")])


@dataclass
class _Group:
    """The members of one sample while the tar is scanned; (0, 0, 0) is offset, length and crc of what is absent."""

    key: str
    image: tuple[int, int, int] = (0, 0, 0)
    meta: tuple[int, int, int] = (0, 0, 0)
    meta_suffix: str = ""
    labels: tuple[int, int] = (UNKNOWN, UNKNOWN)
    suffixes: set[str] = field(default_factory=set)


def read_meta(data: bytes, origin: str = "a sample") -> tuple[int, int, tuple[str, ...]]:
    """Label fields of a sample -> (pid, camid, captions); UNKNOWN and () for what it does not tell.

    Reads our json (`pid`, `camid`, `captions`), others' json (`caption`, other keys are passed over) and plain text,
    which is a caption. UserError if a pid or camid is not an integer.
    """
    text = data.decode("utf-8", errors="replace")
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        return UNKNOWN, UNKNOWN, (text.strip(),) if text.strip() else ()
    labels = [tree.get(name) for name in ("pid", "camid")]
    for name, value in zip(("pid", "camid"), labels, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UserError(f"{origin} has {name} {value!r} in its json; an integer is expected")
    captions = tree.get("captions", tree.get("caption")) or ()
    captions = (captions,) if isinstance(captions, str) else captions
    pid, camid = (UNKNOWN if value is None else value for value in labels)
    return pid, camid, tuple(str(caption) for caption in captions)


def _split_name(name: str) -> tuple[str, str]:
    """Member name -> (key, suffix) as webdataset has it: the suffix begins at the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix.lower()


def _end_of_archive(path: Path, end: int) -> None:
    """A tar ends with two blocks of zeros; without them it was cut or never finished."""
    with path.open("rb") as file:
        file.seek(end)
        tail = file.read(2 * BLOCK)
    if tail != bytes(2 * BLOCK):
        raise UserError(
            f"{path} is cut short or damaged: no end-of-archive mark at byte {end}, where its last whole member ends; "
            "fetch or build this tar again"
        )


def _take(group: _Group, suffix: str, place: tuple[int, int, int], data: bytes, path: Path) -> None:
    """Note one member of a sample."""
    if suffix in group.suffixes:
        raise UserError(f"{path} holds {group.key}.{suffix} twice")
    group.suffixes.add(suffix)
    if suffix in IMAGE_SUFFIXES:
        if group.image[1]:
            raise UserError(f"{path}: sample {group.key} has two images ({', '.join(sorted(group.suffixes))})")
        group.image = place
    elif suffix in META_SUFFIXES and group.meta_suffix != META_SUFFIXES[0]:
        group.meta, group.meta_suffix = place, suffix
        group.labels = read_meta(data, f"{path}: sample {group.key}")[:2] if suffix == "json" else (UNKNOWN, UNKNOWN)


def _groups(path: Path) -> list[_Group]:
    """All samples of a tar in their order: neighbouring members with one key."""
    groups: list[_Group] = []
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile keeps all headers otherwise
                key, suffix = _split_name(member.name)
                if not member.isreg() or not suffix or key == "" or key.endswith("/"):
                    continue
                reader = tar.extractfile(member)
                assert reader is not None, "a regular member can be read"
                data = reader.read()
                if not groups or groups[-1].key != key:
                    groups.append(_Group(key))
                _take(groups[-1], suffix, (member.offset_data, member.size, zlib.crc32(data)), data, path)
            end = tar.offset  # where the header after the last whole member would be
    except FileNotFoundError as error:
        raise UserError(f"tar {path} does not exist") from error
    except tarfile.ReadError as error:
        raise UserError(f"{path} is not a whole, uncompressed tar ({error}); fetch or build this tar again") from error
    _end_of_archive(path, end)
    return groups


def scan_tar(path: Path | str, shard: int = 0) -> np.ndarray:
    """Scan a tar and give its samples as rows of `row_type`, in the order of the tar.

    shard: the number that goes into the rows. UserError naming the tar if it is cut short, holds a sample without an
    image, a sample without json among others that have one, or a key twice.
    """
    path = Path(path)
    groups = _groups(path)
    with_json = sum("json" in group.suffixes for group in groups)
    seen: set[str] = set()
    for group in groups:
        if not group.image[1]:
            raise UserError(f"{path} holds half a sample: {group.key} has {sorted(group.suffixes)} but no image")
        if with_json and "json" not in group.suffixes:
            raise UserError(f"{path} holds half a sample: {group.key} has no json, though {with_json} others do")
        if group.key in seen:
            raise UserError(f"{path} holds the key {group.key} twice")
        seen.add(group.key)
    keys = [group.key.encode("utf-8", errors="surrogateescape") for group in groups]
    rows = np.zeros(len(groups), dtype=row_type(max(map(len, keys), default=1)))
    for number, (group, key) in enumerate(zip(groups, keys, strict=True)):
        rows[number] = (shard, *group.image, *group.meta[:2], *group.labels, key)
    return rows


def join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several tars behind one another; the shard numbers stay as they are."""
    rows = np.zeros(sum(map(len, parts)), dtype=row_type(max((part["key"].itemsize for part in parts), default=1)))
    start = 0
    for part in parts:
        for name in rows.dtype.names or ():
            rows[name][start : start + len(part)] = part[name]
        start += len(part)
    return rows


def save(rows: np.ndarray, path: Path | str) -> None:
    """Write an index as .npy: beside first, then renamed, so that a reader sees the old, the new or none."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def load(path: Path | str) -> np.ndarray:
    """Map an index into memory (read-only). UserError naming the file if it is missing or no index of ours."""
    path = Path(path)
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"index {path} does not exist") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"index {path} is damaged ({error}); build the set again") from error
    if rows.ndim != 1 or rows.dtype != row_type(rows.dtype["key"].itemsize if "key" in (rows.dtype.names or ()) else 1):
        raise UserError(f"index {path} does not hold the fields of a sample index; build the set again")
    return rows
