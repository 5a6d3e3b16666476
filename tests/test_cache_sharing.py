"""One cache for the threads and processes of a machine, some of which die."""

import contextlib
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
import zlib

import faulty
import pytest
from cached import FILES, SIZE, config, held, in_memory, item, touch, until

from shards.cache import ShardCache
from shards.cache_folder import Claim

SPAWN, FORK = multiprocessing.get_context("spawn"), multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def memory():
    return in_memory()


@pytest.fixture
def server():
    pytest.importorskip("aiohttp")
    with faulty.serving(dict(FILES)) as running:
        yield running


def _read_all(cache: ShardCache, base: str, seed: int, rounds: int, answers) -> None:
    """What a reading process does: some read-ahead, some opening; answers how many reads were good."""
    chance, good = random.Random(seed), 0
    for _ in range(rounds):
        cache.ahead([item(name, base) for name in chance.sample("abcdefgh", 2)])
        name = chance.choice("abcdefgh")
        descriptor = cache.open(*item(name, base))
        time.sleep(0.002 * chance.random())
        good += os.pread(descriptor, 2 * SIZE, 0) == FILES[f"{name}.tar"]
        os.close(descriptor)
    answers.put(good)


def test_many_processes_and_threads_stay_within_the_bound(tmp_path, server):
    base, answers = server.url(""), SPAWN.Queue()
    cache = ShardCache(config(tmp_path, files=5.5, wait_s=30, threads=2))
    arguments = [(cache, base, seed, 40, answers) for seed in range(5)]
    readers = [SPAWN.Process(target=_read_all, args=arguments[seed], daemon=True) for seed in (0, 1)]
    readers += [threading.Thread(target=_read_all, args=arguments[seed]) for seed in (2, 3)]
    readers.append(FORK.Process(target=_read_all, args=arguments[4], daemon=True))
    for reader in readers:
        reader.start()
    largest, end = 0, time.monotonic() + 60
    while time.monotonic() < end and any(reader.is_alive() for reader in readers):
        found = 0
        for path in tmp_path.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found += path.stat().st_size
        largest = max(largest, found)
    assert [answers.get(timeout=5) for _ in readers] == [40] * 5
    assert 4 * SIZE < largest <= 5 * SIZE
    assert server.sent > 2 * len(FILES) * SIZE, "files were thrown out and fetched again"
    assert set(held(cache)) <= set("abcdefgh")


def _open(cache: ShardCache, entry: tuple[str, int, int], answer) -> None:
    descriptor = cache.open(*entry)
    answer.put(zlib.crc32(os.pread(descriptor, entry[1], 0)))


def test_a_killed_fetch_is_taken_over(tmp_path, server):
    server.delay_s = 0.05
    cache, entry, answer = ShardCache(config(tmp_path)), item("a", server.url("")), SPAWN.Queue()
    first = SPAWN.Process(target=_open, args=(cache, entry, answer), daemon=True)
    first.start()
    until(lambda: sum(path.stat().st_size for path in tmp_path.glob("*.part")) > 3000)
    second = threading.Thread(target=_open, args=(cache, entry, answer))
    second.start()
    time.sleep(0.1)
    assert second.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join(20)
    assert answer.get(timeout=5) == entry[2]
    assert not list(tmp_path.glob("*.part"))
    starts = [request.start for request in server.requests]
    assert starts.count(0) == 1
    assert len(starts) <= 11, "it goes on where the other was killed"


def test_what_killed_fetches_left_makes_room_first(tmp_path):
    cache = ShardCache(config(tmp_path))
    touch(cache, "a")
    for name in "bc":
        part = cache.folder.claim(cache._stem(*item(name)), SIZE)
        assert isinstance(part, int)
        os.close(part)  # as if killed: with nothing fetched they still take their room
    touch(cache, "d")
    assert held(cache) == "ad"
    assert len(list(tmp_path.glob("*.part"))) == 1
    touch(cache, "e")
    assert held(cache) == "ade"
    assert not list(tmp_path.glob("*.part"))


def test_a_forked_child_does_not_keep_a_dead_fetch_alive(tmp_path):
    cache = ShardCache(config(tmp_path))
    stem = cache._stem(*item("a"))
    part = cache.folder.claim(stem, SIZE)
    assert cache.folder.claim(stem, SIZE) is Claim.FETCHING
    child = FORK.Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    os.close(part)  # as the kernel does for a killed process, without unlocking first
    touch(cache, "a")
    assert child.is_alive()
    child.kill()
    child.join()


def _use(cache: ShardCache) -> None:
    cache.ahead([item("b")])
    touch(cache, "a")
    until(lambda: held(cache) == "ab")


def test_it_works_in_a_forked_child_while_the_parent_reads_ahead(tmp_path, server):
    server.delay_s = 0.05
    cache = ShardCache(config(tmp_path))
    cache.ahead([item("c", server.url(""))])
    until(lambda: cache.queue.running == 1)
    cache.queue.lock.acquire()  # as another thread of the parent may have it at that moment
    child = FORK.Process(target=_use, args=(cache,), daemon=True)
    child.start()
    cache.queue.lock.release()
    child.join(20)
    assert child.exitcode == 0
    until(lambda: held(cache) == "abc")


def test_it_can_be_pickled(tmp_path):
    cache = ShardCache(config(tmp_path))
    touch(cache, "a")
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.config == cache.config
    _use(copy)
