"""The score without labels: by hand, by brute force, on planted features; the images and the views that it uses."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import SIZE

from pretrain import agreement as module
from pretrain.agreement import (
    LEAST,
    VIEWS,
    Images,
    Probe,
    agreement,
    choose_images,
    draw,
    measure,
    reciprocal_ranks,
    stack,
)
from pretrain.health import effective_rank
from pretrain.loader import LoaderConfig
from pretrain.views import ViewsConfig
from recipes.errors import UserError
from recipes.progress import Meter
from shards import keep_list
from shards.cache import CacheConfig
from shards.embeddings import Keys
from shards.reader import ShardReader

GEOMETRY = ViewsConfig(global_size=SIZE, local_size=(32, 16))
COLOURS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_ranks_by_hand():
    first = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    second = torch.tensor([[2.0, 0], [3, 0.1], [1, 0.9]])  # 0 finds itself; 1 is behind 2; 2 finds itself
    assert reciprocal_ranks(first, second).tolist() == [1, 1 / 2, 1]
    assert reciprocal_ranks(-first, second).tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 3])


@pytest.mark.parametrize("chunk", [module.CHUNK, 7])
def test_ranks_are_those_of_brute_force(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    first, noise = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    second = first + 0.8 * noise
    found = reciprocal_ranks(first, second)
    for i in range(60):
        cosines = [float(torch.cosine_similarity(first[i], other, dim=0)) for other in second]
        assert found[i].item() == pytest.approx(1 / (1 + sum(c > cosines[i] for c in cosines)))
    assert 1 < (1 / found).max() < 60


def test_what_is_as_near_counts_as_nearer():
    first = torch.tensor([[1.0, 0], [0, 1]])
    assert reciprocal_ranks(first, torch.tensor([[1.0, 0], [2, 0]])).tolist() == [1 / 2, 1 / 2]


def test_equal_features_score_as_low_as_can_be():
    one = torch.randn(1, 1, 12)
    for features in (torch.ones(40, VIEWS, 12), torch.zeros(40, VIEWS, 12), one.expand(40, VIEWS, 12)):
        told = agreement(features)
        assert told.score == pytest.approx(1 / 40)
        assert told.rank1 == 0
        assert told.effective_rank < 1.1


def test_features_that_are_not_finite_are_no_agreement():
    features = torch.randn(40, VIEWS, 12)
    features[3, 1, 5] = math.nan
    told = agreement(features)
    assert told.score == pytest.approx(1 / 40)
    assert math.isnan(told.effective_rank)


def planted(count: int, noise: float, dim: int = 24) -> torch.Tensor:
    """VIEWS views of `count` random directions, with noise of that relative length."""
    rng = torch.Generator().manual_seed(count)
    own, other = torch.randn(count, 1, dim, generator=rng), torch.randn(count, VIEWS, dim, generator=rng)
    return own + noise * other


def test_the_score_falls_from_one_to_that_of_chance():
    told = [agreement(planted(200, noise)) for noise in (0.0, 0.5, 1.0, 2.0, 1e6)]
    assert told[0].score == 1
    assert told[0].rank1 == 1
    assert all(better.score > worse.score for better, worse in itertools.pairwise(told))
    # ranks are uniform in 1..N without any relation: the mean reciprocal rank is H_N / N
    assert told[-1].score == pytest.approx(sum(1 / k for k in range(1, 201)) / 200, rel=0.3)
    assert told[-1].rank1 < 0.02


def test_each_image_counts_with_all_its_views():
    features = planted(50, 0.7)
    told = agreement(features)
    pairs = [(v, (v + 1) % VIEWS) for v in range(VIEWS)]
    own = torch.stack([reciprocal_ranks(features[:, a], features[:, b]) for a, b in pairs]).mean(0)
    np.testing.assert_allclose(told.reciprocal, own.numpy(), rtol=1e-6)
    assert told.effective_rank == pytest.approx(effective_rank(features[:, 0]))


@pytest.fixture
def accelerator():
    """Of this process and in full precision; forgotten afterwards, else the next script inherits that."""
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def probe(reader, rows, seed=0) -> Probe:
    return Probe(Images(reader, np.array(rows), "made"), GEOMETRY, seed)


def test_the_views_of_an_image_belong_to_its_row_and_the_seed(train_reader):
    one, other = probe(train_reader, range(53)), probe(train_reader, [7, 30])
    assert one[7].shape == (VIEWS, *SIZE, 3)
    assert one[7].dtype == np.uint8
    assert np.array_equal(one[7], other[0])
    assert np.array_equal(one[30], other[1])
    assert not np.array_equal(one[7], probe(train_reader, range(53), seed=1)[7])
    assert all(not np.array_equal(one[7][0], view) for view in one[7][1:])


def test_the_views_are_small_coloured_and_never_gray(train_reader, monkeypatch):
    boxes, spread = [], []
    real = module.views.draw_box
    monkeypatch.setattr(module.views, "draw_box", lambda *given: boxes.append(real(*given)) or boxes[-1])
    for place in range(53):
        spread += [np.ptp(view.astype(int), axis=-1).max() for view in probe(train_reader, range(53))[place]]
    areas = np.array([w * h for _, _, w, h, _ in boxes]) / (72 * 36)
    assert 0.18 < areas.min() < 0.25
    assert 0.55 < areas.max() < 0.62
    assert 0.4 < np.mean([flip for *_, flip in boxes]) < 0.6
    assert min(spread) > 20  # the blocks of these images have strong colours


def test_a_damaged_image_is_left_out(small_set, tmp_path, make_backbone, accelerator):
    copy = tmp_path / "damaged"
    shutil.copytree(small_set, copy)
    shard = copy / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600:900] = bytes(300)  # in the first image
    shard.write_bytes(data)
    reader = ShardReader([copy], "train")
    damaged = [place for place in range(53) if probe(reader, range(53))[place] is None]
    assert damaged == [0]
    assert stack([None, None]).shape == (0,)
    meter = Meter(53, "score", silent=True)
    told = measure(make_backbone(), probe(reader, range(53)), COLOURS, 0, accelerator, meter)
    assert len(told.reciprocal) == 52
    assert meter.done == 53


def test_a_measurement_repeats_itself_with_loader_processes_too(train_reader, make_backbone, accelerator):
    def once(workers: int) -> np.ndarray:
        meter = Meter(None, "score", silent=True)
        found = measure(make_backbone(), probe(train_reader, range(53)), COLOURS, workers, accelerator, meter)
        return found.reciprocal

    assert np.array_equal(once(0), once(0))
    assert np.array_equal(once(0), once(2))


def test_the_drawn_images_are_some_of_the_candidates(train_reader):
    candidates = np.arange(1, 53)
    rows = draw(train_reader, candidates, 40, seed=0)
    assert len(set(rows.tolist())) == 40
    assert (np.diff(rows) > 0).all()
    assert np.isin(rows, candidates).all()
    assert np.array_equal(rows, draw(train_reader, candidates, 40, seed=0))
    assert not np.array_equal(rows, draw(train_reader, candidates, 40, seed=1))
    assert np.array_equal(draw(train_reader, candidates, 1000, seed=0), candidates)
    with pytest.raises(UserError, match=f"20 images say nothing about a teacher; it takes {LEAST} at least"):
        draw(train_reader, candidates[:20], 40, seed=0)


def test_of_a_remote_set_few_shards_are_fetched():
    class Remote:
        remote, shard_sizes = True, np.full(100, 50)

    rows = draw(Remote(), np.arange(0, 5000, 2), 110, seed=3)  # 25 candidates a shard
    assert len(rows) == 110
    assert len(np.unique(rows // 50)) == 5
    assert len(np.unique(draw(Remote(), np.arange(5000), 60, seed=3) // 50)) == module.REMOTE_SHARDS


def keep(reader, path: Path, rows, by: str) -> Path:
    """A keep-list of these rows; its path."""
    keep_list.save(path, np.array(rows), Keys(reader.keys), {"set": reader.identity, "by": by})
    return path


def test_what_a_random_keep_list_left_out_is_held_out(small_set, train_reader, tmp_path):
    def chosen(**given) -> Images:
        data = LoaderConfig(shards=(str(small_set),), splits=("train",), **given)
        return choose_images(data, CacheConfig(), 1000, 0)

    kept = keep(train_reader, tmp_path / "random.npz", range(0, 20), "random")
    images = chosen(keep=kept)
    assert images.kind.startswith("held out")
    assert images.rows.tolist() == list(range(20, 53))
    assert images.reader[int(images.rows[0])].key == train_reader[20].key
    # what a score left out is unlike what it kept: then, and without enough of them, training images
    for path in (
        keep(train_reader, tmp_path / "cfs.npz", range(0, 40), "cfs"),
        keep(train_reader, tmp_path / "most.npz", range(0, 40), "random"),
    ):
        images = chosen(keep=path)
        assert images.kind.startswith("training images")
        assert {images.reader[int(row)].key for row in images.rows} == {train_reader[row].key for row in range(40)}
    assert chosen().kind.startswith("training images")
    assert len(chosen().rows) == 53


def test_other_sets_never_give_test_images(small_set):
    data = LoaderConfig(shards=("data/not-there",))
    images = choose_images(data, CacheConfig(), 1000, 0, [str(small_set)])
    assert images.kind == f"images of {small_set}"
    assert json.dumps(images.reader.identity["sets"][0]["splits"]) == '["train"]'
    assert len(images.rows) == 53
