"""A set behind a web server is read as if it lay here, also when the cache has room for two of its tars."""

import json
import multiprocessing

import numpy as np
import pytest
from faulty import seeded, serving

from recipes.errors import UserError
from shards.cache import CacheConfig
from shards.in_place import index_in_place
from shards.order import Order, OrderConfig
from shards.reader import ShardReader
from shards.remote import RemoteConfig

pytest.importorskip("aiohttp")
QUICK = RemoteConfig(first_wait_s=0.01, stall_s=2)


def files_of(folder, base="set/"):
    return {f"{base}{path.name}": path.read_bytes() for path in folder.iterdir()}


def cache(tmp_path, small_set, tars=50.0):
    """Room for so many of the set's tars, and its index."""
    sizes = [path.stat().st_size for path in small_set.glob("*.tar")]
    index = sum(path.stat().st_size for path in small_set.glob("*.npy"))
    return CacheConfig(folder=tmp_path / "cache", gigabytes=(tars * max(sizes) + index) / 1e9, wait_s=20, remote=QUICK)


def test_the_same_samples_through_a_server_that_fails(small_set, tmp_path):
    own = ShardReader([small_set], ["train", "query"])
    with serving(files_of(small_set)) as server:
        server.fault = seeded(0)
        other = ShardReader([server.url("set")], ["train", "query"], cache=cache(tmp_path, small_set))
        assert other.remote
        assert not own.remote
        assert other.identity == own.identity
        rows = np.random.default_rng(0).permutation(len(own)).tolist()
        assert [other[row] for row in rows] == [own[row] for row in rows]
        assert other.keys.tolist() == own.keys.tolist()
        other.close()


def _read(reader, rows, answers):
    answers.put([reader[row].image for row in rows])


def test_two_tars_of_room_are_enough_for_two_workers(small_set, tmp_path):
    """Five tars go through a cache of two while each process may hold several: slower, never wrong or stuck."""
    own = ShardReader([small_set], "train")
    order = Order(own.shard_sizes, 0, OrderConfig(lanes=4, window=3))
    with serving(files_of(small_set)) as server:
        other = ShardReader([server.url("set")], "train", cache=cache(tmp_path, small_set, tars=2.2))
        context = multiprocessing.get_context("fork")
        answers = [context.Queue(), context.Queue()]
        spans = [range(0, 30, 2), range(1, 30, 2)]
        workers = [
            context.Process(target=_read, args=(other, [order(n)[1] for n in span], queue))
            for span, queue in zip(spans, answers, strict=True)
        ]
        for worker in workers:
            worker.start()
        found = [queue.get(timeout=60) for queue in answers]
        for worker in workers:
            worker.join(20)
    assert found == [[own[order(n)[1]].image for n in span] for span in spans]


def test_what_comes_next_is_fetched_ahead(small_set, tmp_path):
    with serving(files_of(small_set)) as server:
        reader = ShardReader([server.url("set")], "train", cache=cache(tmp_path, small_set))
        order = Order(reader.shard_sizes, 0, OrderConfig(lanes=1, window=6))
        shards = order.shards_near([0])
        assert 1 < len(shards) < 5
        reader.ahead(shards)
        names = {f"set/train-{shard:06}.tar" for shard in shards}

        def fetched():
            return {request.path for request in server.requests if request.path.endswith(".tar")}

        for _ in range(200):
            if fetched() == names:
                break
            server.ended.wait(0.02)
        assert fetched() == names
        reader[order(0)[1]]


def test_tars_of_others_behind_a_server(small_set, tmp_path):
    with serving(files_of(small_set, "tars/")) as server:
        place = server.url("tars/train-{000000..000004}.tar")
        manifest = index_in_place([place], tmp_path / "set", "train", workers=1)
        assert [entry.name for entry in manifest.shards] == [server.url(f"tars/train-{n:06}.tar") for n in range(5)]
        reader = ShardReader([tmp_path / "set"], "train", cache=cache(tmp_path, small_set))
        own = ShardReader([small_set], "train")
        assert [reader[row][:2] for row in range(53)] == [own[row][:2] for row in range(53)]


def test_a_tar_that_changed_on_the_server_is_refused(small_set, tmp_path):
    files = files_of(small_set)
    with serving(files) as server:
        reader = ShardReader([server.url("set")], "query", cache=cache(tmp_path, small_set))
        data = bytearray(files["set/query-000000.tar"])
        data[600] ^= 1
        server.files["set/query-000000.tar"] = bytes(data)
        with pytest.raises(UserError, match=r"query-000000\.tar"):
            reader[0]


def test_a_manifest_that_is_not_there(small_set, tmp_path):
    with serving({}) as server, pytest.raises(UserError, match=r"set/manifest\.json"):
        ShardReader([server.url("set")], "train", cache=cache(tmp_path, small_set))
    old = {"set/manifest.json": json.dumps({"format_version": 1}).encode()}
    with serving(old) as server, pytest.raises(UserError, match="has format 1, this version reads 2"):
        ShardReader([server.url("set")], "train", cache=cache(tmp_path, small_set))
