"""The drawn figures: deterministic, labelled as they say, people of one identity alike, and no job for a histogram."""

import io
import pickle
import time

import numpy as np
import pytest
from PIL import Image

from recipes.errors import UserError
from shards.drawing.people import person
from shards.schema import SPLITS
from shards.sources.figures import Config, caption, records, render_bytes

SMALL = {"height": 64, "width": 32}


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("background", ["plain", "scenic"])
def test_same_bytes_every_time(background):
    config = Config(background=background, occluders=0.5, misaligned=0.5, **SMALL)
    again = Config(background=background, occluders=0.5, misaligned=0.5, **SMALL)
    other = config.model_copy(update={"seed": 1})
    for pid in range(1, 6):
        first = render_bytes(config, pid, 2, 0)
        assert first == render_bytes(again, pid, 2, 0)
        assert first != render_bytes(other, pid, 2, 0)
        assert first != render_bytes(config, pid, 2, 1)
        assert first != render_bytes(config, pid, 3, 0)


def test_records_can_be_pickled_and_read_elsewhere():
    record = next(records(Config(**SMALL)))
    assert pickle.loads(pickle.dumps(record.read))() == record.read()


@pytest.mark.parametrize("height, width", [(256, 128), (64, 32), (96, 96), (33, 17)])
def test_size(height, width):
    image = decode(next(records(Config(height=height, width=width))).read())
    assert image.size == (width, height)
    assert image.mode == "RGB"
    assert np.asarray(image).std() > 5


def test_everything_on_at_its_extremes_draws():
    for strength in (0.0, 1.0):
        full = {"background": "scenic", "occluders": 1.0, "misaligned": 1.0, "variation": 2.0, "similar": 1.0}
        config = Config(camera_strength=strength, **full, **SMALL)
        for pid in range(1, 60):
            assert decode(render_bytes(config, pid, pid % 3, 0)).size == (32, 64)


def test_unlabeled_has_no_labels():
    found = list(records(Config(role="unlabeled", identities=5, first_identity=7, images_per_identity=3)))
    assert len(found) == 15
    assert {(r.split, r.pid, r.camid, r.captions) for r in found} == {("unlabeled", None, None, ())}
    assert len({r.key for r in found}) == 15


def test_unlabeled_ranges_do_not_share_keys():
    low = {r.key for r in records(Config(role="unlabeled", identities=5))}
    high = {r.key for r in records(Config(role="unlabeled", identities=5, first_identity=5))}
    assert not low & high


def test_train_counts_and_pids():
    found = list(records(Config(role="train", identities=4, first_identity=10, images_per_identity=6, cameras=3)))
    assert [r.pid for r in found] == [pid for pid in (11, 12, 13, 14) for _ in range(6)]
    for pid in (11, 12, 13, 14):
        assert sorted(r.camid for r in found if r.pid == pid) == [0, 0, 1, 1, 2, 2]
    assert {r.split for r in found} == {"train"}


def test_test_role_has_one_query_a_camera():
    found = list(records(Config(role="test", identities=5, images_per_identity=12, cameras=4)))
    for pid in range(1, 6):
        for camid in range(4):
            mine = [r.split for r in found if (r.pid, r.camid) == (pid, camid)]
            assert sorted(mine) == ["gallery", "gallery", "query"]


def test_a_query_always_has_a_match_under_another_camera():
    for images in (5, 6, 7, 9):
        found = list(records(Config(role="test", identities=6, images_per_identity=images, cameras=4)))
        queries = [r for r in found if r.split == "query"]
        assert queries
        for query in queries:
            assert any(r.split == "gallery" and r.pid == query.pid and r.camid != query.camid for r in found)


def test_reid_role_is_disjoint():
    config = Config(role="reid", identities=10, train_identities=6, images_per_identity=8, cameras=4)
    found = list(records(config))
    split = {name: {r.pid for r in found if r.split == name} for name in SPLITS}
    assert split["train"] == set(range(1, 7))
    assert split["query"] == split["gallery"] == set(range(7, 11))
    assert sum(r.split == "query" for r in found) == 4 * 4
    assert sum(r.split == "gallery" for r in found) == 4 * 4
    assert len({r.key for r in found}) == len(found) == 80
    assert not any(set(". \t\n") & set(r.key) for r in found)


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"role": "reid", "identities": 5, "train_identities": 5}, "train_identities"),
        ({"role": "test", "images_per_identity": 4, "cameras": 4}, "images_per_identity"),
        ({"role": "test", "cameras": 1}, "cameras"),
    ],
)
def test_impossible_splits_are_refused(wrong, named):
    with pytest.raises(UserError, match=named):
        next(records(Config(**wrong)))


