"""What an evaluation writes, on drawn sets with features chosen here, so that the right numbers are known."""

import csv
import re

import numpy as np
import pytest
import small
from PIL import Image

from finetune import alignment_picture, attention_overlay, benchmark, reporting
from finetune.benchmark import FILES, BenchmarkConfig, counts, names, run
from finetune.metrics import Protocol, evaluate
from finetune.rerank import RerankConfig
from recipes.errors import UserError
from shards.embeddings import EmbeddingTable
from shards.schema import UNKNOWN
from shards.unpacked import is_source

OFF, ON = RerankConfig(), RerankConfig(k1=4, k2=2)
PEOPLE = {"role": "reid", "identities": 24, "train_identities": 12, "images_per_identity": 5}  # 24 queries, 36 gallery


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return small.drawn(tmp_path_factory.getbasetemp(), PEOPLE)


def embedding(noise: float):
    """Unit features of every image: its identity's direction, and as much noise drawn by its row."""

    def embed(reader) -> EmbeddingTable:
        clean = np.eye(64)[reader.pids % 64]
        wrong = np.random.default_rng(len(reader)).standard_normal((len(reader), 64)) * noise / 8
        features = ((clean + wrong) / np.linalg.norm(clean + wrong, axis=1, keepdims=True)).astype(np.float32)
        return EmbeddingTable(features, reader.pids, reader.camids, reader.keys)

    return embed


@pytest.fixture(scope="module")
def one(people, tmp_path_factory):
    """The folder of an evaluation with re-ranking, and its outcome."""
    out = tmp_path_factory.mktemp("one") / "run"
    config = BenchmarkConfig(shards=str(people), strips=2, far=0.1, bootstrap=200)
    return out, run(config, ON, embedding(2.0), out, "a model", {"ckpt": "runs/x"})[0]


def test_everything_is_there(one):
    out, outcome = one
    # the pictures of aligned stripes and of learned attention need models that have these
    others = {alignment_picture.NAME, attention_overlay.NAME, attention_overlay.NUMBERS}
    assert {path.name for path in out.iterdir()} == {*FILES, "embeddings"} - others
    told = small.json_of(out / "results.json")
    query, gallery = (EmbeddingTable.load(out / "embeddings" / split) for split in ("query", "gallery"))
    plain = evaluate(query, gallery)
    assert 0.1 < plain.mAP < 0.95, "features that leave something to tell"
    assert {key: told[key] for key in plain.numbers()} == pytest.approx(plain.numbers())
    assert told["average_precision"] == plain.ap.tolist() == outcome.plain.ap.tolist()
    assert told["cmc"][:10] == plain.cmc[:10].tolist()
    assert told["ckpt"] == "runs/x"
    assert told["title"] == "a model"
    for key in ("mAP", "rank1", "rank5", "rank10", "mINP"):
        low, high = told["intervals"][key]
        assert low <= told[key] <= high
    assert told["intervals"]["resamples"] == 200


def test_data_version_split_and_protocol_are_told(one, people):
    told = small.json_of(one[0] / "results.json")
    assert told["data"] == ["figures"]
    assert told["shards"] == str(people)
    assert told["version"] == small.json_of(people / "manifest.json")["packing"]["plan"][:12]
    assert told["splits"]["query"] == {
        **{"images": 24, "identities": 12, "cameras": 2, "distractors": 0, "junk": 0, "unlabelled": 0}
    }
    assert told["splits"]["gallery"]["images"] == 36
    assert told["protocol"] == {"same_camera": "drop", "rules": Protocol().rules()}
    sentence = one[1].sentence
    assert "figures" in sentence
    assert told["version"] in sentence
    assert Protocol().rules() in sentence


def test_re_ranking_stands_beside_the_plain_search(one):
    out, outcome = one
    told = small.json_of(out / "results.json")["reranked"]
    assert told["rerank"] == ON.model_dump()
    assert told["average_precision"] == outcome.reranked.ap.tolist()
    assert told["mAP"] == outcome.reranked.mAP
    assert set(told["intervals"]) >= {"mAP", "rank1"}
    rows = [line for line in (out / "table.md").read_text().split("\n") if line.startswith("| figures")]
    assert [re.split(r" *\| *", row)[2].split()[0] for row in rows] == ["plain", "re-ranked"]
    assert f"{100 * told['mAP']:.1f} [" in rows[1]


