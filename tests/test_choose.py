"""pretrain/choose.py on a run of seconds; and (soak) whether its score orders teachers as labels do."""

import shutil

import numpy as np
import pytest
import small
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from finetune import models
from finetune.augment import Augment
from finetune.features import Embedder
from finetune.metrics import evaluate
from pretrain import verdict
from pretrain.agreement import choose_images
from pretrain.config import PretrainConfig
from recipes.load import load
from shards.reader import ShardReader


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs of eight steps with four teachers; `data` beside it is its set."""
    base = tmp_path_factory.mktemp("choose")
    data = small.drawn(base, small.UNLABELED)
    more = ("schedules.epochs=2", "checkpoint.teacher_every_epochs=0.5")
    assert small.run(small.arguments("pretrain/run.py", base / "run", data, *more)) == 0
    return base / "run"


def choose(run, *more: str) -> int:
    return small.run([str(small.ROOT / "pretrain/choose.py"), str(run), *more])


def test_it_scores_every_teacher_and_names_the_best(run, tmp_path, capsys):
    assert choose(run, "--images", "64", "--out", str(tmp_path)) == 0
    told = small.json_of(tmp_path / "choice.json")
    assert [row["epochs"] for row in told["teachers"]] == [0.5, 1.0, 1.5, 2.0]
    assert told["teachers"][-1]["ckpt"] == str(run / "teacher"), "the last snapshot is the teacher: scored once"
    scores = {row["ckpt"]: row["score"] for row in told["teachers"]}
    assert told["chosen"] == max(scores, key=scores.get)
    assert all(1 / 64 <= score <= 1 for score in scores.values())
    for row in told["teachers"]:
        assert 0 <= row["rank1"] <= 1
        assert 1 <= row["effective_rank"] <= 32
        assert row["below_best"]["low"] <= row["below_best"]["mean"] <= row["below_best"]["high"]
        assert row["below_best"]["mean"] == pytest.approx(scores[told["chosen"]] - row["score"])
        assert (row["ckpt"] in told["as_good"]) == (row["below_best"]["low"] <= 0 and row["ckpt"] != told["chosen"])
    assert told["images"]["count"] == 64
    assert torch.__version__.startswith(told["environment"]["versions"]["torch"])
    assert (tmp_path / "choice.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr()
    assert f"next: python finetune/run.py --ckpt {told['chosen']}" in out.out
    assert "training images, in views that the training did not make" in out.out
    assert "images/s" in out.err


def test_the_same_command_gives_the_same_numbers(run, tmp_path):
    for name, more in (("one", []), ("again", []), ("other", ["--images", "100"])):
        assert choose(run, "--images", "64", "--out", str(tmp_path / name), *more) == 0
    one, again, other = (small.json_of(tmp_path / name / "choice.json") for name in ("one", "again", "other"))
    assert one["teachers"] == again["teachers"]
    assert one["teachers"] != other["teachers"]


def test_against_the_start_it_also_judges(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert choose(copy, "--images", "64", "--against", "none") == 0
    told, choice = small.json_of(copy / "verdict.json"), small.json_of(copy / "choice.json")
    assert told["verdict"] in ("GO", "NO-GO", "UNDECIDED")
    assert told["start"]["ckpt"] == "none"
    assert [row["epochs"] for row in choice["teachers"]] == [0, 0.5, 1.0, 1.5, 2.0]
    assert choice["chosen"] != "none"
    out = capsys.readouterr().out
    assert f"verdict: {told['verdict']}. {told['reason']}" in out
    assert f"next: python finetune/run.py --ckpt {told['take']}" in out


def test_a_run_under_way_has_snapshots_and_no_last_teacher(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "teacher")
    shutil.rmtree(copy / "teachers" / "epoch-0002.00")
    assert choose(copy, "--images", "64") == 0
    assert len(small.json_of(copy / "choice.json")["teachers"]) == 3


def test_what_is_no_run_is_refused(run, tmp_path, capsys):
    assert choose(tmp_path) == 2
    assert "is no run folder of pretrain/run.py: it has no recipe.yaml" in capsys.readouterr().err
    shutil.copy(run / "recipe.yaml", tmp_path)
    assert choose(tmp_path) == 2
    assert "holds no teacher" in capsys.readouterr().err
    assert choose(run, "--images", "20") == 2
    assert "20 images say nothing about a teacher" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert choose(run, "--out", str(tmp_path / "file")) == 2
    assert "results go into a folder" in capsys.readouterr().err


def spearman(a, b) -> float:
    """Rank correlation; equal values do not occur."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


