"""Errors that are for people: one sentence that names the file, key or value, and what to do about it."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Something the user gave is wrong. The message is the whole explanation; no traceback is needed."""


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a UserError inside an entry script into one line on stderr and exit status 2."""
    try:
        yield
    except UserError as error:
        # torch's DataLoader puts the traceback of the worker, which ends with "...UserError: ", before the sentence
        sentence = str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
