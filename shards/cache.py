"""Remote shards in a folder on the local disk, bounded in bytes and shared by all processes of the machine."""

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from recipes.errors import UserError
from recipes.load import Section
from shards.cache_folder import CacheFolder, Claim, release
from shards.faults import shown
from shards.remote import RemoteConfig, download

TELL_S = 5.0  # seconds of waiting after which a line says what for
QUEUE = 1024  # files that one process queues for read-ahead; what comes on top is fetched when it is opened
PAUSES_S = (0.01, 0.25, 5.0)  # between two looks at a folder: the first, the longest when opening, when reading ahead


class CacheConfig(Section):
    """Where remote shards are kept, and how much of them."""

    folder: Path | None = None  # on a local disk; None = $XDG_CACHE_HOME/personssl/shards or ~/.cache/personssl/shards
    gigabytes: float = Field(100.0, gt=0)  # 10^9 bytes at most in the folder, whatever the number of processes
    threads: int = Field(2, ge=0, le=64)  # of read-ahead, in each process; 0 = none
    wait_s: float = Field(120.0, gt=0)  # seconds to wait for room while everything in the cache is in use
    remote: RemoteConfig = RemoteConfig()


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "personssl" / "shards"


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


class _Queue:
    """Work for daemon threads, which start when there is some and end when there is none; each process has its own."""

    def __init__(self, threads: int, work: Callable[..., None]):
        self.threads, self.work = threads, work
        self._empty()

    def _empty(self) -> None:
        self.process, self.running, self.lock = os.getpid(), 0, threading.Lock()
        self.items: dict[str, tuple[Any, ...]] = {}

    def put(self, name: str, item: tuple[Any, ...]) -> None:
        if self.process != os.getpid():  # threads do not survive a fork, locked locks do
            self._empty()
        with self.lock:
            if len(self.items) < QUEUE:
                self.items.setdefault(name, item)
            if self.running >= self.threads:
                return
            self.running += 1
        try:
            threading.Thread(target=self._run, name="shards ahead", daemon=True).start()
        except RuntimeError:  # no more threads, or the program ends; whoever opens the file fetches it
            with self.lock:
                self.running -= 1

    def drop(self, name: str) -> None:
        if self.process == os.getpid():
            with self.lock:
                self.items.pop(name, None)

    def _run(self) -> None:
        while True:
            with self.lock:
                if not self.items:
                    self.running -= 1
                    return
                item = self.items.pop(next(iter(self.items)))
            try:
                self.work(*item)
            except (UserError, OSError):
                continue  # whoever opens the file tries again, and tells


