"""Lists of image names on disk: the pickles that LUPerson and CFS are published with, and plain text.

A pickle is a program. Here it may build strings, bytes, numbers, lists, tuples and dicts, and is refused at the first
thing beyond that (plain_pickles.py), so a list from a stranger can do nothing.
"""

import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.errors import UserError
from shards import plain_pickles

SIZE_LIMIT = 2**31  # bytes; the list of LUPerson has about 10**8
LONG, LONGEST = 256, 4096  # bytes of a name: from where on it is kept once, and the limit
KINDS = (".pkl", ".txt")


def _unpickle(path: Path) -> Any:
    try:
        return plain_pickles.loads(path.read_bytes())
    except plain_pickles.NotPlain as error:
        raise UserError(
            f"{path} is not a pickled list of names ({str(error)[:200]}); nothing of it was run. Expected is a list of "
            "strings, or a dict with such a list under 'keys'"
        ) from error


def _decode(name: Any, path: Path) -> str:
    if isinstance(name, str | bytes) and len(name) > LONGEST:
        raise UserError(f"{path} holds a name of {len(name):,} characters; no path is longer than {LONGEST:,}")
    if isinstance(name, bytes):
        return name.decode("utf-8", "surrogateescape")
    if isinstance(name, str):
        return name
    told = f" '{name}'" if isinstance(name, int | float) and abs(name) < 1e9 else ""
    raise UserError(f"{path} holds {type(name).__name__}{told} among its names; all must be strings")


def _names(tree: Any, path: Path) -> list[str]:
    if isinstance(tree, dict):
        found = tree.get("keys", tree.get(b"keys"))
        if found is None:
            there = ", ".join(f"{name!r:.80}" for name in list(tree)[:5] if isinstance(name, str | bytes)) or "none"
            raise UserError(f"{path} holds a dict without 'keys' (it has {there}); give the list of names itself")
        tree = found
    if not isinstance(tree, list | tuple):
        raise UserError(f"{path} holds {type(tree).__name__}, not a list of names or a dict with such a list in 'keys'")
    once: dict[bytes, str] = {}  # a short pickle may hold one name a million times
    return [
        once.setdefault(name, _decode(name, path)) if type(name) is bytes and len(name) > LONG else _decode(name, path)
        for name in tree
    ]


def _check_kind(path: Path) -> None:
    if path.suffix.lower() not in KINDS:
        raise UserError(f"{path} is no list of names; its ending must be {' or '.join(KINDS)}")


def read_names(path: Path | str) -> list[str]:
    """The names of a list in their order.

    `.pkl`: a list or tuple of str or bytes, or a dict with one under 'keys', of any protocol; nothing in it is run.
    `.txt`: one name a line, blank lines are passed over. UserError naming the file for everything else.
    """
    path = Path(path)
    _check_kind(path)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError(f"list of names {path} is no file")
        if size > SIZE_LIMIT:
            raise UserError(f"{path} has {size:,} bytes; no list of names is larger than {SIZE_LIMIT:,}")
        if path.suffix.lower() == ".pkl":
            return _names(_unpickle(path), path)
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"list of names {path} does not exist") from error
    except OSError as error:
        raise UserError(f"list of names {path} cannot be read ({error.strerror})") from error
    return [_decode(name, path) for name in (line.rstrip("\r") for line in lines) if name.strip()]


def write_names(path: Path | str, names: Iterable[str]) -> None:
    """Write a list of names by its ending: `.pkl` a plain list of str (protocol 2), `.txt` one a line.

    Written beside and renamed, so a reader sees the old list, the new one or none.
    """
    path = Path(path)
    _check_kind(path)
    names = list(names)
    for name in names:
        if not isinstance(name, str) or not name.strip() or "\n" in name or "\r" in name:
            raise UserError(f"{name!r} cannot stand in the list {path}; a name is a string without line breaks")
    if path.suffix.lower() == ".pkl":
        data = pickle.dumps(names, protocol=2)
    else:
        data = "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
