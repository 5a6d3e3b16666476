"""The drawn textures: deterministic, of any size, and a source like any other."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from shards import sources
from shards.sources.textures import KINDS, Config, records, render, render_bytes

SMALL = {"height": 64, "width": 32}


def test_found_by_name_and_counted():
    module = sources.find("textures")
    found = list(module.records(module.Config(count=3, first=5, **SMALL)))
    assert [record.key for record in found] == ["texture-000005", "texture-000006", "texture-000007"]
    assert {(r.split, r.pid, r.camid, r.captions) for r in found} == {("unlabeled", None, None, ())}
    assert len(pickle.dumps(found[0])) < 2000
    assert pickle.loads(pickle.dumps(found[0])).read() == found[0].read()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pure_function_of_seed_and_number(kind):
    config = Config(kinds=[kind], **SMALL)
    for number in range(5):
        first = render_bytes(config, number)
        assert first == render_bytes(Config(kinds=[kind], **SMALL), number)
        assert first != render_bytes(config.model_copy(update={"seed": 1}), number)
        assert first != render_bytes(config, number + 1)


@pytest.mark.parametrize("height, width", [(256, 128), (64, 32), (16, 8), (33, 90)])
def test_size(height, width):
    for kind in KINDS:
        image = render(Config(height=height, width=width, kinds=[kind]), 3)
        assert image.size == (width, height)
        assert image.mode == "RGB"


def test_the_kinds_are_mixed():
    # each kind drawn alone gives the same picture as when it is the one drawn of all
    both = Config(kinds=["stripes", "bricks"], **SMALL)
    alone = [Config(kinds=[kind] * 2, **SMALL) for kind in both.kinds]
    drawn = [[render_bytes(both, n) == render_bytes(one, n) for one in alone] for n in range(40)]
    assert all(sum(row) == 1 for row in drawn)
    assert 8 <= sum(row[0] for row in drawn) <= 32


def test_they_are_pictures():
    record = next(records(Config(kinds=["leaves"], **SMALL)))
    image = Image.open(io.BytesIO(record.read()))
    assert image.format == "JPEG"
    assert np.asarray(image).std() > 5
