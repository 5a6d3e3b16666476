"""A data set used from its folder gives the samples, shards and order of the packed set."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from recipes.errors import UserError
from shards import unpacked
from shards.assembly import build_set
from shards.images import ImagesConfig
from shards.order import Order, OrderConfig
from shards.packing import PackingConfig
from shards.reader import ShardReader
from shards.schema import BadSample


@pytest.fixture
def market(tmp_path):
    """12 training, 2 query, 3 gallery images in the style of Market-1501."""
    names = [f"bounding_box_train/{pid:04}_c{cam}s1_000000_00.jpg" for pid in (2, 7, 9, 11) for cam in (1, 2, 3)]
    names += [f"query/{pid:04}_c1s1_000000_00.jpg" for pid in (1, 3)]
    names += [f"bounding_box_test/{pid:04}_c2s1_000000_00.jpg" for pid in (0, 1, 3)]
    for number, name in enumerate(names):
        path = tmp_path / "market" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 8, 3), dtype=np.uint8)).save(path)
    unpacked._plan.cache_clear()
    return tmp_path / "market"


@pytest.fixture
def packed(market, tmp_path):
    build_set([{"name": "market1501", "path": str(market)}], tmp_path / "set", PackingConfig(), ImagesConfig())
    return tmp_path / "set"


@pytest.mark.parametrize("splits", ["train", ["query", "gallery"]])
def test_the_same_samples_in_the_same_order(market, packed, splits):
    own, other = ShardReader([f"market1501:{market}"], splits), ShardReader([packed], splits)
    assert len(own) == len(other) > 0
    assert [own[row] for row in range(len(own))] == [other[row] for row in range(len(other))]
    for name in ("keys", "pids", "camids", "shard_sizes"):
        assert getattr(own, name).tolist() == getattr(other, name).tolist(), name
    config = OrderConfig(lanes=2, window=3)
    orders = [Order(reader.shard_sizes, 0, config) for reader in (own, other)]
    assert [orders[0](n) for n in range(30)] == [orders[1](n) for n in range(30)]
    assert own.identity == other.identity
    assert [s["title"] for s in own.sources] == [s["title"] for s in other.sources]


def test_a_worker_reads_it_too(market):
    own = ShardReader([f"market1501:{market}"], "train")
    copy = pickle.loads(pickle.dumps(own))
    assert [copy[row] for row in range(12)] == [own[row] for row in range(12)]


def test_a_file_that_went_away_is_a_bad_sample(market):
    own = ShardReader([f"market1501:{market}"], "query")
    for path in (market / "query").iterdir():
        path.unlink()
    with pytest.raises(BadSample, match=r"query/0.*\.jpg cannot be read \(No such file"):
        own[0]


def test_what_is_spelled_source_path(tmp_path, monkeypatch):
    assert unpacked.is_source("folder:/data/crops")
    assert unpacked.is_source("figures:")
    assert not unpacked.is_source("s3://bucket/set")
    assert not unpacked.is_source("data/set")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder:x").mkdir()
    assert not unpacked.is_source("folder:x"), "a set of that name is there"
    with pytest.raises(UserError, match="there is no source 'foldr'; the nearest is 'folder'"):
        ShardReader(["foldr:crops"], "train")


def test_nothing_is_left_behind(market, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    program = (
        "from shards.reader import ShardReader\n"
        f"reader = ShardReader(['market1501:{market}'], 'train')\n"
        "assert reader[3].image\n"
        f"import os; assert os.listdir({str(scratch)!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"TMPDIR": str(scratch)}, timeout=60)
    assert not list(scratch.iterdir())
