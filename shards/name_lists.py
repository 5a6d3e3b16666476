"""Lists of image names on disk: the pickles that LUPerson and CFS are published with, and plain text.

A pickle is a program. Here it may build strings, bytes, numbers, lists, tuples and dicts, and is refused at the first
thing beyond that, so a list from a stranger can do nothing.
"""

import copyreg
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.errors import UserError

SIZE_LIMIT = 2**31  # bytes; the list of LUPerson has about 10**8
KINDS = (".pkl", ".txt")


class _Latin1:
    """What Python 3 writes into pickles of protocol 0 to 2 instead of bytes is a call of `_codecs.encode`."""

    __slots__ = ()

    def __call__(self, text: str, encoding: str) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("it calls a codec")
        return text.encode("latin1")


class _NamesOnly(pickle.Unpickler):
    """Builds plain values; whatever would import or call something is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _Latin1()
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an object outside")


def _unpickle(path: Path) -> Any:
    copyreg.clear_extension_cache()  # what lies in there would be taken without asking find_class
    with path.open("rb") as file:
        try:
            return _NamesOnly(file, encoding="utf-8", errors="surrogateescape").load()
        except Exception as error:  # damaged or hostile bytes make the unpickler raise almost anything
            raise UserError(
                f"{path} is not a pickled list of names ({str(error).strip() or type(error).__name__}); nothing of it "
                "was run. Expected is a list of strings, or a dict with such a list under 'keys'"
            ) from error


def _decode(name: Any, path: Path) -> str:
    if isinstance(name, bytes):
        return name.decode("utf-8", "surrogateescape")
    if isinstance(name, str):
        return name
    raise UserError(f"{path} holds {type(name).__name__} {str(name)[:80]!r} among its names; all must be strings")


def _names(tree: Any, path: Path) -> list[str]:
    if isinstance(tree, dict):
        found = tree.get("keys", tree.get(b"keys"))
        if found is None:
            there = ", ".join(map(repr, list(tree)[:5])) or "none"
            raise UserError(f"{path} holds a dict without 'keys' (it has {there}); give the list of names itself")
        tree = found
    if not isinstance(tree, list | tuple):
        raise UserError(f"{path} holds {type(tree).__name__}, not a list of names or a dict with such a list in 'keys'")
    return [_decode(name, path) for name in tree]


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
        if size > SIZE_LIMIT:
            raise UserError(f"{path} has {size:,} bytes; no list of names is larger than {SIZE_LIMIT:,}")
        if path.suffix.lower() == ".pkl":
            return _names(_unpickle(path), path)
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"list of names {path} does not exist") from error
    except OSError as error:
        raise UserError(f"list of names {path} cannot be read ({error.strerror})") from error
    return [name for name in (line.rstrip("\r") for line in lines) if name.strip()]


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