def test_captions_say_the_colours():
    config = Config()
    wordings = set()
    for pid in range(1, 200):
        who = person(config.seed, pid, config.similar)
        text = caption(config, pid, 1, 0)
        assert text[0].isupper()
        assert text.endswith(".")
        assert who.top_name in text
        assert who.top in text
        if who.bottom != "dress":
            assert who.bottom_name in text
        assert who.shoe_name in text
        if who.bag:
            assert f"{who.bag_name} {who.bag}" in text
        if who.hat in ("cap", "beanie"):
            assert f"{who.hat_name} {who.hat}" in text
        wordings.add(text.split()[0])
    assert {"A", "The", "This", "Carrying"} == wordings


def mean_colour(config: Config, pid: int, camid: int) -> np.ndarray:
    """Mean colour of the trousers and the shirt over a few shots: [6]."""
    shots = [np.asarray(decode(render_bytes(config, pid, camid, shot)), dtype=float) for shot in range(6)]
    middle = np.mean(shots, axis=0)[:, 12:20]
    return np.concatenate([middle[16:26].mean((0, 1)), middle[36:48].mean((0, 1))])


def test_identity_is_stable_across_cameras():
    config = Config(camera_strength=0.0, variation=0.0, similar=0.0, **SMALL)
    pids = range(1, 13)
    one, two = (np.stack([mean_colour(config, pid, camid) for pid in pids]) for camid in (0, 1))
    distance = np.linalg.norm(one[:, None] - two[None], axis=2)
    assert (distance.argmin(1) == np.arange(12)).mean() > 0.7


def test_wardrobe_is_shared_when_similar():
    def colours(similar: float) -> int:
        people = [person(0, pid, similar) for pid in range(8, 16)]  # one group
        return len({name for p in people for name in (p.top_name, p.bottom_name, p.bag_name)})

    assert colours(1.0) <= 3
    assert colours(0.0) > 6


def stripe_histogram(image: Image.Image) -> np.ndarray:
    """Square roots of HSV histograms of six stripes, unit length: [6 * 8 * 4 * 4]."""
    stripes = np.array_split(np.asarray(image.convert("HSV")), 6)
    counts = [np.histogramdd(s.reshape(-1, 3), bins=(8, 4, 4), range=[(0, 256)] * 3)[0].ravel() for s in stripes]
    root = np.sqrt(np.concatenate(counts))
    return root / np.linalg.norm(root)


def mean_average_precision(features: np.ndarray, pids: np.ndarray, camids: np.ndarray) -> float:
    """Each image is a query against all others; same identity under the same camera is left out."""
    scores, precisions = features @ features.T, []
    for i, (pid, camid) in enumerate(zip(pids, camids, strict=True)):
        valid = (pids != pid) | (camids != camid)
        hits = (pids[valid] == pid)[np.argsort(-scores[i, valid])]
        ranks = np.flatnonzero(hits)
        precisions.append(((np.arange(len(ranks)) + 1) / (ranks + 1)).mean())
    return float(np.mean(precisions))


def test_histograms_see_something_but_not_much():
    found = list(records(Config(role="train", identities=60, images_per_identity=8, **SMALL)))
    pids, camids = (np.array([getattr(r, name) for r in found]) for name in ("pid", "camid"))
    features = np.stack([stripe_histogram(decode(r.read())) for r in found])
    score = mean_average_precision(features, pids, camids)
    chance = mean_average_precision(np.random.default_rng(0).normal(size=(len(pids), 64)), pids, camids)
    assert 1.5 * chance < score < 0.5


def test_fast_enough_to_draw_while_training():
    config = Config(**SMALL)
    render_bytes(config, 1, 0, 0)
    start = time.process_time()
    for pid in range(1, 41):
        render_bytes(config, pid, 0, 0)
    assert 40 / (time.process_time() - start) > 50  # about 800 a second on one core of 2024; loose on purpose
