"""The folder of a cache that the processes of a machine share: its files, their locks, and room for more of them.

A file tells its size in its name, also while it is being fetched. So what is taken and what is promised to fetches in
progress is one listing of the folder, and nothing else has to be put right after a process was killed.

Locks (flock, so the folder belongs on a local disk): `lock` while the folder is changed; a part exclusively by its only
fetcher; a whole file shared by everyone who has it open, so what can be locked exclusively is in use by nobody.
"""

import contextlib
import enum
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from recipes.locks import is_at, release, take

NAME = re.compile(r"[0-9a-f]{40}-([0-9]+)\.(shard|part)")
FRESH_S = 300.0  # seconds for which read-ahead leaves a file alone that was fetched ahead and not opened yet

# the times of a file are notes of ours, last opened (atime) and last fetched or asked for (mtime): reading leaves them
READ = os.O_RDONLY | getattr(os, "O_NOATIME", 0)


class Claim(enum.Enum):
    """Why a file cannot be fetched now."""

    HERE = "it is in the folder"
    FETCHING = "somebody else fetches it"
    FULL = "there is no room"


class Usage(NamedTuple):
    """What a full folder is full of."""

    used: int  # files that somebody has open
    used_bytes: int
    fetching: int  # fetches in progress
    fetching_bytes: int


class _Entry(NamedTuple):
    path: str
    size: int  # bytes that it takes or is going to take
    part: bool
    last_use: int  # ns
    announced: bool  # fetched or asked for ahead after it was opened last


class CacheFolder:
    """Whole files and parts of at most `bound` bytes together. A stem is a hash, a dash and the size in bytes."""

    def __init__(self, path: Path, bound: int):
        self.path, self.bound = path, bound

    def _shard(self, stem: str) -> Path:
        return self.path / f"{stem}.shard"

    def _part(self, stem: str) -> Path:
        return self.path / f"{stem}.part"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else changes the folder meanwhile."""
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = take(self.path / "lock", os.O_RDWR | os.O_CREAT, wait=True)
        assert descriptor is not None, "it waits"
        try:
            yield
        finally:
            release(descriptor)

    def _entries(self) -> list[_Entry]:
        found = []
        with os.scandir(self.path) as listing:
            for item in listing:
                if match := NAME.fullmatch(item.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = item.stat(follow_symlinks=False)
                        size = max(int(match[1]), status.st_size)
                        opened, fetched = status.st_atime_ns, status.st_mtime_ns
                        part = match[2] == "part"
                        found.append(_Entry(item.path, size, part, max(opened, fetched), opened < fetched))
        return found

    def open(self, stem: str, size: int) -> int | None:
        """Descriptor of a whole file with a shared lock; None when it is not here."""
        path = self._shard(stem)
        try:
            descriptor = os.open(path, READ)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits only while somebody throws it out
        status = os.fstat(descriptor)
        if status.st_nlink and status.st_size == size:
            os.utime(descriptor, ns=(time.time_ns(), status.st_mtime_ns))
            return descriptor
        with self._alone():
            if is_at(descriptor, path):  # of the wrong size: damaged since it was fetched
                path.unlink()
        os.close(descriptor)
        return None

    def announce(self, stem: str) -> bool:
        """Whether the file is here; if so it counts as used now, because it is going to be."""
        try:
            descriptor = take(path := self._shard(stem), os.O_RDONLY)
        except FileNotFoundError:
            return False
        if descriptor is not None:  # nobody has it open
            os.utime(descriptor, ns=(os.fstat(descriptor).st_atime_ns, time.time_ns()))
            here = is_at(descriptor, path)
            release(descriptor)
            return here
        return True

    def claim(self, stem: str, size: int, gently: bool = False) -> int | Claim:
        """Descriptor of the part to fetch into, which is the caller's until it is released, or why not.

        gently: leave alone what was fetched ahead and not opened yet.
        """
        with self._alone():
            if self._shard(stem).exists():
                return Claim.HERE
            path = self._part(stem)
            if not path.exists() and not self._make_room(size, gently):
                return Claim.FULL
            descriptor = take(path, os.O_RDWR | os.O_CREAT)
            return Claim.FETCHING if descriptor is None else descriptor

    def _make_room(self, size: int, gently: bool) -> bool:
        """Throw out what was not used for longest until `size` bytes fit; nothing, if they cannot."""
        entries = self._entries()
        missing = sum(entry.size for entry in entries) + size - self.bound
        chosen: list[tuple[int, str]] = []
        fresh = time.time_ns() - int(FRESH_S * 1e9)
        for entry in sorted(entries, key=lambda entry: (not entry.part, entry.last_use)):
            if missing <= 0:
                break
            if gently and not entry.part and entry.announced and entry.last_use > fresh:
                continue
            with contextlib.suppress(FileNotFoundError):
                descriptor = take(entry.path, os.O_RDONLY)
                if descriptor is not None:
                    chosen.append((descriptor, entry.path))
                    missing -= entry.size
        for descriptor, path in chosen:
            if missing <= 0:
                os.unlink(path)
            release(descriptor)
        return missing <= 0

    def keep(self, part: int, stem: str, opened: bool) -> int:
        """The part is whole: give it its name. A descriptor with a shared lock; opened: it counts as used."""
        now = time.time_ns()
        os.utime(part, ns=(now if opened else 0, now))
        with self._alone():  # nobody can throw it out between the two locks
            os.rename(self._part(stem), self._shard(stem))
            fcntl.flock(part, fcntl.LOCK_SH)
            descriptor = os.open(self._shard(stem), READ)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def drop(self, stem: str) -> None:
        """Throw away the part that the caller has claimed."""
        with self._alone():
            self._part(stem).unlink(missing_ok=True)

    def came(self, stem: str) -> int | None:
        """Bytes that are here of a file being fetched; None when nobody fetches it."""
        try:
            return self._part(stem).stat().st_size
        except FileNotFoundError:
            return None

    def usage(self) -> Usage:
        """What cannot be thrown out now."""
        held: tuple[list[int], list[int]] = ([], [])
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                descriptor = take(entry.path, os.O_RDONLY)
                if descriptor is None:
                    held[entry.part].append(entry.size)
                else:
                    release(descriptor)
        return Usage(len(held[False]), sum(held[False]), len(held[True]), sum(held[True]))
