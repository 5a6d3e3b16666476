"""Only one process at a time: a file that is locked, and that tells who locked it.

    with locks.holding(folder / ".lock", f"another process is changing {folder}", "wait for it"):
        ...

The lock is the system's (flock): it ends with the process that holds it, however that ends, and the file that stays
behind locks nobody out. The text in the file (pid, host, begin, command) is for the error message alone. Processes that
were forked meanwhile, a loader's workers for example, do not hold it: after a SIGKILL the next start need not wait for
them. On a shared folder it works between machines where the file server supports locks (NFS does).
"""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from recipes.errors import UserError, naming

PATIENCE_S = 3.0  # a process that was killed holds its lock until its memory is given back
POLL_S = 0.05
LONGEST = 4096  # bytes of the owner's text that are read
COMMAND = 200  # characters of the command that are told
# what a file system without locks answers
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)

_guard = threading.Lock()
_exclusive: set[int] = set()  # descriptors whose locks must not live on in a forked child
_kept: dict[Path, int] = {}  # what this process holds until its end: descriptor by path


def take(path: Path | str, flags: int, wait: bool = False) -> int | None:
    """A descriptor of the file with an exclusive lock; None when somebody else has one and `wait` is not asked for.

    flags: of os.open. End it with `release`.
    """
    with _guard:
        descriptor = os.open(path, flags, 0o666)
        _exclusive.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        release(descriptor)
        return None
    except BaseException:
        release(descriptor)
        raise
    return descriptor


def release(descriptor: int) -> None:
    """Unlock and close."""
    with _guard:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        _exclusive.discard(descriptor)
        os.close(descriptor)


def _after_fork() -> None:
    for descriptor in _exclusive:
        os.close(descriptor)
    _exclusive.clear()
    _kept.clear()
    _guard.release()


os.register_at_fork(before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_after_fork)


def is_at(descriptor: int, path: Path | str) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    """Who wrote himself into the file, for an error message."""
    try:
        with open(path, "rb") as file:
            told = json.loads(file.read(LONGEST))
        command = told["command"] if len(told["command"]) <= COMMAND else told["command"][:COMMAND] + "..."
        text = f"process {int(told['pid'])} on {told['host']}, since {told['started']} ({command})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "a process that did not tell its name"
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _sign(descriptor: int, path: Path) -> None:
    """Write this process into the file."""
    told = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv)[: LONGEST // 8],  # JSON takes up to six bytes a character
    }
    with naming(path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(told) + "\n").encode(), 0)


def _hold(path: Path, busy: str, way_out: str) -> int:
    """A descriptor with the lock, signed; UserError that names the owner where somebody else keeps it."""
    patience = time.monotonic() + PATIENCE_S
    while True:
        descriptor = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = take(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            pass  # the owner before deletes the folder at this moment
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            print(
                f"warning: the file system of {path} has no locks ({error.strerror}): see to it yourself that only one "
                "process works there",
                file=sys.stderr,
            )
            with _guard:
                descriptor = os.open(path, os.O_RDWR)
                _exclusive.add(descriptor)
        if descriptor is not None:
            if is_at(descriptor, path):  # else the owner before has deleted it
                break
            release(descriptor)
        elif time.monotonic() > patience:
            raise UserError(f"{busy}: {_owner(path)}; {way_out}")
        time.sleep(POLL_S)
    try:
        _sign(descriptor, path)
    except BaseException:
        release(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def holding(path: Path, busy: str, way_out: str, inherited: bool = False) -> Iterator[None]:
    """Hold the lock `path` in this block; its folder is made where there is none.

    busy, way_out: what is going on where somebody else holds it, and what to do then; UserError is made of them.
    inherited: processes started with close_fds=False hold it, too, until they end. OSError where the file cannot be
    written.
    """
    descriptor = _hold(Path(path), busy, way_out)
    if inherited:
        os.set_inheritable(descriptor, True)
    try:
        yield
    finally:
        if inherited:
            with _guard:  # unlocking would take it from them
                _exclusive.discard(descriptor)
                os.close(descriptor)
        else:
            release(descriptor)


def keep(path: Path, busy: str, way_out: str) -> None:
    """`holding` until `drop` or the end of the process. The same process may ask again for what it holds."""
    path = Path(os.path.abspath(path))
    if (mine := _kept.get(path)) is not None:
        if is_at(mine, path):
            return
        drop(path)  # somebody deleted the file
    _kept[path] = _hold(path, busy, way_out)


def drop(path: Path) -> None:
    """Give back what `keep` took; nothing happens if there is none."""
    if (descriptor := _kept.pop(Path(os.path.abspath(path)), None)) is not None:
        release(descriptor)
