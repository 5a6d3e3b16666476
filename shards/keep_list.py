"""Keep-lists: which samples of a set are used. The reader honours one, so nothing has to be packed anew.

    .npz   ours: the rows, and of which set they are; another set is refused
    .pkl   as CFS was published: a pickled list of image names, best first; read without running anything of it
    .txt   one name a line

A name belongs to a key if one is the end of the other, in whole parts of a path: `images/a/1.jpg`, `a/1.jpg`, `a/1` and
`1` all mean the key `a/1`. A name that means two keys is refused.
"""

import io
import json
import lzma
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from recipes import plain_json
from recipes.errors import UserError
from shards import arrays
from shards.embeddings import Keys
from shards.name_lists import read_names, write_names
from shards.raw.walking import IMAGE_ENDINGS, make_key

NAMES = (".pkl", ".txt")
KINDS = (".npz", *NAMES)
SOURCE = re.compile(r"s\d+/.")  # how keys of a set of several sources begin
BLOCK = 100_000  # names that are shortened at a time
FACTS = 1 << 22  # bytes of the facts of a .npz
ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError)  # what a damaged zip raises beside the usual


class Reader(Protocol):
    """What is asked of a ShardReader."""

    keys: np.ndarray  # bytes [N]
    identity: dict[str, Any]

    def __len__(self) -> int: ...


def check_kind(path: Path) -> str:
    """The ending of a keep-list. UserError if it is none."""
    if path.suffix.lower() not in KINDS:
        raise UserError(f"{path} is no keep-list; its ending must be {', '.join(KINDS)}")
    return path.suffix.lower()


def _stored(path: Path, samples: int) -> tuple[np.ndarray, Any]:
    """Rows and facts of a .npz. Of its zip no more is unpacked than such a list may have. ValueError and its like."""
    limits = {"rows.npy": 8 * samples + FACTS, "facts.npy": FACTS}
    if path.stat().st_size > sum(limits.values()) + FACTS:
        raise ValueError(f"it has more bytes than a list of {samples:,} samples may have")
    with zipfile.ZipFile(path) as archive:
        for name, most in limits.items():
            if archive.getinfo(name).file_size > most:
                raise ValueError(f"its {name} is larger than that of {samples:,} samples may be")
        rows, facts = (arrays.from_bytes(archive.read(name)) for name in limits)
    return rows, plain_json.parse(str(facts).encode())["set"]


def _rows_of_npz(path: Path, reader: Reader) -> np.ndarray:
    try:
        rows, found = _stored(path, len(reader))
    except (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, *ZIP) as error:
        raise UserError(
            f"{path} is no keep-list of shards/cfs_keep.py, or damaged ({str(error)[:300]}); write it again"
        ) from error
    if found != reader.identity:
        raise UserError(
            f"keep-list {path} belongs to the set {str(found)[:300]}, not to {reader.identity}; make one for this set"
        )
    if rows.dtype != np.int64 or rows.ndim != 1 or not len(rows):
        raise UserError(f"{path} holds no rows; write it again")
    rows = np.unique(rows)
    if rows[0] < 0 or rows[-1] >= len(reader):
        raise UserError(f"{path} names row {rows[-1] if rows[0] >= 0 else rows[0]} of {len(reader)}; write it again")
    return rows


def _encoded(names: Sequence[str], rows: np.ndarray, stripped: bool, longest: int) -> np.ndarray:
    """The names at `rows` as keys are written, bytes [rows]; stripped: without the suffix of an image.

    longest: bytes of the longest key. Of a longer name only the end can be one, so the rest of it is left out.
    """

    def clean() -> Iterator[bytes]:
        for row in rows:
            name = names[row]
            if stripped and name.lower().endswith(IMAGE_ENDINGS):
                name = name[: name.rindex(".")]
            yield make_key(name.removeprefix("./").lstrip("/")).encode("utf-8", "surrogateescape")[-longest - 1 :]

    # cleaning never makes a name longer
    width = max((len(name) if name.isascii() else 4 * len(name) for name in names), default=1)
    return np.fromiter(clean(), f"S{min(max(width, 1), longest + 1)}", len(rows))


def _without_first(names: np.ndarray) -> np.ndarray:
    """Paths without their first part; what has no '/' becomes empty. names: bytes [N]."""
    shorter, width = np.zeros_like(names), names.dtype.itemsize
    for at in range(0, len(names), BLOCK):
        chars = np.ascontiguousarray(names[at : at + BLOCK]).view(np.uint8).reshape(-1, width)
        slash = chars == ord("/")
        start = np.where(slash.any(axis=1), slash.argmax(axis=1) + 1, width)
        place = np.arange(width) + start[:, None]
        moved = np.take_along_axis(chars, np.minimum(place, width - 1), axis=1)
        moved[place >= width] = 0
        shorter[at : at + BLOCK] = moved.view(names.dtype)[:, 0]
    return shorter