SIZE = {"height": 64, "width": 32, "backdrop": 0.0, "variation": 0.55, "misaligned": 0.7, "similar": 0.9}
PEOPLE = {**SIZE, "cameras": 6, "camera_strength": 0.3}
CUT = [
    *("backbone.embed_dim=96", "backbone.depth=3", "backbone.num_heads=3", "heads.hidden_dim=256"),
    *("views.local_count=2", "checkpoint.every_epochs=100", "checkpoint.teacher_every_epochs=1"),
]
# colours are what tells drawn people apart: a teacher that learns to ignore them gets worse
NO_COLOURS = ["photometric.hue=0.5", "photometric.gray=0.5", "photometric.saturation=1.0", "photometric.brightness=0.6"]


@pytest.mark.soak
def test_the_score_orders_teachers_as_labels_do(tmp_path):
    figures = {"role": "unlabeled", "first_identity": 10_000, "identities": 250, "images_per_identity": 6}
    data = small.drawn(tmp_path, {**PEOPLE, **figures})
    test = {"role": "reid", "identities": 120, "train_identities": 20, "images_per_identity": 8}
    labelled = small.drawn(tmp_path, {**PEOPLE, **test})
    script, recipe = str(small.ROOT / "pretrain/run.py"), "recipes/pretrain/demo.yaml"
    up, down = tmp_path / "up", tmp_path / "down"
    shared = ["--recipe", recipe, f"loader.shards=[{data}]", *CUT]
    assert small.run([script, *shared, "--out", str(up), "schedules.epochs=8"]) == 0
    given = ["--ckpt", str(up), "schedules.epochs=4", "checkpoint.teacher_every_epochs=0.5", *NO_COLOURS]
    assert small.run([script, *shared, "--out", str(down), *given]) == 0

    accelerator, found = Accelerator(cpu=True), {}
    for name, out in (("up", up), ("down", down)):
        config = load(PretrainConfig, out / "recipe.yaml")
        images = choose_images(config.loader, config.cache, 512, 0)
        teachers = verdict.score(config, None, verdict.teachers_of(out), images, accelerator)
        accuracy = []
        for teacher in teachers:
            model, augment = models.load_stored(teacher.name)
            embed = Embedder(model, Augment(augment), accelerator, 0)
            tables = [embed(ShardReader([labelled], split)) for split in ("query", "gallery")]
            accuracy.append(evaluate(*tables).mAP)
        scores = {s: [getattr(t.agreement, s) for t in teachers] for s in ("score", "rank1", "effective_rank")}
        found[name] = {"mAP": accuracy, **scores}
    both = {key: found["up"][key] + found["down"][key] for key in found["up"]}
    for name, values in (*found.items(), ("both", both)):
        told = {key: round(spearman(values[key], values["mAP"]), 2) for key in values if key != "mAP"}
        print(name, told, {key: np.round(numbers, 4).tolist() for key, numbers in values.items()})
        assert told["score"] > 0.5, f"{name}: {told}"
    AcceleratorState._reset_state(reset_partial_state=True)
    best = int(np.argmax(both["score"]))
    assert both["mAP"][best] > max(both["mAP"]) - 0.01, "the chosen teacher is no worse than 1 % mAP below the best"