def test_a_row_for_every_query(one):
    out, outcome = one
    with (out / "queries.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    query, gallery = (EmbeddingTable.load(out / "embeddings" / split) for split in ("query", "gallery"))
    assert [row["key"] for row in rows] == list(query.keys)
    assert [float(row["ap"] or "nan") for row in rows] == pytest.approx(outcome.plain.ap.tolist(), nan_ok=True)
    assert [float(row["ap_reranked"] or "nan") for row in rows] == pytest.approx(
        outcome.reranked.ap.tolist(), nan_ok=True
    )
    pids = dict(zip(gallery.keys, gallery.pids.tolist(), strict=True))
    assert all(pids[row["best_match"]] == int(row["pid"]) for row in rows if row["best_match"])
    assert sum(bool(row["best_match"]) for row in rows) == outcome.plain.valid


def test_pictures_and_the_rest(one):
    out, outcome = one
    page = (out / "table.md").read_text()
    for name in ("strips.png", "distances.png", "cameras.png"):
        assert Image.open(out / name).width > 100
        assert re.search(rf"!\[[^\]]{{40,}}\]\({name}\)", page), f"{name} is described for who cannot see it"
    with (out / "cameras.csv").open(newline="") as file:
        rows = [(int(row["query"]), int(row["gallery"]), float(row["mAP"])) for row in csv.DictReader(file)]
    assert [row[:2] for row in rows] == [(0, 1), (1, 0)]
    assert rows == [(pair["query"], pair["gallery"], pair["mAP"]) for pair in outcome.told["cameras"]]
    assert all(len(found) == 10 for found in small.json_of(out / "nearest.json").values())
    told = outcome.told
    threshold = outcome.calibration().threshold
    assert threshold == told["calibration"]["threshold"]
    assert told["calibration"]["asked_far"] == 0.1
    assert told["calibration"]["title"] == f"figures ({told['version']})"
    assert f"FAR 0.1 {reporting.distance(threshold)}" in page
    assert told["verification"]["roc"]
    assert told["not_measured"] == []


def test_a_second_evaluation_leaves_nothing_old(one, people, tmp_path):
    config = BenchmarkConfig(shards=str(people), strips=2, bootstrap=0)
    run(config, ON, embedding(2.0), tmp_path, "first", {})
    less = config.model_copy(update={"strips": 0, "far": 1e-3})
    (outcome,) = run(less, OFF, embedding(0.0), tmp_path, "second", {})
    assert not (tmp_path / "strips.png").exists()
    told = small.json_of(tmp_path / "results.json")
    assert (told["mAP"], told["rank1"], told["mINP"]) == (1, 1, 1), "without noise every match comes first"
    assert "intervals" not in told
    assert "reranked" not in told
    # 36 x 24 pairs are too few for one false accept in 1,000; the rest is told all the same
    assert told["calibration"] is None
    assert told["verification"]["different_pairs"] > 700
    assert "too few for a threshold at a false accept rate of 0.001" in told["not_measured"][0]
    assert "* not measured:" in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match=r"nothing to calibrate with: .* too few for a threshold"):
        outcome.calibration()


def test_train_on_one_and_search_several(people, tmp_path):
    config = BenchmarkConfig(shards="nowhere", tests=(str(people), f"{people}/"), strips=0, bootstrap=0)
    first, second = run(config, OFF, embedding(1.0), tmp_path, "m", {"classes": 12})
    folders = [tmp_path / people.name, tmp_path / f"{people.name}~2"]
    assert [first.folder, second.folder] == folders
    for folder in folders:
        assert small.json_of(folder / "results.json")["mAP"] == first.plain.mAP
    every = small.json_of(tmp_path / "results.json")
    assert every["classes"] == 12
    assert [every["sets"][folder.name]["mAP"] for folder in folders] == [first.plain.mAP] * 2
    page = (tmp_path / "table.md").read_text()
    assert page.count("| figures | plain |") == 2
    assert f"[{people.name}~2]({people.name}~2/table.md)" in page
    assert not (tmp_path / "queries.csv").exists()


def test_the_protocol_reaches_every_number(people, tmp_path):
    config = BenchmarkConfig(shards=str(people), protocol=Protocol(same_camera="keep"), strips=0, bootstrap=0)
    (outcome,) = run(config, OFF, embedding(2.0), tmp_path, "m", {})
    told = outcome.told
    assert told["protocol"]["same_camera"] == "keep"
    assert Protocol(same_camera="keep").rules() in (tmp_path / "table.md").read_text()
    assert [(pair["query"], pair["gallery"]) for pair in told["cameras"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    query, gallery = (EmbeddingTable.load(tmp_path / "embeddings" / split) for split in ("query", "gallery"))
    same = query.pids[:, None] == gallery.pids
    assert told["verification"]["same_pairs"] == same.sum()
    assert outcome.plain.mAP == benchmark.score(str(people), embedding(2.0), config.protocol).mAP
    assert outcome.plain.mAP != evaluate(query, gallery).mAP


def test_names_of_sets():
    given = ["data/market1501", "s3://bucket/sets/duke/", "cuhk03_np:/raw/CUHK 03", "other/market1501", "figures:"]
    assert names(given) == ["market1501", "duke", "CUHK-03", "market1501~2", "figures"]
    assert is_source("figures:")
    assert BenchmarkConfig(shards="a").sets == ("a",)
    assert BenchmarkConfig(shards="a", tests=("b", "c")).sets == ("b", "c")


def test_counts_tell_every_kind_of_image():
    pids = np.array([3, 3, 5, 0, -1, UNKNOWN, UNKNOWN])
    table = EmbeddingTable(np.eye(7, dtype=np.float32), pids, np.array([0, 1, 1, 4, UNKNOWN, 0, 0]), list("abcdefg"))
    assert counts(table) == {
        **{"images": 7, "identities": 2, "cameras": 3, "distractors": 1, "junk": 1, "unlabelled": 2}
    }
