"""Tiny data and tiny networks that several tests share."""

import functools
import io
import signal
from collections.abc import Iterator
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.batch import Batch, collate
from pretrain.heads import Head, HeadsConfig
from pretrain.loader import ViewMaker
from pretrain.masks import MasksConfig
from pretrain.photometric import PhotometricConfig
from pretrain.student_teacher import Student
from pretrain.views import ViewsConfig
from shards.images import ImagesConfig
from shards.order import Order, OrderConfig
from shards.packing import PackingConfig
from shards.reader import ShardReader
from shards.schema import Record
from shards.writer import pack

pytest_plugins = ["rows", "browser"]  # the mark `row`, the fixture `figures` and their table; the fixture `browser`
SIZE, LOCAL, PATCH = (64, 32), (32, 16), 8  # height, width of global and local crops; pixels
GRID = (8, 4)
TINY = BackboneConfig(name="vit_tiny_patch16_224", patch_size=PATCH, embed_dim=32, depth=2, num_heads=2)


def encoded(number: int) -> bytes:
    """A JPEG of 72 x 36 (height x width) pixels: noise on coarse blocks, another one for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (9, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((36, 72), Image.Resampling.NEAREST).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _records() -> list[Record]:
    """53 training images of 9 identities, 5 queries with captions, 7 images of the gallery."""
    rows = [Record(f"train/{i:02}", "train", functools.partial(encoded, i), i // 6 + 1, i % 3) for i in range(53)]
    for i in range(53, 58):
        captions = (f"person {i} wears red", "ein zweiter Satz, ä")[: i % 3]
        rows.append(Record(f"query/{i}", "query", functools.partial(encoded, i), i, 0, captions))
    return rows + [Record(f"gallery/{i}", "gallery", functools.partial(encoded, i), i - 7, 1) for i in range(58, 65)]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, object]]:
    """Puts the signal handlers of this process back: a training that was stopped in it leaves signals ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def forks(tmp_path_factory) -> Iterator[forked.Server]:
    """Runs entry scripts in forks of a process that has imported everything."""
    with forked.Server(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture(scope="session")
def small_set(tmp_path_factory) -> Path:
    """A packed set: train 53 images in shards of 12, query 5, gallery 7. Not to be changed; copy it to damage it."""
    folder = tmp_path_factory.mktemp("sets") / "small"
    pack(_records(), folder, PackingConfig(shard_samples=12), ImagesConfig(), [{"name": "made"}])
    return folder


@pytest.fixture(scope="session")
def train_reader(small_set) -> ShardReader:
    return ShardReader([small_set], "train")


@pytest.fixture(scope="session")
def make_views(train_reader):
    """ViewMaker over the training images; keyword arguments change the masks or the views."""

    def build(seed: int = 0, lanes: int = 6, masks: dict | None = None, **views) -> ViewMaker:
        order = Order(train_reader.shard_sizes, seed, OrderConfig(lanes=lanes, window=4))
        geometry = ViewsConfig(**{"global_size": SIZE, "local_size": LOCAL, "local_count": 3} | views)
        parts = (geometry, PhotometricConfig(), MasksConfig(**masks or {}))
        return ViewMaker(train_reader, order, seed, parts, GRID, drop_places=4)

    return build


@pytest.fixture(scope="session")
def make_batch(make_views):
    """A batch of `size` samples; keyword arguments as for `make_views`."""

    def build(size: int = 4, **given) -> Batch:
        maker = make_views(**given)
        return collate([maker[position] for position in range(size)])

    return build


@pytest.fixture(scope="session")
def make_backbone():
    """A backbone of dimension 32 and depth 2 for 64 x 32 pixels with patches of 8 x 8."""

    def build(seed: int = 0, masked: bool = True, drop_path: float = 0.0, size=SIZE, **given) -> Backbone:
        torch.manual_seed(seed)
        config = TINY.model_copy(update=given)
        backbone = Backbone(timm_arguments(config, size), masked=masked, drop_path=drop_path)
        backbone.initialise(config.init)
        return backbone

    return build


@pytest.fixture(scope="session")
def make_student(make_backbone):
    """A student on that backbone with K = 64 prototypes; keyword arguments change the head."""

    def build(seed: int = 0, mim: bool = True, drop_path: float = 0.0, **head) -> Student:
        backbone = make_backbone(seed, masked=mim, drop_path=drop_path)
        config = HeadsConfig(**{"out_dim": 64, "hidden_dim": 48, "bottleneck_dim": 16} | head)
        return Student(backbone, Head(backbone.dim, config, mim), PhotometricConfig(), mim)

    return build
