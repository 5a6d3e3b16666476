"""The cache holds right files only, never more bytes than it may, and throws out what was not used for longest."""

import os
import time
import zlib

import faulty
import pytest
from cached import FILES, SIZE, config, held, in_memory, item, touch, until

from recipes.errors import UserError
from shards import cache as cache_module
from shards.cache import CacheConfig, ShardCache


@pytest.fixture(autouse=True)
def memory():
    return in_memory()


@pytest.fixture
def server():
    pytest.importorskip("aiohttp")
    with faulty.serving(dict(FILES)) as running:
        yield running


def test_a_file_is_fetched_once(tmp_path, server):
    cache = ShardCache(config(tmp_path))
    touch(cache, "ab", server.url(""))
    count = len(server.requests)
    touch(cache, "abab", server.url(""))
    assert (len(server.requests), server.sent) == (count, 2 * SIZE)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".shard", ".shard"]


def test_a_replaced_file_is_another_entry(tmp_path, memory):
    cache = ShardCache(config(tmp_path))
    touch(cache, "a")
    memory.pipe_file("/a.tar", FILES["b.tar"])
    descriptor = cache.open("memory://a.tar", SIZE, zlib.crc32(FILES["b.tar"]))
    assert os.pread(descriptor, SIZE, 0) == FILES["b.tar"]
    os.close(descriptor)
    assert held(cache) == "ab"


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    cache = ShardCache(config(tmp_path))
    touch(cache, "abc")
    assert held(cache) == "abc"
    touch(cache, "ad")
    assert held(cache) == "acd"
    touch(cache, "e")
    assert held(cache) == "ade"


def test_files_that_are_open_stay_and_a_full_cache_says_so(tmp_path):
    cache = ShardCache(config(tmp_path))
    first = cache.open(*item("a"))
    touch(cache, "bcdef")
    assert "a" in held(cache)
    others = [cache.open(*item(name)) for name in "ef"]
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        cache.open(*item("g"))
    assert 0.2 <= time.monotonic() - began < 2
    assert str(caught.value) == (
        f"the cache {tmp_path} has no room for memory://g.tar (1e-05 GB): of its 3e-05 GB (cache.gigabytes) 3 files in "
        "use take 3e-05 GB and 0 being fetched 0 GB; raise cache.gigabytes"
    )
    assert held(cache) == "aef"
    os.close(others.pop())
    touch(cache, "g")
    assert held(cache) == "aeg"
    assert os.pread(first, SIZE, 0) == FILES["a.tar"]
    for descriptor in (first, *others):
        os.close(descriptor)


def test_nothing_is_thrown_out_in_vain(tmp_path, memory):
    cache = ShardCache(config(tmp_path))
    touch(cache, "a")
    descriptors = [cache.open(*item(name)) for name in "bc"]
    memory.pipe_file("/large", bytes(2 * SIZE))
    with pytest.raises(UserError, match=r"raise cache\.gigabytes"):
        cache.open("memory://large", 2 * SIZE, zlib.crc32(bytes(2 * SIZE)))
    assert held(cache) == "abc"
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_full_cache_asks_its_user_to_let_go(tmp_path):
    cache = ShardCache(config(tmp_path, wait_s=60))
    descriptors = [cache.open(*item(name)) for name in "abc"]

    def let_go() -> bool:
        os.close(descriptors.pop(0))
        return True

    os.close(cache.open(*item("d"), let_go))
    assert held(cache) == "bcd"
    assert len(descriptors) == 2
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_file_larger_than_the_bound_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.tar with 1e-05 GB does not fit .* of 9e-06 GB; raise cache\.gigabytes"):
        ShardCache(config(tmp_path, files=0.9)).open(*item("a"))
    touch(ShardCache(config(tmp_path, files=1)), "aba")


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_a_file_that_lost_its_size_is_fetched_again(tmp_path, size):
    cache = ShardCache(config(tmp_path))
    touch(cache, "a")
    (path,) = tmp_path.glob("*.shard")
    path.write_bytes(bytes(size))
    touch(cache, "a")
    assert held(cache) == "a"


