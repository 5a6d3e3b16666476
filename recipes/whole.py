"""Small files that a reader sees as a whole: the new one or the one before, also after a kill or on a full disk."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.errors import naming


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, also one after a power cut, sees all of it or the previous one.

    OSError, which names the file, where the disk does not take it.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path), open(draft, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)  # only there when the lines above failed, for example on a full disk
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself lives in the folder
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as indented JSON; numpy and torch scalars become numbers, nan and inf become null."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The value in JSON's own types. JSON has no nan or inf, so they become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be recorded as JSON")
