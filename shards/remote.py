"""Files behind a URL (s3://, https://, gs://, whatever fsspec knows), read in blocks that are asked for again.

Credentials and addresses come from where fsspec and the library of the scheme look for them: for S3 AWS_PROFILE or
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for another store than Amazon's FSSPEC_S3_ENDPOINT_URL=http://host:9000,
for a public bucket FSSPEC_S3='{"anon": true}', for a web server FSSPEC_HTTP='{"headers": {"Authorization": "..."}}'.
"""

import os
import random
import re
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import fsspec.asyn
import fsspec.config
from fsspec.exceptions import FSTimeoutError
from pydantic import Field

from recipes import locks
from recipes.errors import UserError
from recipes.load import Section
from shards.faults import final, shown, told

T = TypeVar("T")
LONGEST_WAIT_S = 20.0  # seconds between two attempts
SMALLEST_BLOCK = 1 << 16  # bytes; a slow line is not asked for less at a time
ROUNDS = 2  # times that a file is fetched from its first byte before its crc32 is believed to be another one


class RemoteConfig(Section):
    """How patiently remote files are read."""

    attempts: int = Field(10, ge=1, le=100)  # times that a block is asked for before the run ends with an error
    first_wait_s: float = Field(0.1, ge=0, le=60)  # seconds before the second attempt; doubled for each further one
    block_mb: float = Field(8.0, gt=0, le=1024)  # MiB asked for at a time; halved for a while when it takes too long
    stall_s: float = Field(10.0, gt=0)  # seconds after which an unfinished block is given up and asked for again

    @property
    def block(self) -> int:
        """Bytes asked for at a time."""
        return max(1, int(self.block_mb * 2**20))

    def wait_s(self, number: int) -> float:
        """Seconds, at most, between the attempts `number` (1 = the first) and `number` + 1."""
        return min(LONGEST_WAIT_S, self.first_wait_s * 2 ** (number - 1))

    @property
    def silence_s(self) -> float:
        """Seconds, at most, in which a fetch that is alive gets no byte."""
        return self.attempts * self.stall_s + sum(self.wait_s(number) for number in range(1, self.attempts))


DEFAULTS = RemoteConfig()
_kept: set[Any] = set()


def is_remote(path: str) -> bool:
    """Whether this is a URL, `scheme://...`, and not a path or `SOURCE:PATH`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path of the URL in it."""
    scheme, settings, own = url.partition("://")[0], fsspec.config.conf, {}
    if scheme in ("s3", "s3a"):
        # one layer of attempts, ours: botocore's and s3fs's inside it would multiply the waits
        given = settings.get("s3", {}).get("config_kwargs", {})
        own["config_kwargs"] = {"retries": {"total_max_attempts": 1}, **given}
    elif scheme in ("http", "https"):
        # a body that the server packs on the way has other offsets than the file
        given = {**settings.get("http", {}).get("headers", {}), **settings.get("https", {}).get("headers", {})}
        own["headers"] = {"Accept-Encoding": "identity", **given}
    system, path = fsspec.url_to_fs(url, **own)  # fsspec gives each process its own
    if scheme in ("s3", "s3a"):
        system.retries = 1
    if system.async_impl:
        # never let go: a forked child that clears up its parent's would take sockets off the loop that they share
        _kept.add(system)
    return system, path


