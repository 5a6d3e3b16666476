"""Errors that are for people: one sentence that names the file, key or value, and what to do about it.

Exit codes of every entry script: 0 done; 2 the user must mend something; 130 interrupted by Ctrl-C; an `Exit` brings
its own. Everything else is a fault of ours and keeps its traceback (Python's exit code 1).
"""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_AGAIN = "then run the same command again"
# what the disk or its rights can answer to a correct program: what it means, and what to do; {} is the file
_DISK = {
    errno.ENOSPC: f"the disk is full while writing {{}}: make room there, {_AGAIN}",
    errno.EDQUOT: f"the disk quota is used up while writing {{}}: delete files or have it raised, {_AGAIN}",
    errno.EFBIG: f"{{}} would become larger than its file system or the limit of this shell (`ulimit -f`) permits: "
    f"raise the limit, {_AGAIN}",
    errno.EROFS: "{} lies on a read-only file system: choose another folder, or mount it writable",
    errno.EACCES: "no permission for {}: mend its owner or mode, or choose another place",
    errno.EPERM: "the system does not permit to change {}: mend its owner, mode or attributes, or choose another place",
    errno.EIO: f"the disk fails at {{}} (input/output error): look into the system's log, mend or replace it, {_AGAIN}",
    errno.ESTALE: f"the file server no longer knows {{}} (stale file handle): mount the folder anew, {_AGAIN}",
}
_NEEDS_NAME = (errno.EACCES, errno.EPERM)  # without a file these may mean something else than a file, so: ours


class UserError(ValueError):
    """Something the user gave is wrong. The message is the whole explanation; no traceback is needed."""


class Exit(Exception):
    """The script ends here with this exit code, and on purpose: the message is the whole explanation."""

    def __init__(self, message: str, code: int):
        super().__init__(message, code)  # both, so that it can be sent from process to process
        self.message, self.code = message, code

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def naming(path: os.PathLike | str) -> Iterator[None]:
    """Write the file's name into an OSError: `write` and `fsync` know only the number of a file, `open` a draft."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = os.fspath(path)
        raise


def disk_sentence(error: OSError) -> str | None:
    """What a full, read-only, forbidden or broken disk means to the user; None where it is none of these."""
    number, name = error.errno, error.filename
    if number is None:  # out of a worker process torch brings only the text of the error
        told = re.findall(r"^\w*Error: \[Errno (\d+)\] [^\n:]*(?:: (['\"].*))?$", str(error), re.MULTILINE)
        number, name = (int(told[-1][0]), told[-1][1][1:-1] or None) if told else (None, None)
    if number not in _DISK or (name is None and number in _NEEDS_NAME):
        return None
    return _DISK[number].format("a file" if name is None else os.fsdecode(name))


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what a user can mend, inside an entry script, into one line on stderr and the exit code above."""
    try:
        yield
    except UserError as error:
        # torch's DataLoader puts the traceback of the worker, which ends with "...UserError: ", before the sentence
        sentence, code = "error: " + str(error).rpartition(f"{type(error).__name__}: ")[2].strip(), 2
    except Exit as error:
        sentence, code = error.message, error.code
    except KeyboardInterrupt:
        sentence, code = "interrupted", INTERRUPTED
    except OSError as error:
        if (told := disk_sentence(error)) is None:
            raise
        sentence, code = f"error: {told}", 2
    else:
        return
    print(sentence, file=sys.stderr)
    sys.exit(code)
