"""Identities held out of the training split: who they are, how they are searched, and that the best model is kept."""

import functools
import json

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finetune import validation
from finetune.identities import IdentitiesConfig, select_identities
from finetune.metrics import Protocol
from finetune.validation import BEST, CURVE, Validation, ValidationConfig, hold_out, retrieve
from finetune.verification import Calibration
from pretrain.checkpoint import load_model, save_model
from recipes.errors import UserError
from shards.embeddings import EmbeddingTable
from shards.reader import ShardReader
from shards.schema import UNKNOWN


def labels(*people: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """pids and camids; people[i] holds the cameras of the images of identity i + 1."""
    pids = np.repeat(np.arange(1, len(people) + 1), [len(cameras) for cameras in people])
    return pids, np.array([camera for cameras in people for camera in cameras], np.int64)


def test_none_are_held_out_by_default():
    pids, camids = labels((0, 1), (0, 1))
    split = hold_out(ValidationConfig(), pids, camids)
    assert split.kept.all()
    assert len(split.query) == len(split.gallery) == len(split.identities) == 0
    assert (split.training_pids(pids) == pids).all()


def test_one_image_a_camera_searches_where_a_match_is_left():
    # 1, 2, 6: one camera, or one image a camera: no match would be left. 5: the image of camera 0 searches; after that
    # one of camera 1 would find nothing on another camera, so both stay in the gallery
    pids, camids = labels((0, 0, 0), (0, 1), (0, 0, 1, 1), (0, 0, 1, 1), (0, 1, 1), (2,))
    split = hold_out(ValidationConfig(identities=3), pids, camids)
    assert split.identities.tolist() == [3, 4, 5]
    searched = list(zip(pids[split.query].tolist(), camids[split.query].tolist(), strict=True))
    assert searched == [(3, 0), (3, 1), (4, 0), (4, 1), (5, 0)]
    assert len(split.gallery) == 2 + 2 + 2
    assert set(pids[split.kept].tolist()) == {1, 2, 6}
    chosen = select_identities(IdentitiesConfig(singletons="repeat"), split.training_pids(pids))
    assert chosen.pids.tolist() == [1, 2, 6]


def test_without_cameras_an_identity_needs_two_images():
    pids, camids = labels((UNKNOWN, UNKNOWN), (UNKNOWN,), (UNKNOWN, UNKNOWN, UNKNOWN), (UNKNOWN,))
    with pytest.raises(UserError, match=r"no camera labels.*same_camera=keep"):
        hold_out(ValidationConfig(identities=2), pids, camids)
    split = hold_out(ValidationConfig(identities=2), pids, camids, Protocol(same_camera="keep"))
    assert split.identities.tolist() == [1, 3]
    assert pids[split.query].tolist() == [1, 3]
    assert pids[split.gallery].tolist() == [1, 3, 3]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_split_is_a_partition_and_every_query_has_a_match(data):
    people = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple), min_size=4, max_size=9))
    pids, camids = labels(*people)
    junk = data.draw(st.lists(st.sampled_from([0, -1, UNKNOWN]), max_size=3))
    shuffle = np.random.default_rng(len(pids)).permutation(len(pids) + len(junk))
    pids, camids = np.append(pids, np.array(junk, np.int64))[shuffle], np.append(camids, [0] * len(junk))[shuffle]
    rule = Protocol(same_camera=data.draw(st.sampled_from(["drop", "keep"])))
    config = ValidationConfig(identities=data.draw(st.integers(2, 4)), seed=data.draw(st.integers(0, 3)))
    try:
        split = hold_out(config, pids, camids, rule)
    except UserError:
        return
    parts = np.concatenate([np.flatnonzero(split.kept), split.query, split.gallery])
    assert sorted(parts.tolist()) == list(range(len(pids)))
    assert len(split.identities) == config.identities
    assert not np.isin(pids[split.kept], split.identities).any()
    assert np.isin(split.identities, pids[split.query]).all()
    for row in split.query:
        match = split.gallery[pids[split.gallery] == pids[row]]
        assert (camids[match] != camids[row]).any() if rule.same_camera == "drop" else len(match)
    pairs = np.stack([pids[split.query], camids[split.query]], 1)
    assert len(np.unique(pairs, axis=0)) == len(pairs), "one query an identity and camera"