def _tails(names: np.ndarray) -> Iterator[np.ndarray]:
    """Paths without their first part, without their first two, ... as long as one has any left."""
    while (names := _without_first(names)).any():
        yield names


def _without_source(keys: np.ndarray) -> np.ndarray:
    """Keys without the `s<number>/` with which those of several sources begin; else the keys as they are."""
    some = Keys(keys[:: max(1, len(keys) // 1000)])
    return _without_first(keys) if all(SOURCE.match(key) for key in some) else keys


def _match(names: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Place of each name among the keys, int64, -1 where it is none. UserError for a name that is two of them."""
    order, turn = np.argsort(keys), np.argsort(names)  # sorted names are looked up ten times as fast
    ranked, asked = keys[order], names[turn]
    place = np.searchsorted(ranked, asked)
    hit, after = np.minimum(place, len(keys) - 1), np.minimum(place + 1, len(keys) - 1)
    same = (ranked[hit] == asked) & (asked != b"")
    twice = np.flatnonzero(same & (after != hit) & (ranked[after] == asked))
    if len(twice):
        name = Keys(asked)[int(twice[0])]
        raise UserError(f"the name {name!r} means more than one sample of the set; give whole keys")
    found = np.empty(len(names), np.int64)
    found[turn] = np.where(same, order[hit], -1)
    return found


def _meanings(names: np.ndarray, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What to compare, likeliest first: names and keys, and each without more and more of its first parts."""
    yield names, keys
    base = _without_source(keys)
    if base is not keys:
        yield names, base
    for shorter in _tails(names):
        yield shorter, base
    for shorter in _tails(base):
        yield names, shorter


def find_rows(names: Sequence[str], keys: np.ndarray) -> np.ndarray:
    """The row of each name, int64 [names], -1 where the set has none. keys: bytes [N], N > 0.

    Arrays are sorted and compared, there is no table of Python strings. UserError for a name with two meanings.
    """
    rows = np.full(len(names), -1, np.int64)
    for stripped in (True, False):  # the suffix is part of the key in some sets
        todo = np.flatnonzero(rows < 0)
        if not stripped:
            todo = np.array([row for row in todo if names[row].lower().endswith(IMAGE_ENDINGS)], np.int64)
        ours = _encoded(names, todo, stripped, keys.dtype.itemsize)
        for left, right in _meanings(ours, keys):
            open_ = np.flatnonzero(rows[todo] < 0)
            if not len(open_):
                break
            rows[todo[open_]] = _match(left[open_], right)
    return rows


def _rows_of_names(path: Path, reader: Reader) -> np.ndarray:
    names, keys = read_names(path), reader.keys
    if not names or not len(keys):
        raise UserError(
            f"keep-list {path} has {len(names)} names, the set {len(keys)} samples; there is nothing to keep"
        )
    try:
        rows = find_rows(names, keys)
    except UnicodeEncodeError as error:
        raise UserError(f"{path} holds {error.object[:80]!r} among its names, which is no text; mend it") from error
    missing = int((rows < 0).sum())
    if missing == len(names):
        raise UserError(
            f"none of the {missing:,} names of {path} is in the set: a name is {names[0]!r}, a key {Keys(keys)[0]!r}"
        )
    if missing and os.environ.get("RANK", "0") == "0":  # told once, not by every process of a launch
        told = names[int(np.flatnonzero(rows < 0)[0])]
        print(f"{path}: {missing:,} of {len(names):,} names are not in the set, {told!r} for one", file=sys.stderr)
    return rows[rows >= 0]


def ordered(path: Path | str, reader: Reader) -> np.ndarray:
    """The rows of a list of names in the order of the list, each once; int64."""
    rows = _rows_of_names(Path(path), reader)
    return rows[np.sort(np.unique(rows, return_index=True)[1])]


def load(path: Path | str, reader: Reader) -> np.ndarray:
    """The rows to keep, int64, sorted, each once; at least one.

    Names that the set does not have are counted and told. UserError for a list of another set, and if none is there.
    """
    path = Path(path)
    if check_kind(path) == ".npz":
        return _rows_of_npz(path, reader)
    return np.unique(_rows_of_names(path, reader))


def save(path: Path | str, rows: np.ndarray, keys: Keys, facts: dict[str, Any]) -> None:
    """Write a keep-list of the kind that its ending names.

    rows: int64, best first; lists of names keep that order. keys: of the whole set. facts: JSON-able, with the `set`
    that the rows belong to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if check_kind(path) in NAMES:
            write_names(path, (f"{key}.jpg" for key in keys[rows]))
            return
        stored = io.BytesIO()
        np.savez(stored, rows=np.sort(rows), facts=np.array(json.dumps(facts)))
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_bytes(stored.getvalue())
        beside.replace(path)
    except OSError as error:
        raise UserError(f"keep-list {path} cannot be written: {error.strerror or error}") from error
