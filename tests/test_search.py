"""The search script from the command line: a folder becomes searchable, and what cannot be done is told."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from PIL import Image

from finetune import backbones, models
from finetune.augment import AugmentConfig
from finetune.backbones import BackboneConfig
from finetune.extractor import Extractor
from finetune.methods import build
from finetune.methods.base import Parts
from finetune.sampling import SamplingConfig
from shards.reader import ShardReader

CALIBRATION = {
    **{"threshold": 0.9, "far": 1e-3, "tar": 0.75, "asked_far": 1e-3, "slope": 10.0, "intercept": -8.0},
    **{"same_pairs": 10, "different_pairs": 1000, "title": "Drawn", "protocol": {"same_camera": "drop"}},
}
SCRIPT = str(small.ROOT / "finetune/search.py")


def search(*given: object) -> int:
    return small.run([SCRIPT, *map(str, given)])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return a_model(tmp_path_factory.mktemp("model"), 0, calibration=CALIBRATION)


def a_model(folder: Path, seed: int, **facts) -> Path:
    torch.manual_seed(seed)
    config = BackboneConfig(name="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=2, num_heads=2, drop_path=0)
    backbone = backbones.build(backbones.arguments_of(config, (48, 16)))
    backbone.initialise("fan_in")
    method = build({"name": "bot"}, Parts(backbone, 5, 2, SamplingConfig(), 0))
    models.save(folder / "model", method, {"name": "bot"}, AugmentConfig(height=48, width=16, pad=4),
                {"classes": 5, "cameras": 2, **facts})  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, model) -> Path:
    """Ten crops and their gallery, not to be changed."""
    folder = tmp_path_factory.mktemp("base")
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 2, 3), dtype=np.uint8)
        path = folder / "crops" / ("a" if number < 5 else "b [2]") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((20, 60)).save(path)
    assert search("build", folder / "crops", "--ckpt", model, "--out", folder / "gallery") == 0
    return folder


@pytest.fixture
def own(base, tmp_path) -> Path:
    """A gallery of the same crops that may be changed."""
    shutil.copytree(base / "gallery", tmp_path / "gallery")
    return tmp_path / "gallery"


def test_a_query_as_json(base, model, capsys):
    image = base / "crops" / "a" / "3.png"
    assert search("query", base / "gallery", image, "--top", 3, "--json", "-") == 0
    told = json.loads(capsys.readouterr().out)
    assert [told["images"], told["threshold"], told["model"]] == [10, 0.9, str(model)]
    ((name, answers),) = [tuple(one.values()) for one in told["queries"]]
    assert name == str(image)
    extractor = Extractor(model, device="cpu")
    paths = sorted(base.rglob("*/[0-9].png"), key=lambda path: path.name)
    scores = extractor(paths) @ extractor([image])[0]
    best = np.argsort(-scores)[:3]
    assert [answer["image"] for answer in answers] == [str(paths[place]) for place in best]
    np.testing.assert_allclose([answer["score"] for answer in answers], scores[best], atol=1e-5)
    assert [answer["same"] for answer in answers] == (scores[best] >= 0.9).tolist()
    expected = 1 / (1 + np.exp(8 - 10 * scores[best]))
    np.testing.assert_allclose([answer["probability"] for answer in answers], expected, atol=1e-4)
    assert answers[0]["camera"] is None is answers[0]["identity"]


def test_a_folder_as_a_table_with_a_picture(base, tmp_path, capsys):
    picture = tmp_path / "strips" / "lists.png"
    assert search("query", base / "gallery", base / "crops" / "a", "--top", 4, "--strips", picture) == 0
    out = capsys.readouterr().out
    for number in range(5):
        assert f"query {base}/crops/a/{number}.png" in out
    assert out.count(" yes ") >= 5, "each finds itself"
    assert "same person: cosine of at least 0.900; on Drawn that accepted 75.0% of the pairs of one person" in out
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 5 * 64
        assert drawn.size[1] > 5 * 128


def test_several_images_of_one_person_are_one_query(base, model, tmp_path):
    images = sorted((base / "crops" / "a").iterdir())[:3]
    target = tmp_path / "answers.json"
    assert search("query", base / "gallery", *images, "--one-person", "--json", target, "--top", 1) == 0
    (query,) = small.json_of(target)["queries"]
    assert query["query"] == f"{images[0]} and 2 more"
    extractor = Extractor(model, device="cpu")
    (mean,) = extractor.tracklets([images])
    assert query["answers"][0]["score"] == pytest.approx(float(max(extractor(images) @ mean)), abs=1e-5)


def test_add_and_remove(own, base, capsys):
    assert search("remove", own, base / "crops" / "b [2]") == 0
    assert "5 images removed, 5 left" in capsys.readouterr().out
    assert search("remove", own, f"{base}/crops/a/[12].png") == 0
    assert "2 images removed, 3 left" in capsys.readouterr().out
    assert search("remove", own, "nobody*") == 2
    assert "is called 'nobody*'; nothing was removed" in capsys.readouterr().err
    assert search("add", own, base / "crops" / "b [2]" / "7.png", base / "crops" / "a") == 0
    assert "3 images added, now 6" in capsys.readouterr().out
    assert search("info", own) == 0
    told = json.loads(capsys.readouterr().out)
    assert [told["images"], told["removed"], told["factory"], told["next_id"]] == [6, 7, "Flat", 13]


def test_a_gallery_may_be_emptied_and_filled_again(own, base, capsys):
    image = base / "crops" / "a" / "3.png"
    assert search("remove", own, base / "crops" / "b [2]", base / "crops" / "a" / "?.png") == 0
    assert "10 images removed, 0 left" in capsys.readouterr().out
    assert search("query", own, image, "--strips", own.parent / "lists.png") == 2
    said = capsys.readouterr()
    assert "nothing found" in said.out
    assert "--strips has nothing to draw" in said.err
    assert search("add", own, base / "crops" / "a") == 0
    assert "5 images added, now 5" in capsys.readouterr().out
    assert search("query", own, image, "--top", 1, "--json", "-") == 0
    (answer,) = json.loads(capsys.readouterr().out)["queries"][0]["answers"]
    assert [answer["image"], answer["id"]] == [str(image), 13]


def test_a_set_with_labels_shows_them(own, model, tmp_path, tmp_path_factory, capsys):
    data = small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)
    out = tmp_path / "people"
    assert search("build", data, "--splits", "gallery", "--ckpt", model, "--out", out, "--factory", "IVF4,SQ8") == 0
    assert "of the 10 nearest images" in capsys.readouterr().out
    reader = ShardReader([data], "query")
    (tmp_path / "query.jpg").write_bytes(reader[0].image)
    picture = tmp_path / "lists.png"
    assert search("query", out, tmp_path / "query.jpg", "--nprobe", 4, "--json", "-", "--strips", picture) == 0
    answers = json.loads(capsys.readouterr().out)["queries"][0]["answers"]
    gallery = ShardReader([data], "gallery")
    labels = {key.decode(): (int(pid), int(camid)) for key, pid, camid in
              zip(gallery.keys, gallery.pids, gallery.camids, strict=True)}  # fmt: skip
    assert [(answer["identity"], answer["camera"]) for answer in answers] == [labels[a["image"]] for a in answers]
    assert picture.exists()
    assert search("query", out, data, "--splits", "query", "--top", 2) == 0
    assert "camera" in capsys.readouterr().out


def test_a_threshold_that_was_measured_later_counts(tmp_path, base, capsys):
    bare = a_model(tmp_path / "bare", 0)
    out = tmp_path / "gallery"
    assert search("build", base / "crops", "--ckpt", bare, "--out", out) == 0
    assert search("query", out, base / "crops" / "a" / "1.png") == 0
    assert "finetune/eval.py --calibrate" in capsys.readouterr().out
    a_model(tmp_path / "bare", 0, calibration=CALIBRATION)
    assert search("query", out, base / "crops" / "a" / "1.png") == 0
    assert "same person?" in capsys.readouterr().out


def test_damaged_queries_are_named(base, tmp_path, capsys):
    shutil.copy(base / "crops" / "a" / "2.png", tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"broken")
    assert search("query", base / "gallery", tmp_path, "--json", "-") == 0
    said = capsys.readouterr()
    assert "left out: " in said.err
    assert "bad.png is not a JPEG" in said.err
    assert [Path(one["query"]).name for one in json.loads(said.out)["queries"]] == ["good.png"]
    (tmp_path / "good.png").unlink()
    assert search("query", base / "gallery", tmp_path) == 2
    assert "none of the images to search with can be read" in capsys.readouterr().err


def test_wrong_use_is_told(base, model, tmp_path, capsys):
    crops, gallery = base / "crops", base / "gallery"
    other = a_model(tmp_path / "other", 1)
    image = crops / "a" / "0.png"
    for given, told in [
        (("build", crops, "--out", tmp_path / "g"), "--ckpt"),
        (("build", crops, "--ckpt", model, "--out", gallery), "is a gallery already"),
        (("build", tmp_path / "none", "--ckpt", model, "--out", tmp_path / "g"), "none does not exist"),
        (("build", crops, "--ckpt", model, "--out", tmp_path / "g", "--factory", "IVF64,Flat"), "cannot be trained"),
        (
            ("build", crops, "--ckpt", model, "--out", tmp_path / "g", "--splits", "query"),
            "--splits is for packed sets",
        ),
        (("query", tmp_path, image), "has no gallery.json"),
        (("query", gallery, image, "--ckpt", other), "fingerprint: other weights"),
        (("query", gallery, image, "--json", tmp_path / "no" / "where.json"), "cannot be written"),
        (("query", gallery, image, "--top", "0"), "no number of at least 1"),
        (("query", gallery, image, "--device", "abacus"), "device 'abacus' cannot be used here"),
    ]:
        assert search(*given) == 2, given
        assert told in capsys.readouterr().err
    shutil.copytree(model, tmp_path / "model")
    assert search("build", crops, "--ckpt", tmp_path / "model", "--out", tmp_path / "g") == 0
    (tmp_path / "model").rename(tmp_path / "moved")
    assert search("query", tmp_path / "g", image) == 2
    assert "is no checkpoint" in capsys.readouterr().err
    assert search("query", tmp_path / "g", image, "--ckpt", tmp_path / "moved") == 0


def a_reader_of_text(folder: Path) -> Path:
    """A model that knows the words of "a woman in a red coat", six crops, and a gallery of them."""
    torch.manual_seed(0)
    config = BackboneConfig(name="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=2, num_heads=2, drop_path=0)
    backbone = backbones.build(backbones.arguments_of(config, (48, 16)))
    section = {"name": "text_search", "dim": 16, "word_table": {"dim": 8}, "text_encoder": {"hidden": 6}}
    method = build(section, Parts(backbone, 5, 0, SamplingConfig(), 0, lambda: [("a woman in a red coat",)] * 5))
    models.save(
        folder / "model", method, section, AugmentConfig(height=48, width=16, pad=4), {"classes": 5, "cameras": 0}
    )
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 2, 3), dtype=np.uint8)
        path = folder / "crops" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((20, 60)).save(path)
    assert search("build", folder / "crops", "--ckpt", folder, "--out", folder / "gallery", "--device", "cpu") == 0
    return folder


@pytest.fixture(scope="module")
def reader_of_text(tmp_path_factory) -> Path:
    return a_reader_of_text(tmp_path_factory.mktemp("text"))


def test_a_sentence_finds_the_images_nearest_to_it(reader_of_text, tmp_path, capsys):
    gallery = reader_of_text / "gallery"
    capsys.readouterr()
    given = ["--text", "a woman in a RED coat", "coat with a hat", "--top", "6", "--device", "cpu"]
    assert search("query", gallery, *given, "--json", "-", "--strips", tmp_path / "out.png") == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert "unknown to this model and left out: 'with'" in said.err
    assert "'hat'" in said.err
    assert [query["query"] for query in told["queries"]] == ["a woman in a RED coat", "coat with a hat"]
    model = Extractor(reader_of_text, "cpu")
    images = [reader_of_text / "crops" / f"{number}.png" for number in range(6)]
    features, unknown = model.sentences(["a woman in a red coat"])
    assert unknown == ()
    cosines = (model(images) @ features.T)[:, 0]
    order = [str(images[place]) for place in np.argsort(-cosines)]
    assert [answer["image"] for answer in told["queries"][0]["answers"]] == order
    assert [answer["score"] for answer in told["queries"][0]["answers"]] == pytest.approx(
        sorted(cosines)[::-1], abs=1e-5
    )
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size[0] > 6 * 64


def test_a_sentence_without_a_known_word_is_told(reader_of_text, capsys):
    assert search("query", reader_of_text / "gallery", "--text", "xyzzy", "--device", "cpu") == 2
    assert "'xyzzy' has no word that this model knows" in capsys.readouterr().err


def test_a_model_that_reads_no_text_says_so(base, capsys):
    assert search("query", base / "gallery", "--text", "a coat", "--device", "cpu") == 2
    assert "was not trained with sentences" in capsys.readouterr().err