def test_seed_and_number_draw_the_identities():
    pids, camids = labels(*[(0, 0, 1, 1)] * 20)
    four, again, eight, other = (
        hold_out(ValidationConfig(identities=count, seed=seed), pids, camids).identities.tolist()
        for count, seed in ((4, 0), (4, 0), (8, 0), (4, 1))
    )
    assert four == again != other
    assert set(four) < set(eight)


@pytest.mark.parametrize(
    "count, people, told",
    [
        (1, [(0, 0, 1, 1)] * 4, "validation.identities = 1.*set 2 or more"),
        (3, [(0, 0, 1, 1)] * 4, "set it to at most 2"),
        (2, [(0, 0, 1, 1)] * 3, "two must stay to train on"),
        (2, [(0, 0)] * 9, "of the 9 training identities 0 were seen on two cameras"),
    ],
)
def test_what_cannot_be_held_out_is_refused(count, people, told):
    with pytest.raises(UserError, match=told):
        hold_out(ValidationConfig(identities=count), *labels(*people))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A drawn training split: 12 identities x 5 images on 2 cameras."""
    return ShardReader([small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)], "train")


def embedding(reader, quality: float):
    """Features between noise (0) and the identity itself (1)."""

    def embed(of, rows):
        assert of is reader
        noise = np.random.default_rng(5).standard_normal((len(reader), 64))[rows]
        features = (1 - quality) * noise / 8 + quality * np.eye(64)[of.pids[rows] % 64]
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        return EmbeddingTable(features.astype(np.float32), of.pids[rows], of.camids[rows], of.keys[rows])

    return embed


class Run:
    """A training of 9 epochs scored every second one; after each epoch `model` says which one it was."""

    config = ValidationConfig(identities=6, every_epochs=2)
    qualities = (0.0, 0.1, 0.2, 0.3, 0.45, 0.9, 0.9, 0.4, 0.2, 0.1)  # by epoch; best after 6

    def __init__(self, reader, out):
        self.reader, self.out, self.saved = reader, out, []
        self.split = hold_out(self.config, reader.pids, reader.camids)
        self.model = nn.Linear(1, 1, bias=False)
        self.validation = Validation(self.config, reader, self.split, out)
        out.mkdir(exist_ok=True)

    def save(self, folder, facts):
        save_model(folder, self.model.state_dict(), {"kind": "reid", **facts})
        self.saved.append(facts["validation"]["epoch"])

    def train(self, start: int, end: int, killed: int | None = None) -> "Run":
        """killed: the epoch in which the best model is written and nothing after it."""
        self.validation.rewind(start)
        for epoch in range(start + 1, end + 1):
            nn.init.constant_(self.model.weight, epoch)
            if epoch == killed:
                self.validation._write = lambda rows: None
            self.validation.after(epoch, 9, embedding(self.reader, self.qualities[epoch]), self.save)
        return self

    def state(self):
        """What a user finds at the end."""
        tensors, config = load_model(self.out / BEST)
        return float(tensors["weight"]), config, json.loads((self.out / CURVE).read_text())


def test_the_best_epoch_is_kept_and_restored(reader, tmp_path):
    run = Run(reader, tmp_path / "run").train(0, 9)
    assert run.saved == [2, 4, 6]
    weight, config, curve = run.state()
    assert weight == 6
    assert [row["epoch"] for row in curve["epochs"]] == [2, 4, 6, 8, 9], "every second and the last"
    assert config["validation"] == curve["epochs"][2]
    assert curve["identities"] == 6
    assert curve["query"] + curve["gallery"] == (~run.split.kept).sum() == 30
    assert run.model.weight.item() == 9
    told = run.validation.restore(run.model)
    assert run.model.weight.item() == 6
    assert told["validation"]["mAP"] == max(row["mAP"] for row in curve["epochs"])


def test_the_score_is_that_of_the_held_out_alone(reader):
    config = ValidationConfig(identities=6)
    split = hold_out(config, reader.pids, reader.camids)
    found = retrieve(reader, split, embedding(reader, 1.0))
    assert found.mAP == pytest.approx(1.0)
    assert (found.valid, found.skipped) == (len(split.query), 0)
    assert retrieve(reader, split, embedding(reader, 0.0)).mAP < 0.7


@pytest.mark.parametrize("killed_in, goes_on_from", [(4, 3), (6, 2), (6, 5), (8, 5), (9, 7), (2, 0)])
def test_killed_and_resumed_ends_the_same(killed_in, goes_on_from, reader, tmp_path):
    whole = Run(reader, tmp_path / "whole").train(0, 9).state()
    Run(reader, tmp_path / "cut").train(0, killed_in, killed=killed_in)
    assert Run(reader, tmp_path / "cut").train(goes_on_from, 9).state() == whole


def test_another_training_in_the_folder_does_not_inherit_the_best(reader, tmp_path):
    Run(reader, tmp_path / "run").train(0, 9)
    worse = Run(reader, tmp_path / "run")
    worse.qualities = (0.0, 0.1, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1)
    assert worse.train(0, 9).state()[0] == 4


def test_of_equal_epochs_the_first_stays(reader, tmp_path):
    run = Run(reader, tmp_path / "run")
    run.qualities = (1.0,) * 10
    assert run.train(0, 9).saved == [2]


def test_without_held_out_identities_nothing_happens(reader, tmp_path):
    run = Run(reader, tmp_path / "run")
    run.validation = Validation(ValidationConfig(), reader, run.split, run.out)
    run.train(0, 9)
    assert run.validation.restore(run.model) == {}
    assert list(run.out.iterdir()) == []


def test_the_threshold_is_that_of_the_held_out_identities(reader, tmp_path, monkeypatch, capsys):
    run = Run(reader, tmp_path / "run")
    assert run.validation.calibration(embedding(reader, 0.9)) == {}, "15 x 15 pairs are too few for a rate of 0.001"
    assert "no threshold for `same person` is stored with the model" in capsys.readouterr().err
    few = functools.partial(validation.calibrate, far=0.1)
    monkeypatch.setattr(validation, "calibrate", few)
    found = Calibration(**run.validation.calibration(embedding(reader, 0.9))["calibration"])
    assert found.title.startswith("6 held-out training identities of")
    query, gallery = (embedding(reader, 0.9)(reader, rows) for rows in (run.split.query, run.split.gallery))
    assert found == few(query, gallery, title=found.title)
    assert found.probability(1.0) > 0.9 > 0.1 > found.probability(0.0)
    assert Validation(ValidationConfig(), reader, run.split, run.out).calibration(embedding(reader, 0.9)) == {}


def test_damaged_files_are_told(reader, tmp_path):
    run = Run(reader, tmp_path / "run").train(0, 2)
    (run.out / BEST / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config.json does not tell how good"):
        run.train(2, 4)
    (run.out / CURVE).write_text("{")
    with pytest.raises(UserError, match=r"validation.json is damaged"):
        run.validation.rewind(2)


def test_embedding_takes_the_rows_that_it_is_given(reader, monkeypatch):
    asked = []
    monkeypatch.setattr(validation, "evaluate", lambda query, gallery, protocol: asked.append((query, gallery)))
    split = hold_out(ValidationConfig(identities=3), reader.pids, reader.camids)
    retrieve(reader, split, embedding(reader, 0.5))
    query, gallery = asked[0]
    assert list(query.keys) == [key.decode() for key in reader.keys[split.query]]
    assert list(gallery.keys) == [key.decode() for key in reader.keys[split.gallery]]
    assert query.pids.tolist() == reader.pids[split.query].tolist()
