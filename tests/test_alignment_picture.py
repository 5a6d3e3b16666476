"""The picture of matched stripes: which lines it draws, and which answer it shows."""

import numpy as np
import pytest
from PIL import Image

from finetune import alignment_picture
from finetune.alignment_picture import BETWEEN, GAP, TILE, draw, first
from finetune.metrics import Protocol
from shards.embeddings import EmbeddingTable, Keys
from shards.reader import ShardReader


@pytest.fixture
def tables(small_set):
    readers = tuple(ShardReader([small_set], split) for split in ("query", "gallery"))
    features = (np.eye(len(reader), 8, dtype=np.float32) for reader in readers)
    return readers, tuple(EmbeddingTable(feature, reader.pids, reader.camids, Keys(reader.keys))
                          for feature, reader in zip(features, readers, strict=True))  # fmt: skip


def lines(picture: Image.Image, count: int) -> list[tuple[int, int]]:
    """Which stripe on the left meets which one on the right: the coloured line ends beside the two images."""
    pixels, left = np.asarray(picture, int), GAP + TILE[0]
    step, found = TILE[1] / count, []
    middle = pixels[GAP : GAP + TILE[1], left + BETWEEN // 2]
    for y in np.flatnonzero((middle < 250).any(axis=1)):
        found.append(int(y))
    starts = [y for y in found if y - 1 not in found]
    assert len(starts) <= 2 * count - 1
    return [round(y / step - 0.5, 1) for y in starts]


def test_lines_join_the_stripes_of_the_path(tables, tmp_path):
    readers, (query, gallery) = tables
    shifted = np.zeros((7, 4, 4), np.float16)
    shifted[0, :3] = np.eye(4)[1:]  # the second stripe of the query is the first one of the answer
    shifted[0, 3] = np.eye(4)[3]
    local = (np.stack([np.eye(4, dtype=np.float16)] * 5), shifted)
    told = draw(tmp_path / "out.png", readers, (query, gallery), local, [(0, 0)])
    assert told.startswith("Which stripe is compared with which: 1 queries")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (2 * TILE[0] + BETWEEN + 2 * GAP, TILE[1] + alignment_picture.TEXT + 2 * GAP)
        # (0,0) (1,0) (2,1) (3,2) (3,3) and one more step: half-way between the two sides
        heights = lines(picture.convert("RGB"), 4)
    assert 4 <= len(heights) <= 7
    assert any(abs(height - 0.5) < 0.2 for height in heights), "from the second stripe to the first"


def test_the_first_answer_is_one_that_the_query_may_see(tables):
    _, (query, gallery) = tables
    order = np.arange(len(gallery))
    hidden = np.flatnonzero((gallery.pids == query.pids[0]) & (gallery.camids == query.camids[0]))
    assert first(order, query, gallery, 0, Protocol()) == next(row for row in order if row not in hidden)


def test_several_rows_of_pairs(tables, tmp_path):
    readers, both = tables
    local = np.random.default_rng(0).random((5, 4, 3)), np.random.default_rng(1).random((7, 4, 3))
    told = draw(tmp_path / "out.png", readers, both, local, [(row, row) for row in range(5)])
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.height > 2 * TILE[1]
    assert "5 queries" in told
