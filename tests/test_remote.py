"""Remote files come whole and right or not at all; what cannot pass is told at once, what may pass is tried again."""

import importlib
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import faulty
import fsspec
import pytest

from recipes.errors import UserError
from shards import remote
from shards.remote import RemoteConfig

BLOCK = 1 << 14  # bytes
QUICK = RemoteConfig(attempts=4, first_wait_s=0.001, block_mb=BLOCK / 2**20, stall_s=5)
DATA = faulty.noise(0, 5 * BLOCK + 1234)
CRC = zlib.crc32(DATA)


@pytest.fixture
def server():
    pytest.importorskip("aiohttp")
    with faulty.serving({"a.tar": DATA}) as running:
        yield running


@pytest.fixture
def into(tmp_path):
    return tmp_path / "a.tar"


def alone(path) -> bool:
    """Whether nothing lies beside the file."""
    return [other.name for other in path.parent.iterdir() if other != path] == []


@pytest.mark.parametrize(
    "path, expected",
    [
        *[("s3://bucket/set", True), ("https://host/set", True), ("memory://set", True), ("file:///data/set", True)],
        *[("data/set", False), ("/data/set", False), ("folder:/data/set", False), ("msmt17:data://x", False)],
    ],
)
def test_urls_are_told_from_paths_and_sources(path, expected):
    assert remote.is_remote(path) is expected


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_every_length_arrives(size, known, into):
    data = faulty.noise(size, size)
    fsspec.filesystem("memory").pipe_file(f"/remote/{size}", data)
    size_and_crc = (size, zlib.crc32(data)) if known else (None, None)
    remote.fetch(f"memory://remote/{size}", into, *size_and_crc, QUICK)
    assert into.read_bytes() == data
    assert alone(into)


def test_a_file_is_read_block_by_block(server, into):
    remote.fetch(server.url("a.tar"), into, len(DATA), CRC, QUICK)
    assert into.read_bytes() == DATA
    assert [request.start for request in server.requests] == [BLOCK * i for i in range(6)]
    assert server.sent == len(DATA)


def test_a_server_without_ranges_sends_the_file_once(into):
    pytest.importorskip("aiohttp")
    with faulty.serving({"a.tar": DATA}, ranges=False) as server:
        remote.fetch(server.url("a.tar"), into, len(DATA), CRC, QUICK)
        assert into.read_bytes() == DATA
        assert server.sent == len(DATA)
        # breaks off in the first two answers
        server.fault = lambda path, number: "cut" if number <= 2 else None
        remote.fetch(server.url("a.tar"), into, len(DATA), CRC, QUICK)
    assert into.read_bytes() == DATA


def test_a_fetch_goes_on_after_the_bytes_that_are_there(server, into):
    into.with_name(".a.tar.part").write_bytes(DATA[: 2 * BLOCK + 5])
    remote.fetch(server.url("a.tar"), into, len(DATA), CRC, QUICK)
    assert into.read_bytes() == DATA
    assert server.requests[0].start == 2 * BLOCK + 5
    assert server.sent == len(DATA) - 2 * BLOCK - 5
    assert alone(into)


@pytest.mark.parametrize("crc", [CRC, None], ids=["crc", "no crc"])
@pytest.mark.parametrize("left", [BLOCK, len(DATA) + 1], ids=["shorter", "longer"])
def test_what_an_older_file_left_does_no_harm(server, into, left, crc):
    into.with_name(".a.tar.part").write_bytes(faulty.noise(1, left))
    remote.fetch(server.url("a.tar"), into, len(DATA), crc, QUICK)
    assert into.read_bytes() == DATA


def test_a_flipped_bit_is_fetched_again_and_a_replaced_file_is_refused(server, into):
    server.fault = lambda path, number: "flip" if number == 2 else None
    remote.fetch(server.url("a.tar"), into, len(DATA), CRC, QUICK)
    assert into.read_bytes() == DATA
    assert len(server.requests) == 12
    server.files["a.tar"] = faulty.noise(2, len(DATA))
    with pytest.raises(UserError) as caught:
        remote.fetch(server.url("a.tar"), into, len(DATA), CRC, QUICK)
    assert str(caught.value) == (
        f"{server.url('a.tar')} is damaged or was replaced: crc32 {CRC:08x} is expected, "
        f"{zlib.crc32(server.files['a.tar']):08x} came, 2 times over; upload or pack it again"
    )
    assert len(server.requests) == 24
    assert into.read_bytes() == DATA, "the file of before is left alone"
    assert alone(into)


