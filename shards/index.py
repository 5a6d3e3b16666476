"""The sidecar index of a webdataset tar: where each sample lies, so that any of them can be read by its number.

The index is built by scanning the tar, so it serves the tars of other programs too. A tar that is cut short is refused
here: webdataset's own stream ends without a word when the cut falls on a member boundary.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recipes.errors import UserError
from shards import arrays
from shards.members import Fault, Member, Tar
from shards.raw.split_files import SAMPLE_LIMIT
from shards.schema import UNKNOWN

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")
META_SUFFIXES = ("json", "txt")  # in order of preference; a .txt is taken as one caption
IMAGES, METAS = ([suffix.encode() for suffix in suffixes] for suffixes in (IMAGE_SUFFIXES, META_SUFFIXES))
META_LIMIT = 1 << 20  # bytes of the label fields of a sample
KEY_LIMIT = 1024  # bytes; all rows of an index are as long as the longest key asks for
FIELDS = [
    ("shard", "<u4"),  # position of the tar in the list that the index was built from
    ("offset", "<u8"),  # bytes from the start of the tar to the encoded image
    ("length", "<u4"),  # bytes of the encoded image
    ("crc", "<u4"),  # crc32 of the encoded image
    ("meta_offset", "<u8"),  # bytes from the start of the tar to the label fields
    ("meta_length", "<u4"),  # bytes of the label fields; 0 = the sample has none
    ("meta_crc", "<u4"),  # crc32 of the label fields, 0 if there are none
    ("pid", "<i8"),  # UNKNOWN where the sample has none
    ("camid", "<i4"),  # 0-based, UNKNOWN where the sample has none
]


def row_type(key_bytes: int) -> np.dtype:
    """The record type of an index whose longest key has `key_bytes` bytes of UTF-8."""
    return np.dtype([*FIELDS, ("key", f"S{max(1, key_bytes)}")])


def is_row_type(found: np.dtype) -> bool:
    """Whether this is `row_type` of some key that a set may have."""
    if found.names is None or "key" not in found.names:
        return False
    width = found["key"].itemsize
    return 0 < width <= KEY_LIMIT and found == row_type(width)


def read_meta(data: bytes, origin: str = "a sample") -> tuple[int, int, tuple[str, ...]]:
    """Label fields of a sample -> (pid, camid, captions); UNKNOWN and () for what it does not tell.

    Reads our json (`pid`, `camid`, `captions`), others' json (`caption`, other keys are passed over) and plain text,
    which is a caption. UserError if a pid or camid is not an integer.
    """
    text = data.decode("utf-8", errors="replace")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        return UNKNOWN, UNKNOWN, (text.strip(),) if text.strip() else ()
    labels = [tree.get(name) for name in ("pid", "camid")]
    for name, value, bits in zip(("pid", "camid"), labels, (63, 31), strict=True):
        if value is not None and (type(value) is not int or value.bit_length() > bits):
            raise UserError(f"{origin} has {name} {value!r:.80} in its json; an integer is expected")
    captions = tree.get("captions", tree.get("caption")) or ()
    captions = (captions,) if isinstance(captions, str) else captions if isinstance(captions, list) else ()
    pid, camid = (UNKNOWN if value is None else value for value in labels)
    return pid, camid, tuple(str(caption) for caption in captions)


@dataclass(slots=True)
class _Group:
    """The members of one sample while the tar is scanned; (0, 0, 0) is offset, length and crc of what is absent."""

    key: bytes
    header: int  # where its first member begins
    image: tuple[int, int, int] = (0, 0, 0)
    meta: tuple[int, int, int] = (0, 0, 0)
    labels: tuple[int, int] = (UNKNOWN, UNKNOWN)
    suffixes: tuple[bytes, ...] = ()
    torn: bool = False  # it is next to damage, where other members of it may have been
    doubtful: bool = False  # it follows damage, where a header with the rest of its name may have been
    fault: tuple[str, str] | None = None  # kind, what is wrong

    @property
    def shown(self) -> str:
        return self.key.decode("utf-8", "backslashreplace")


class Scan(NamedTuple):
    """What a tar holds."""

    rows: np.ndarray  # of `row_type`, in the order of the tar: the whole samples
    faults: list[Fault]
    size: int  # bytes of the file
    crc32: int  # of the whole file; 0 if it was not asked for


def _split_name(name: bytes) -> tuple[bytes, bytes]:
    """Member name -> (key, suffix) as webdataset has it: the suffix begins at the first dot of the last part."""
    folder, slash, last = name.rpartition(b"/")
    stem, _, suffix = last.partition(b".")
    return folder + slash + stem if stem else b"", suffix.lower()


def _take_meta(group: _Group, suffix: bytes, member: Member, tar: Tar) -> None:
    if member.size > META_LIMIT:
        group.fault = "bad meta", f"sample {group.shown} has {member.size} bytes of labels; {META_LIMIT} are allowed"
        return
    data = tar.at(member.offset, member.size)
    group.meta = member.offset, member.size, zlib.crc32(data)
    group.labels = UNKNOWN, UNKNOWN
    if suffix == b"json":
        try:
            group.labels = read_meta(bytes(data), f"sample {group.shown}")[:2]
        except UserError as error:
            group.fault = "bad meta", str(error)


def _take(group: _Group, suffix: bytes, member: Member, tar: Tar) -> None:
    """Note one member of a sample; of several faults the first."""
    if group.fault:
        return
    if suffix in group.suffixes:
        group.fault = "duplicate member", f"holds {group.shown}.{suffix.decode('utf-8', 'backslashreplace')} twice"
        return
    group.suffixes += (suffix,)
    if suffix in IMAGES:
        if group.image[1]:
            images = ", ".join(sorted(each.decode() for each in group.suffixes if each in IMAGES))
            group.fault = "two images", f"sample {group.shown} has two images ({images})"
        elif member.size > SAMPLE_LIMIT:
            group.fault = "too large", f"sample {group.shown} has an image of {member.size} bytes"
        else:
            group.image = member.offset, member.size, tar.crc32(member.offset, member.size)
    elif suffix in METAS and (not group.meta[0] or METAS.index(suffix) == 0):
        _take_meta(group, suffix, member, tar)


def _groups(tar: Tar) -> list[_Group]:
    """All samples of a tar in their order: neighbouring members with one key."""
    groups: list[_Group] = []
    faults = 0
    for member in tar.members():
        key, suffix = _split_name(member.name)
        if not suffix or not key:
            continue
        if member.doubtful and groups:
            groups[-1].torn = True
        if not groups or groups[-1].key != key:
            groups.append(_Group(key, member.header))
        if member.doubtful:
            groups[-1].torn = groups[-1].doubtful = True
        _take(groups[-1], suffix, member, tar)
        faults = len(tar.faults)
    if groups and len(tar.faults) > faults:
        groups[-1].torn = True
    return groups


def _find_faults(groups: list[_Group], extended: bool) -> None:
    """Note what is wrong with a sample by itself or among the others. extended: the tar has long names."""
    with_json = sum(b"json" in group.suffixes for group in groups)
    usual = {group.suffixes for group in groups if not group.torn} if any(group.torn for group in groups) else set()
    seen: set[bytes] = set()
    for group in groups:
        if group.fault:
            continue
        if not group.image[1]:
            there = sorted(suffix.decode("utf-8", "backslashreplace") for suffix in group.suffixes)
            group.fault = "half sample", f"holds half a sample: {group.shown} has {there} but no image"
        elif with_json and b"json" not in group.suffixes:
            group.fault = "half sample", f"holds half a sample: {group.shown} has no json, though {with_json} others do"
        elif (extended and group.doubtful) or (group.torn and not with_json and group.suffixes not in usual):
            group.fault = "half sample", f"may hold half a sample: {group.shown} is next to damage"
        elif len(group.key) > KEY_LIMIT:
            group.fault = "key too long", f"holds a key of {len(group.key)} bytes; {KEY_LIMIT} are allowed"
        elif group.key in seen:
            group.fault = "duplicate key", f"holds the key {group.shown} twice"
        seen.add(group.key)


def inspect_tar(path: Path | str, shard: int = 0, whole: bool = False) -> Scan:
    """Scan a tar that may be damaged: the rows of its whole samples, and everything that is wrong with the others.

    shard: the number that goes into the rows. whole: take the crc32 of the whole file too, in the same pass. After a
    damaged header the scan goes on at the next whole one. UserError if the tar cannot be read at all.
    """
    try:
        with Tar(path, whole) as tar:
            groups = _groups(tar)
            _find_faults(groups, tar.extended)
            faults, size, crc = tar.faults, tar.size, tar.finish() if whole else 0
    except OSError as error:
        raise UserError(f"tar {path} cannot be read: {error.strerror}") from error
    for group in groups:
        if group.fault:
            kind, what = group.fault
            key = group.key.decode("utf-8", "surrogateescape")
            sentence = f"{path} {what}" if what.startswith(("holds", "may")) else f"{path}: {what}"
            faults.append(Fault(kind, key, group.header, sentence))
    taken = [group for group in groups if not group.fault]
    cells = [(shard, *group.image, *group.meta, *group.labels, group.key) for group in taken]
    rows = np.array(cells, dtype=row_type(max((len(group.key) for group in taken), default=1)))
    return Scan(rows, faults, size, crc)


def scan_tar(path: Path | str, shard: int = 0) -> np.ndarray:
    """Scan a tar and give its samples as rows of `row_type`, in the order of the tar.

    shard: the number that goes into the rows. UserError naming the tar if it is cut short, holds a sample without an
    image, a sample without json among others that have one, or a key twice.
    """
    scan = inspect_tar(path, shard)
    if scan.faults:
        raise UserError(scan.faults[0].sentence)
    return scan.rows


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
        with path.open("rb") as file:
            header = arrays.check_size(file)
        if len(header.shape) != 1 or not is_row_type(header.dtype):
            raise UserError(f"index {path} does not hold the fields of a sample index; build the set again")
        return np.load(path, mmap_mode="r" if header.shape[0] else None, allow_pickle=False)
    except UserError:  # a ValueError, too
        raise
    except FileNotFoundError as error:
        raise UserError(f"index {path} does not exist") from error
    except (OSError, ValueError) as error:
        raise UserError(f"index {path} is damaged ({error}); build the set again") from error
