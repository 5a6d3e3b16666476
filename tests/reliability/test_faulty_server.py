"""A server with 30 % of failures: no wrong byte, bounded attempts, and never a bad file in the cache (R16)."""

import contextlib
import multiprocessing
import os
import random
import time
import zlib
from pathlib import Path

import faulty
import fsspec.config
import pytest

from recipes.errors import UserError
from shards import remote
from shards.cache import CacheConfig, ShardCache
from shards.remote import RemoteConfig

BLOCK, BLOCKS, COUNT = 1 << 14, 5, 12  # bytes; blocks of a file (the last one short); files
FILES = {f"crops/{number}.tar": faulty.noise(number, BLOCKS * BLOCK - 77) for number in range(COUNT)}
LOSSES = ("500", "503", "reset", "short", "cut")
DELAY_S = 0.005  # of an answer; in proportion to the first wait what 8 MiB take on a line of 100 MB/s
QUICK = RemoteConfig(first_wait_s=0.005, block_mb=BLOCK / 2**20, stall_s=0.3)
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def server():
    pytest.importorskip("aiohttp")
    with faulty.serving(FILES) as running:
        yield running


def config(folder: Path, files: float, **settings) -> CacheConfig:
    gigabytes = files * BLOCKS * BLOCK / 1e9
    return CacheConfig(**{"folder": folder, "gigabytes": gigabytes, "wait_s": 60, "remote": QUICK, **settings})


def read(cache: ShardCache, name: str, base: str) -> bool:
    """Whether the file comes as it is."""
    data = FILES[name]
    descriptor = cache.open(base + name, len(data), zlib.crc32(data))
    same = os.pread(descriptor, len(data) + 1, 0) == data
    os.close(descriptor)
    return same


def bad(folder: Path) -> list[str]:
    """Files of the cache that are none of the server's."""
    good, found = set(map(zlib.crc32, FILES.values())), []
    for path in folder.glob("*.shard"):
        with contextlib.suppress(FileNotFoundError):
            if zlib.crc32(path.read_bytes()) not in good:
                found.append(path.name)
    return found


def taken(folder: Path) -> int:
    """Bytes in the folder."""
    total = 0
    for path in folder.glob("*-*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def through(server: faulty.Server, folder: Path, base: str = "") -> float:
    """Seconds for all files, one after the other, each of them right."""
    cache, began = ShardCache(config(folder, COUNT, threads=0)), time.monotonic()
    assert all(read(cache, name, base or server.url("")) for name in FILES)
    assert not bad(folder)
    return time.monotonic() - began


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.row("R16")
def test_a_loss_costs_one_request_more(server, tmp_path, scheme, monkeypatch, figures):
    server.delay_s = DELAY_S
    base = server.url("") if scheme == "http" else "s3://"
    if scheme == "s3":
        pytest.importorskip("s3fs")
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.url("")[:-1], "key": "k", "secret": "s"})
    remote.read_bytes(f"{base}crops/0.tar", QUICK)  # connects
    before = len(server.requests)
    plain = through(server, tmp_path / "plain", base)
    assert len(server.requests) - before == BLOCKS * COUNT
    server.fault, before = faulty.seeded(0, 0.3, LOSSES), len(server.requests)
    lossy = through(server, tmp_path / "lossy", base)
    answers = server.requests[before:]
    lost = sum(answer.fault is not None for answer in answers)
    assert lost > 0.2 * len(answers)
    assert len(answers) == BLOCKS * COUNT + lost, "every loss costs one more request for one block, no more"
    print(f"{scheme}: {lossy / plain:.2f} times the {plain:.2f} s without losses")
    # s3fs waits 0.1 s by itself before it passes an error on, which is much at this size
    assert lossy < plain * 2.5 + (0 if scheme == "http" else 0.2 * lost)
    note = f"one more request each; {lossy / plain:.2f} x the time at this size"
    injected = f"{scheme}: 500, 503, reset, short, cut"
    figures("R16", injected=injected, times=lost, lost=0, wrong=len(bad(tmp_path / "lossy")), note=note)


@pytest.mark.row("R16")
def test_stalls_cost_their_deadline_and_no_more(server, tmp_path):
    server.fault = faulty.seeded(1, 0.05, ("stall",))
    took = through(server, tmp_path)
    stalls = server.count - len(server.requests)
    assert stalls >= 2
    assert stalls * QUICK.stall_s <= took < (stalls + 6) * QUICK.stall_s


@pytest.mark.row("R16")
def test_flipped_bits_never_get_through(server, tmp_path):
    server.fault = lambda path, number: "flip" if number % 13 == 4 else None
    through(server, tmp_path)
    flips = [request.path for request in server.requests if request.fault]
    assert len(flips) == len(set(flips)) >= 6
    assert len(server.requests) == BLOCKS * (COUNT + len(flips)), "these files were fetched twice"


@pytest.mark.parametrize("fault", ["500", "reset", "short", "cut", "stall"])
def test_a_server_that_always_fails_is_told_in_time(server, tmp_path, fault):
    server.fault = lambda path, number: fault
    patience = QUICK.model_copy(update={"attempts": 4, "stall_s": 0.2})
    cache, base, began = ShardCache(config(tmp_path, COUNT, remote=patience)), server.url(""), time.monotonic()
    items = [(base + name, len(data), zlib.crc32(data)) for name, data in FILES.items()]
    cache.ahead(items[:2])
    with pytest.raises(UserError, match=rf"^cannot read {base}crops/9\.tar: 4 attempts failed, the last with "):
        cache.open(*items[9])
    assert time.monotonic() - began < patience.silence_s + 1
    server.fault = lambda path, number: None
    assert read(cache, "crops/9.tar", base), "and it goes on when the server does"