@pytest.mark.parametrize(
    "size, words",
    [
        *[(len(DATA) - 1, "it is longer than the 83153 bytes expected"), (len(DATA) + 1, "1234 bytes came where 1235")],
        *[(6 * BLOCK, "1234 bytes came"), (6 * BLOCK + 1, "1234 bytes came"), (5 * BLOCK, "longer than the 81920")],
    ],
)
def test_a_file_of_another_size_is_refused(server, into, size, words):
    with pytest.raises(UserError, match=words):
        remote.fetch(server.url("a.tar"), into, size, CRC, QUICK)
    assert not into.exists()


def test_a_file_that_ends_where_a_block_begins_is_too_short(server, into):
    server.files["a.tar"] = DATA[: 2 * BLOCK]
    with pytest.raises(UserError, match=r"a\.tar is shorter than expected \(HTTP status 416\)"):
        remote.fetch(server.url("a.tar"), into, len(DATA), CRC, QUICK)


@pytest.mark.parametrize("whole", [True, False], ids=["read_bytes", "fetch"])
@pytest.mark.parametrize(
    "status, words",
    [
        *[("404", r"a\.tar does not exist"), ("410", "does not exist"), ("401", "no permission to read .*credentials")],
        *[("403", "no permission to read .*credentials"), ("400", r"is refused \(HTTP status 400\)")],
    ],
)
def test_an_error_that_stays_is_told_at_once(server, into, status, words, whole):
    server.fault = lambda path, number: status
    get = (server.url("a.tar"), QUICK) if whole else (server.url("a.tar"), into, len(DATA), CRC, QUICK)
    with pytest.raises(UserError, match=words):
        remote.read_bytes(*get) if whole else remote.fetch(*get)
    assert len(server.requests) == 1
    assert not list(into.parent.iterdir())


@pytest.mark.parametrize("fault", ["500", "502", "503", "429", "408", "reset", "short"])
def test_an_error_that_may_pass_is_tried_again(server, fault):
    server.fault = lambda path, number: fault if number < 3 else None
    assert remote.read_bytes(server.url("a.tar"), QUICK) == DATA
    server.fault = lambda path, number: fault
    with pytest.raises(UserError) as caught:
        remote.read_bytes(server.url("a.tar"), QUICK)
    assert str(caught.value).startswith(f"cannot read {server.url('a.tar')}: 4 attempts failed, the last with ")
    assert str(caught.value).endswith("; check the network and the server, or raise cache.remote.attempts")
    assert len(server.requests) == 4 + 4


@pytest.mark.parametrize("fault", ["500", "reset", "short"])
def test_a_size_that_is_not_told_at_first_is_asked_for_again(server, into, fault):
    # one question is two requests, HEAD and GET
    server.fault = lambda path, number: fault if number < 4 else None
    remote.fetch(server.url("a.tar"), into, None, None, QUICK)
    assert into.read_bytes() == DATA


def test_waits_double_up_to_a_bound_and_are_shortened_by_chance(server, monkeypatch):
    waits, config = [], QUICK.model_copy(update={"attempts": 12, "first_wait_s": 0.1})
    monkeypatch.setattr(time, "sleep", waits.append)
    server.fault = lambda path, number: "500"
    with pytest.raises(UserError):
        remote.read_bytes(server.url("a.tar"), config)
    longest = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20, 20, 20]
    assert len(waits) == len(longest)
    assert all(0.5 * most <= wait <= most for wait, most in zip(waits, longest, strict=True))
    assert len({wait / most for wait, most in zip(waits, longest, strict=True)}) > 3


