"""JSON that others wrote: a tree that fits into memory, or a ValueError."""

import json
from typing import Any

VALUES = 4_000_000  # in one file; Python takes 60 to 100 bytes for each, whatever it is


def parse(data: bytes) -> Any:
    """The tree. ValueError for what is no JSON in UTF-8, nests without end, or holds more than VALUES values."""
    # commas and brackets in text count too; a file of captions has some twenty an image
    count = sum(map(data.count, (b",", b"[", b"{")))
    if count > VALUES:
        raise ValueError(f"it holds {count:,} values, more than the limit of {VALUES:,}")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("its lists or objects lie in one another without end") from error