class ShardCache:
    """Local copies of remote files. May be pickled, and used by many threads and processes at once."""

    def __init__(self, config: CacheConfig):
        self.config = config
        self.path = Path(os.path.abspath((config.folder or _default_folder()).expanduser()))
        self.folder = CacheFolder(self.path, int(config.gigabytes * 1e9))
        self.queue = _Queue(config.threads, self._fetch_ahead)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])

    def open(self, url: str, size: int, crc32: int, let_go: Callable[[], bool] | None = None) -> int:
        """A descriptor, to read from, of the local copy, which is fetched if it is not there.

        The copy stays at least until the descriptor is closed (and those that forked children got with it). size:
        bytes, crc32: of the whole file. let_go: called while everything in the cache is in use; closes a file that the
        caller can do without and gives True, or False when it has none. UserError naming the URL and what to change.
        """
        stem = self._stem(url, size, crc32)
        try:
            self.queue.drop(stem)
            descriptor = self.folder.open(stem, size)
            return self._wait(stem, url, size, crc32, let_go) if descriptor is None else descriptor
        except OSError as error:
            raise UserError(
                f"the cache {self.path} cannot be written ({error.strerror or error}); choose another cache.folder, or "
                "a smaller cache.gigabytes if the disk is full"
            ) from error

    def ahead(self, items: Iterable[tuple[str, int, int]]) -> None:
        """Fetch files (url, size, crc32) in the background, in this order; returns at once and never fails."""
        for url, size, crc32 in items:
            stem = self._stem(url, size, crc32)
            try:
                here = self.folder.announce(stem)
            except OSError:
                here = False
            if not here and self.config.threads:
                self.queue.put(stem, (stem, url, size, crc32))

    def _stem(self, url: str, size: int, crc32: int) -> str:
        """Name of the copy; another one when the remote file was replaced."""
        return f"{hashlib.sha256(f'{url} {size} {crc32}'.encode()).hexdigest()[:40]}-{size}"

    def _wait(self, stem: str, url: str, size: int, crc32: int, let_go: Callable[[], bool] | None) -> int:
        """Fetch the file, or wait for the process that does, or for room."""
        if size > self.folder.bound:
            raise UserError(
                f"{shown(url)} with {_gb(size)} does not fit into the cache of {_gb(self.folder.bound)}; raise "
                "cache.gigabytes"
            )
        line = threading.Timer(TELL_S, self._tell, (stem, url, size))
        line.daemon = True
        line.start()
        try:
            pause, came, since, full_since = PAUSES_S[0], None, time.monotonic(), None
            while True:
                if (descriptor := self.folder.open(stem, size)) is not None:
                    return descriptor
                claim = self.folder.claim(stem, size)
                if isinstance(claim, int):
                    return self._fill(claim, stem, url, size, crc32, opened=True)
                now = time.monotonic()
                if claim is Claim.FULL:
                    if let_go is not None and let_go():
                        continue
                    full_since = now if full_since is None else full_since
                    if now - full_since > self.config.wait_s:
                        raise UserError(self._full(url, size))
                else:
                    full_since = None
                    if (here := self.folder.came(stem)) != came:
                        came, since = here, now
                    if now - since > self.config.remote.silence_s + self.config.wait_s:
                        raise UserError(
                            f"another process of this machine fetches {shown(url)} and has got nothing for "
                            f"{now - since:.0f} s; end it"
                        )
                time.sleep(pause)
                pause = min(1.5 * pause, PAUSES_S[1])
        finally:
            line.cancel()

    def _fill(self, part: int, stem: str, url: str, size: int, crc32: int, opened: bool) -> int:
        """Fetch into the part that was claimed; a descriptor with a shared lock."""
        try:
            download(url, part, size, crc32, self.config.remote)
            return self.folder.keep(part, stem, opened)
        except (UserError, OSError):
            self.folder.drop(stem)
            raise
        finally:
            release(part)

    def _fetch_ahead(self, stem: str, url: str, size: int, crc32: int) -> None:
        if size > self.folder.bound:
            return
        pause, until = PAUSES_S[0], time.monotonic() + self.config.wait_s
        while (claim := self.folder.claim(stem, size, gently=True)) is Claim.FULL and time.monotonic() < until:
            time.sleep(pause)
            pause = min(1.5 * pause, PAUSES_S[2])
        if isinstance(claim, int):
            release(self._fill(claim, stem, url, size, crc32, opened=False))

    def _full(self, url: str, size: int) -> str:
        usage, bound = self.folder.usage(), _gb(self.folder.bound)
        return (
            f"the cache {self.path} has no room for {shown(url)} ({_gb(size)}): of its {bound} (cache.gigabytes) "
            f"{usage.used} files in use take {_gb(usage.used_bytes)} and {usage.fetching} being fetched "
            f"{_gb(usage.fetching_bytes)}; raise cache.gigabytes"
        )

    def _tell(self, stem: str, url: str, size: int) -> None:
        here = self.folder.came(stem)
        so_far = "for room in the cache" if here is None else f"{here / 1e6:.1f} of {size / 1e6:.1f} MB are here"
        print(f"waiting for {shown(url)}: {so_far}", file=sys.stderr, flush=True)