def test_a_stalled_block_is_given_up_and_a_smaller_one_asked_for(server, into):
    config = RemoteConfig(attempts=4, first_wait_s=0, block_mb=0.25, stall_s=0.3)
    data = server.files["a.tar"] = faulty.noise(3, 3 << 18)
    server.fault = lambda path, number: "stall" if number in (1, 2) else None
    began = time.monotonic()
    remote.fetch(server.url("a.tar"), into, len(data), zlib.crc32(data), config)
    assert into.read_bytes() == data
    assert 0.6 <= time.monotonic() - began < 5
    lengths = [request.end - request.start for request in server.requests]
    assert lengths == [1 << 18, 1 << 16, 1 << 17, 1 << 18, 1 << 16]  # those that stall are not answered yet


def test_a_sync_file_system_that_hangs_is_given_up(monkeypatch, into):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/hangs", DATA)
    plain, ended, calls = type(memory).cat_file, threading.Event(), []

    def hang(self, path, **kwargs):
        calls.append(path)
        if len(calls) == 1:
            ended.wait(60)
        return plain(self, path, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", hang)
    config = QUICK.model_copy(update={"stall_s": 0.2})
    remote.fetch("memory://hangs", into, len(DATA), CRC, config)
    ended.set()
    assert into.read_bytes() == DATA


def test_a_server_that_always_stalls_is_told(server):
    server.fault = lambda path, number: "stall"
    config = RemoteConfig(attempts=2, first_wait_s=0, stall_s=0.2)
    with pytest.raises(UserError, match=r"2 attempts failed, .* no whole answer in 0\.2 s \(cache\.remote\.stall_s\)"):
        remote.read_bytes(server.url("a.tar"), config)


def test_no_server_is_told():
    pytest.importorskip("aiohttp")
    with pytest.raises(UserError, match=r"cannot read http://127\.0\.0\.1:9/x: 4 attempts failed"):
        remote.read_bytes("http://127.0.0.1:9/x", QUICK)


def test_a_missing_library_is_told_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"^s3://bucket/a needs a library .* `pip install personssl\[remote\]`"):
        remote.read_bytes("s3://bucket/a", QUICK)
    with pytest.raises(UserError, match=r"^nothing://a cannot be read \(.*Protocol not known: nothing\)"):
        remote.read_bytes("nothing://a", QUICK)


@pytest.mark.parametrize("fault", ["403", "404", "500", "reset"])
def test_secrets_of_a_url_are_not_told(server, into, fault):
    server.fault = lambda path, number: fault
    url = server.url("a.tar").replace("//", "//me:password@") + "?signature=secret"
    for size in (len(DATA), None):
        with pytest.raises(UserError) as caught:
            remote.fetch(url, into, size, CRC, QUICK)
        assert "password" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    fsspec.filesystem("memory").pipe_file("/small", b"abc")
    with pytest.raises(UserError, match=r"cannot write .*absent/a: No such file or directory"):
        remote.fetch("memory://small", tmp_path / "absent" / "a", 3, None, QUICK)


def test_one_fetches_and_the_others_wait(server, into):
    server.delay_s = 0.02
    threads = [
        threading.Thread(target=remote.fetch, args=(server.url("a.tar"), into, len(DATA), CRC, QUICK)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert into.read_bytes() == DATA
    assert server.sent == len(DATA)
    assert alone(into)


def test_a_forked_child_reads_too_and_leaves_the_parent_its_connections():
    """In a process of its own, where nothing else holds what fsspec lets go of in the child."""
    pytest.importorskip("aiohttp")
    program = (
        "import multiprocessing, time\n"
        "import faulty\n"
        "from shards import remote\n"
        "with faulty.serving({'a': b'abc'}) as server:\n"
        "    url = server.url('a')\n"
        "    assert remote.read_bytes(url) == b'abc'\n"
        "    child = multiprocessing.get_context('fork').Process(target=remote.read_bytes, args=(url,))\n"
        "    began = time.monotonic()\n"
        "    child.start()\n"
        "    child.join()\n"
        "    assert child.exitcode == 0\n"
        "    assert remote.read_bytes(url) == b'abc'\n"
        "    took = time.monotonic() - began\n"
        "assert took < remote.DEFAULTS.stall_s / 2, took\n"
    )
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