def _within(seconds: float, system: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a file system; TimeoutError when it takes longer."""
    late = f"no whole answer in {seconds:g} s (cache.remote.stall_s)"
    if system.async_impl:
        try:
            return fsspec.asyn.sync(system.loop, getattr(system, f"_{name}"), *args, timeout=seconds, **kwargs)
        except FSTimeoutError as error:
            raise TimeoutError(late) from error
    box: list[Any] = []

    def run() -> None:
        try:
            box.append((getattr(system, name)(*args, **kwargs), None))
        except Exception as error:  # raised again below
            box.append((None, error))

    thread = threading.Thread(target=run, daemon=True)  # one that hangs for good is left behind
    thread.start()
    thread.join(seconds)
    if not box:
        raise TimeoutError(late)
    result, error = box[0]
    if error is not None:
        raise error
    return result


def _insist(url: str, config: RemoteConfig, attempt: Callable[[], T]) -> T:
    """What `attempt` gives, tried again while its error is one that may pass. UserError in the end."""
    for number in range(1, config.attempts + 1):
        try:
            return attempt()
        except (TypeError, NameError, AssertionError, MemoryError):
            raise
        except Exception as error:
            if (sentence := final(error, url)) is not None:
                raise UserError(sentence) from error
            last = error
        if number < config.attempts:
            # by chance shorter, so that many processes do not come back all at once
            time.sleep(config.wait_s(number) * random.SystemRandom().uniform(0.5, 1))
    raise UserError(
        f"cannot read {shown(url)}: {config.attempts} attempts failed, the last with {told(last)}; check the "
        "network and the server, or raise cache.remote.attempts"
    ) from last


def read_bytes(url: str, config: RemoteConfig = DEFAULTS) -> bytes:
    """A small file as a whole. UserError naming the URL."""
    system, path = _insist(url, config, lambda: _filesystem(url))
    return _insist(url, config, lambda: _within(config.stall_s, system, "cat_file", path))


class _Blocks:
    """The bytes of one remote file from a place on. size: bytes of the whole file."""

    def __init__(self, url: str, size: int, config: RemoteConfig):
        self.url, self.size, self.config, self.step = url, size, config, config.block
        self.system, self.path = _insist(url, config, lambda: _filesystem(url))

    def next(self, at: int) -> bytes:
        """At least one byte from `at` on, never beyond the end."""
        data = _insist(self.url, self.config, lambda: self._ask(at))
        self.step = min(self.config.block, 2 * self.step)
        return data

    def _ask(self, at: int) -> bytes:
        wanted = min(self.step, self.size - at)
        end = at + wanted + (at + wanted == self.size)  # one byte more at the end: it shows a file that is longer
        try:
            data = _within(self.config.stall_s, self.system, "cat_file", self.path, start=at, end=end)
        except TimeoutError:
            self.step = max(self.step // 2, min(SMALLEST_BLOCK, self.config.block))
            raise
        if len(data) > end - at:  # the server knows no ranges and sent the whole file
            data = data[at:]
        if at + len(data) > self.size:
            raise OSError(f"it is longer than the {self.size} bytes expected, so another file")
        if len(data) < wanted:
            raise OSError(f"{len(data)} bytes came where {wanted} were asked for")
        return data


def _checksum(descriptor: int, size: int) -> int:
    crc, at = 0, 0
    while at < size and (data := os.pread(descriptor, 1 << 20, at)):
        crc, at = zlib.crc32(data, crc), at + len(data)
    return crc


def _write(descriptor: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written


def download(url: str, descriptor: int, size: int, crc32: int | None, config: RemoteConfig) -> None:
    """Bring the `size` bytes of a remote file into an open file, going on after the bytes that it holds already.

    UserError naming the URL; OSError when the bytes cannot be written.
    """
    here = os.fstat(descriptor).st_size
    if here and (crc32 is None or here > size):  # what is there cannot be told from an older file's bytes
        os.ftruncate(descriptor, here := 0)
    blocks = _Blocks(url, size, config)
    for _ in range(ROUNDS + (here > 0)):
        crc = _checksum(descriptor, here)
        while here < size:
            data = blocks.next(here)
            _write(descriptor, data, here)
            crc, here = zlib.crc32(data, crc), here + len(data)
        if crc32 is None or crc == crc32:
            os.fdatasync(descriptor)
            return
        os.ftruncate(descriptor, here := 0)
    raise UserError(
        f"{shown(url)} is damaged or was replaced: crc32 {crc32:08x} is expected, {crc:08x} came, "
        f"{ROUNDS} times over; upload or pack it again"
    )


def _size(url: str, config: RemoteConfig) -> int:
    """Bytes of a remote file as its server tells them."""
    system, path = _insist(url, config, lambda: _filesystem(url))
    size = _insist(url, config, lambda: _within(config.stall_s, system, "info", path))["size"]
    if size is None:
        raise UserError(f"{shown(url)} cannot be fetched: the server does not tell its size")
    return size


def _fetch(url: str, into: Path, size: int | None, crc32: int | None, config: RemoteConfig) -> None:
    beside = into.with_name(f".{into.name}.part")
    while True:
        descriptor = locks.take(beside, os.O_RDWR | os.O_CREAT, wait=True)
        assert descriptor is not None
        try:
            if locks.is_at(descriptor, into):  # another process fetched it while this one waited
                return
            if locks.is_at(descriptor, beside):
                try:
                    download(url, descriptor, _size(url, config) if size is None else size, crc32, config)
                except UserError:
                    beside.unlink()
                    raise
                beside.replace(into)
                return
        finally:
            locks.release(descriptor)


def fetch(url: str, into: Path, size: int | None, crc32: int | None, config: RemoteConfig = DEFAULTS) -> None:
    """Copy a remote file to `into`, which is never seen half written; one process fetches and others wait for it.

    size (bytes), crc32: what it must have; None = not known. What a killed fetch left is gone on with. UserError
    naming the URL or the path.
    """
    try:
        _fetch(url, Path(into), size, crc32, config)
    except OSError as error:
        raise UserError(f"cannot write {into}: {error.strerror or error}") from error