def test_a_wrong_remote_file_never_gets_into_the_cache(tmp_path, memory):
    cache = ShardCache(config(tmp_path))
    memory.pipe_file("/a.tar", FILES["b.tar"])
    with pytest.raises(UserError, match=r"memory://a\.tar is damaged or was replaced"):
        cache.open(*item("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_read_ahead_fetches_in_the_background_and_in_order(tmp_path, server):
    cache = ShardCache(config(tmp_path, files=8))
    items = [item(name, server.url("")) for name in "dacadb"]
    assert cache.ahead(iter(items)) is None
    until(lambda: held(cache) == "abcd")
    paths = [request.path for request in server.requests]
    assert sorted(set(paths), key=paths.index) == ["d.tar", "a.tar", "c.tar", "b.tar"]
    assert server.sent == 4 * SIZE
    until(lambda: not cache.queue.running)
    touch(cache, "abcd", server.url(""))
    assert server.sent == 4 * SIZE


def test_read_ahead_never_fails_and_opening_tells(tmp_path, memory):
    cache = ShardCache(config(tmp_path))
    memory.rm("/a.tar")
    cache.ahead([item("a"), item("b"), ("nothing://x", 1, 1), ("memory://b.tar", SIZE * 10, 1), item("c")])
    until(lambda: held(cache) == "bc" and not cache.queue.running)
    with pytest.raises(UserError, match=r"memory://a\.tar does not exist"):
        cache.open(*item("a"))
    memory.pipe_file("/a.tar", FILES["a.tar"])
    touch(cache, "a")


def test_read_ahead_queues_so_much_and_no_more(tmp_path, server, monkeypatch):
    monkeypatch.setattr(cache_module, "QUEUE", 2)
    server.delay_s = 0.01
    cache = ShardCache(config(tmp_path, files=8))
    cache.ahead([item("a", server.url(""))])
    until(lambda: not cache.queue.items)
    began = time.monotonic()
    cache.ahead([item(name, server.url("")) for name in "bcdef"])
    assert time.monotonic() - began < 0.02
    until(lambda: not cache.queue.running)
    assert held(cache) == "abc"
    touch(cache, "def", server.url(""))


def test_read_ahead_leaves_alone_what_is_open_and_what_is_still_to_be_opened(tmp_path):
    cache = ShardCache(config(tmp_path, wait_s=60))
    touch(cache, "a")
    descriptor = cache.open(*item("b"))
    cache.ahead([item(name) for name in "cde"])
    until(lambda: held(cache) == "bcd")  # `a` made room, for `e` there is none
    time.sleep(0.1)
    assert held(cache) == "bcd"
    os.close(descriptor)
    until(lambda: held(cache) == "cde")
    touch(cache, "f")  # opening may, or a read-ahead for nobody would fill the cache for good
    assert held(cache) == "def"


def test_what_is_here_and_asked_for_ahead_stays(tmp_path):
    cache = ShardCache(config(tmp_path, wait_s=60))
    touch(cache, "abc")
    cache.ahead([item("a"), item("d")])
    until(lambda: held(cache) == "acd")


def test_a_long_wait_is_told_once(tmp_path, server, monkeypatch, capfd):
    monkeypatch.setattr(cache_module, "TELL_S", 0.2)
    server.delay_s = 0.06
    cache = ShardCache(config(tmp_path))
    touch(cache, "a", server.url(""))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"waiting for {server.url('a.tar')}: 0.0 of 0.0 MB are here")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"the cache .*/file cannot be written \(Not a directory\); choose another"):
        ShardCache(config(tmp_path / "file")).open(*item("a"))
    ShardCache(config(tmp_path / "file")).ahead([item("a")])


def test_the_default_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache(CacheConfig()).path == tmp_path / "personssl" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShardCache(CacheConfig()).path == tmp_path / ".cache" / "personssl" / "shards"
