"""Eight small files and a cache that holds a few of them."""

import contextlib
import os
import time
import zlib
from pathlib import Path

import faulty
import fsspec

from shards.cache import CacheConfig, ShardCache
from shards.remote import RemoteConfig

SIZE = 10_000  # bytes
FILES = {f"{name}.tar": faulty.noise(number, SIZE) for number, name in enumerate("abcdefgh")}
QUICK = RemoteConfig(attempts=3, first_wait_s=0.001, block_mb=0.001, stall_s=5)


def in_memory() -> fsspec.AbstractFileSystem:
    """The files in fsspec's memory:// and nothing else."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    for name, data in FILES.items():
        system.pipe_file(f"/{name}", data)
    return system


def config(folder: Path, files: float = 3, **settings) -> CacheConfig:
    """A cache for so many of FILES."""
    return CacheConfig(
        **{"folder": folder, "gigabytes": files * SIZE / 1e9, "wait_s": 0.2, "remote": QUICK, "threads": 1, **settings}
    )


def item(name: str, base: str = "memory://") -> tuple[str, int, int]:
    data = FILES[f"{name}.tar"]
    return f"{base}{name}.tar", len(data), zlib.crc32(data)


def touch(cache: ShardCache, names: str, base: str = "memory://") -> None:
    """Open, read and close these files."""
    for name in names:
        descriptor = cache.open(*item(name, base))
        assert os.pread(descriptor, 2 * SIZE, 0) == FILES[f"{name}.tar"]
        os.close(descriptor)


def held(cache: ShardCache, base: str = "memory://") -> str:
    """Which of FILES are in the cache, by their bytes."""
    found = []
    for path in cache.path.glob("*.shard"):
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOATIME)  # to look is not to use
            found.append(os.pread(descriptor, 2 * SIZE, 0))
            os.close(descriptor)
    names = [name for name, data in FILES.items() if data in found]
    assert len(names) == len(found), "every file is one of ours"
    return "".join(sorted(name[0] for name in names))


def until(true, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)
