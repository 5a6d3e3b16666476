"""Disks that are full, small or read-only, for tests: a limit on the size of files, and a small disk in memory.

`mount` gives a process a file system of its own, which needs Linux's user namespaces; `PERMITTED` says whether they can
be had. In tests that fork entry scripts (forked.py) the functions here are what is prepared before the script.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes import locks

NEW_USER, NEW_MOUNTS, READ_ONLY, REMOUNT = 0x10000000, 0x00020000, 1, 32  # of unshare(2) and mount(2)
FILLER = "filler"


@functools.cache
def permitted() -> bool:
    """Whether a process here may mount a file system of its own."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def needs_mounts() -> None:
    """Skip the test where nothing can be mounted."""
    if not permitted():
        pytest.skip("no user namespaces here: a process cannot mount a small disk of its own (unshare -rm)")


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: OSError EFBIG, as ENOSPC comes amid a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _checked(status: int) -> None:
    if status:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount(folder: str, megabytes: int, into: str) -> None:
    """An empty disk of so many megabytes in `folder`, seen by this process and its children alone.

    It vanishes with the process; what lies there at its regular end is copied to `into`, the filler left out.
    """
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    _checked(libc.unshare(NEW_USER | NEW_MOUNTS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    options = f"size={megabytes}m".encode()
    _checked(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options))
    atexit.register(shutil.copytree, folder, into, ignore=shutil.ignore_patterns(FILLER), dirs_exist_ok=True)


def make_read_only(folder: str) -> None:
    """Nothing can be written to what `mount` made any more, as after an error of a disk."""
    for descriptor in locks._kept.values():  # the system does not do it while a file is open for writing
        os.dup2(os.open(os.devnull, os.O_RDONLY), descriptor)
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.mount(None, os.fsencode(folder), None, REMOUNT | READ_ONLY, None))


def fill(folder: str, free: int = 0) -> None:
    """Leave so many bytes free on the disk, to the next page."""
    with open(Path(folder) / FILLER, "ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
        file.truncate(file.tell() - free)


def make_room(folder: str) -> None:
    """Undo `fill`."""
    (Path(folder) / FILLER).unlink()


def _after_lines(module: str, acts: dict[int, Any]) -> None:
    """Call acts[n] when the journal of `module` has recorded step n (counted from 0)."""
    import importlib

    journal = importlib.import_module(module).Journal
    record = journal.record

    def recorded(self: Any, step: int, *given: Any, **named: Any) -> Any:
        result = record(self, step, *given, **named)
        acts.get(step, lambda: None)()
        return result

    journal.record = recorded


def full_between(
    folder: str, module: str, first: int, last: int | None, read_only: bool = False, free: int = 0
) -> None:
    """The disk is full (or read-only) after step `first` until after step `last`; None: to the end. From 0."""
    begin = functools.partial(make_read_only, folder) if read_only else functools.partial(fill, folder, free)
    acts = {first: begin}
    if last is not None:
        acts[last] = functools.partial(make_room, folder)
    _after_lines(module, acts)


def note_files(file: str, folder: str, module: str, steps: list[int]) -> None:
    """Write down which files lie in `folder` after these steps, a JSON list a line."""

    def note() -> None:
        found = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
        with open(file, "a") as log:
            log.write(json.dumps(found) + "\n")

    _after_lines(module, dict.fromkeys(steps, note))


def impatient() -> None:
    """Do not wait for a lock."""
    locks.PATIENCE_S = 0.0


def vanish(path: str, module: str, step: int) -> None:
    """A folder is deleted after step `step`, counted from 0."""
    _after_lines(module, {step: functools.partial(shutil.rmtree, path)})


def cut_short(path: str, module: str, step: int) -> None:
    """A file loses its second half after step `step`, counted from 0."""
    _after_lines(module, {step: lambda: os.truncate(path, os.path.getsize(path) // 2)})


def vanish_when_open(path: str) -> None:
    """A shard is deleted when the reader of its set has been made, before the first sample is read."""
    from shards.reader import ShardReader

    begin = ShardReader.__init__

    def begun(self: Any, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        os.unlink(path)

    ShardReader.__init__ = begun
