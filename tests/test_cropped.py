"""The source that cuts the queries of a packed set."""

import io

import numpy as np
import pytest
from PIL import Image

from recipes.errors import UserError
from shards.assembly import build_set
from shards.images import ImagesConfig, decode
from shards.packing import PackingConfig
from shards.reader import ShardReader
from shards.sources.cropped import Config, cropped


def build(small_set, out, **given):
    build_set([{"name": "cropped", "path": str(small_set), **given}], out, PackingConfig(workers=0), ImagesConfig())
    return [ShardReader([out], split) for split in ("query", "gallery")]


def test_queries_are_cut_and_the_gallery_is_not(small_set, tmp_path):
    query, gallery = build(small_set, tmp_path / "cut")
    before = [ShardReader([small_set], split) for split in ("query", "gallery")]
    for now, then in zip((query, gallery), before, strict=True):
        assert now.keys.tolist() == then.keys.tolist(), "the same queries in the same order"
        assert now.pids.tolist() == then.pids.tolist()
        assert now.camids.tolist() == then.camids.tolist()
    assert [gallery[row].image for row in range(len(gallery))] == [before[1][row].image for row in range(len(gallery))]
    sizes = [decode(query[row].image).size for row in range(len(query))]
    assert all(width == 36 and 36 <= height <= round(0.9 * 72) for width, height in sizes)
    assert len(set(sizes)) > 1
    assert "cut to 0.5 to 0.9 of the height" in query.sources[0]["title"]
    with pytest.raises(UserError, match="holds none of the splits train"):
        ShardReader([tmp_path / "cut"], "train")


def test_a_part_of_the_same_picture_is_left(small_set, tmp_path):
    query, _ = build(small_set, tmp_path / "cut")
    before = ShardReader([small_set], "query")
    for row in range(len(query)):
        part, whole = (np.asarray(decode(reader[row].image), int) for reader in (query, before))
        errors = [np.abs(whole[: len(part)] - part).mean(), np.abs(whole[-len(part) :] - part).mean()]
        assert min(errors) < 12 < max(errors), "but for the JPEG"


@pytest.mark.parametrize(("side", "top"), [("top", 0), ("bottom", 36)])
def test_which_side_stays(side, top):
    image = Image.new("RGB", (10, 72))
    image.paste((255, 255, 255), (0, top, 10, top + 36))
    config = Config(path="x", keep=(0.5, 0.5), side=side)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    part = np.asarray(decode(cropped(buffer.getvalue(), config, "query", 0)))
    assert part.shape[:2] == (36, 10)
    assert part.min() > 250


def test_seed_and_row_decide(small_set):
    data = ShardReader([small_set], "query")[0].image
    config, other = Config(path="x"), Config(path="x", seed=1)
    assert cropped(data, config, "query", 3) == cropped(data, config, "query", 3)
    assert len({cropped(data, config, "query", row) for row in range(8)}) > 4
    assert cropped(data, config, "query", 3) != cropped(data, other, "query", 3)


@pytest.mark.parametrize("keep", [(0.0, 0.5), (0.9, 0.5), (0.5, 1.1)])
def test_shares_that_are_none(keep):
    with pytest.raises(ValueError, match="two shares of the height"):
        Config(path="x", keep=keep)