@pytest.mark.parametrize("fault", ["500", "503", "reset", "short", "cut"])
def test_s3_is_asked_as_often_as_said(server, fault, monkeypatch, tmp_path):
    """The attempts of the libraries below would multiply with ours."""
    pytest.importorskip("s3fs")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.url("")[:-1], "key": "k", "secret": "s"})
    server.fault = lambda path, number: fault
    patience = QUICK.model_copy(update={"attempts": 3, "first_wait_s": 0, "stall_s": 10})
    with pytest.raises(UserError, match=r"^cannot read s3://crops/9\.tar: 3 attempts failed, the last with "):
        remote.fetch("s3://crops/9.tar", tmp_path / "9.tar", BLOCK, 1, patience)
    assert len(server.requests) == 3


def _keep_reading(cache: ShardCache, base: str, seed: int) -> None:
    chance = random.Random(seed)
    while True:
        name, *later = chance.sample(list(FILES), 4)
        cache.ahead([(base + other, len(FILES[other]), zlib.crc32(FILES[other])) for other in later])
        assert read(cache, name, base), name


def _killed_readers(server: faulty.Server, folder: Path, seconds: float, seed: int) -> tuple[int, int]:
    """Processes that read and are killed at any moment; how many were, and the most bytes ever seen in the folder."""
    chance, end = random.Random(seed), time.monotonic() + seconds
    # three readers hold or fetch one file each, and read ahead one each
    cache = ShardCache(config(folder, 6.5, threads=1))
    readers, kills, largest = [], 0, 0
    while time.monotonic() < end:
        while len(readers) < 3:
            readers.append(SPAWN.Process(target=_keep_reading, args=(cache, server.url(""), chance.randrange(1 << 30))))
            readers[-1].start()
        moment = time.monotonic() + chance.uniform(0.5, 2)
        while time.monotonic() < moment:
            largest = max(largest, taken(folder))
            assert not bad(folder)
        assert [reader.exitcode for reader in readers] == [None] * 3, "none gave up or got a wrong byte"
        victim = readers.pop(chance.randrange(3))
        victim.kill()
        victim.join()
        kills += 1
    for reader in readers:
        reader.kill()
        reader.join()
    server.fault = lambda path, number: None
    assert all(read(cache, name, server.url("")) for name in FILES), "nothing that the killed ones left is in the way"
    return kills, largest


@pytest.mark.soak
@pytest.mark.row("R16")
@pytest.mark.parametrize("seed", range(3))
def test_readers_are_killed_while_the_server_fails(server, tmp_path, seed, figures):
    server.delay_s = DELAY_S
    server.fault = faulty.seeded(seed, 0.3, (*LOSSES * 4, "stall"))
    kills, largest = _killed_readers(server, tmp_path, 30, seed)
    print(f"{kills} readers killed, {len(server.requests)} requests, at most {largest} bytes")
    assert kills >= 10
    faults = sum(request.fault is not None for request in server.requests)
    note = f"{kills} of the readers killed meanwhile; the cache within its bound"
    injected = "500, 503, reset, short, cut, stall; three readers of one cache"
    figures("R16", injected=injected, times=faults, lost=0, wrong=len(bad(tmp_path)), note=note)
    assert 4 * BLOCKS * BLOCK < largest <= 6.5 * BLOCKS * BLOCK


@pytest.mark.soak
@pytest.mark.row("R16")
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_losses_cost_less_than_the_same_again(tmp_path, scheme, monkeypatch, figures):
    """The defaults: blocks of 8 MiB, a wait of 0.1 s, answers as on a line of 100 MB/s."""
    pytest.importorskip("s3fs" if scheme == "s3" else "aiohttp")
    files = {f"crops/{number}.tar": faulty.noise(number, 40_000_000) for number in range(12)}
    took, faults = {}, 0
    for kind, fault in (("plain", None), ("lossy", faulty.seeded(0, 0.3, LOSSES))):
        with faulty.serving(files) as server:
            settings = {"endpoint_url": server.url("")[:-1], "key": "k", "secret": "s"}
            monkeypatch.setitem(fsspec.config.conf, "s3", settings)
            base = server.url("") if scheme == "http" else "s3://"
            server.delay_s, server.fault = 0.08, fault or server.fault
            cache, began = ShardCache(CacheConfig(folder=tmp_path / kind, gigabytes=1)), time.monotonic()
            items = [(base + name, len(data), zlib.crc32(data)) for name, data in files.items()]
            cache.ahead(items)
            for entry, data in zip(items, files.values(), strict=True):
                descriptor = cache.open(*entry)
                assert os.pread(descriptor, len(data) + 1, 0) == data
                os.close(descriptor)
            took[kind] = time.monotonic() - began
            faults += sum(request.fault is not None for request in server.requests)
    note = f"{took['lossy'] / took['plain']:.2f} x the {took['plain']:.1f} s without losses, of 480 MB at 100 MB/s"
    figures("R16", injected=f"{scheme}: 30 % losses", times=faults, lost=0, wrong=len(bad(tmp_path)), note=note)
    assert took["lossy"] < 2 * took["plain"]
