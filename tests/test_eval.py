"""finetune/eval.py as a user types it: without a recipe, on several sets, re-ranked, calibrated, following a run."""

import argparse
from pathlib import Path

import pytest
import small
import torch
from accelerate import Accelerator

from finetune import backbones, benchmark, features, models
from finetune.augment import Augment, AugmentConfig
from finetune.config import FinetuneConfig
from finetune.eval import short_finetune
from finetune.methods import build
from finetune.methods.base import Parts
from finetune.metrics import Protocol
from finetune.sampling import SamplingConfig
from finetune.verification import Calibration
from pretrain.backbone import Backbone
from pretrain.checkpoint import save_teacher
from recipes.load import load

EVAL = str(small.ROOT / "finetune" / "eval.py")
VIT = {"model_name": "vit_tiny_patch16_224", "num_classes": 0, "img_size": [64, 32], "patch_size": 8}
TIMM = {**VIT, "dynamic_img_size": True, "embed_dim": 32, "depth": 2, "num_heads": 2}
QUICK = ["benchmark.workers=0", "benchmark.strips=0", "benchmark.bootstrap=20", "precision=no"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`people`, a set; `model`, a run with a fine-tuned model of 64 x 32; `run`, a pretraining with two teachers."""
    base = tmp_path_factory.mktemp("eval")
    small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)
    (base / "people").symlink_to(tmp_path_factory.getbasetemp() / "drawn-reid")
    torch.manual_seed(0)
    section = {"name": "bot"}
    method = build(section, Parts(backbones.build(TIMM), 5, 0, SamplingConfig(), 0))
    augment = AugmentConfig(height=64, width=32, pad=0)
    models.save(base / "model" / "model", method, section, augment, {"classes": 5, "cameras": 0})
    for epoch in (1, 2):
        backbone = Backbone(TIMM)
        backbone.initialise("fan_in")
        facts = {"samples": 100 * epoch, "epochs": float(epoch)}
        save_teacher(base / "run" / "teachers" / f"epoch-000{epoch}.00", backbone, facts)
    (base / "run" / "recipe.yaml").write_text("seed: 0\n")
    return base


def evaluate(*words: str | Path) -> int:
    """Run the script; words in the order of the command line."""
    return small.run([EVAL, *map(str, words), *QUICK])


def direct(ckpt: Path, data: Path, flip: bool = False) -> float:
    """mAP by the parts, without the script."""
    model, augment = models.load_stored(str(ckpt))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as small.run
    embed = features.Embedder(model, Augment(augment), Accelerator(cpu=True), 0, flip)
    found = benchmark.score(str(data), embed, Protocol()).mAP
    torch.set_num_threads(threads)
    return found


def test_a_set_and_a_model_are_enough(place, tmp_path, capsys):
    assert evaluate("--ckpt", place / "model", "--data", place / "people", "--out", tmp_path) == 0
    told = small.json_of(tmp_path / "results.json")
    assert told["mAP"] == direct(place / "model", place / "people")
    assert told["shards"] == str(place / "people")
    assert told["intervals"]["resamples"] == 20
    printed = capsys.readouterr().out
    assert f"mAP {100 * told['mAP']:.1f}" in printed
    assert Protocol().rules() in printed
    teacher = place / "run" / "teachers" / "epoch-0001.00"
    assert evaluate("--ckpt", teacher, "--data", place / "people", "--out", tmp_path) == 0
    assert small.json_of(tmp_path / "results.json")["mAP"] == direct(teacher, place / "people")


def test_the_mirror_image_counts_with_flip(place, tmp_path):
    words = "--ckpt", place / "model", "--data", place / "people", "--out", tmp_path, "benchmark.flip=true"
    assert evaluate(*words) == 0
    told = small.json_of(tmp_path / "results.json")
    assert told["flip"] is True
    assert told["mAP"] == direct(place / "model", place / "people", flip=True)
    assert told["mAP"] != direct(place / "model", place / "people")


def test_several_sets_and_re_ranking(place, tmp_path):
    data = ["--data", place / "people", "--data", f"{place / 'people'}/"]
    assert evaluate("--ckpt", "histogram", *data, "--rerank", "--out", tmp_path, "rerank.k2=3") == 0
    first, second = (small.json_of(tmp_path / name / "results.json") for name in ("people", "people~2"))
    assert first["average_precision"] == second["average_precision"]
    assert first["reranked"]["rerank"]["k1"] == 20
    assert first["reranked"]["rerank"]["k2"] == 3
    assert first["reranked"]["mAP"] != first["mAP"]
    assert list(small.json_of(tmp_path / "results.json")["sets"]) == ["people", "people~2"]


def test_a_calibration_goes_into_the_model(place, tmp_path, capsys):
    folder, words = place / "model" / "model", ("--data", place / "people", "--out", tmp_path / "out", "--calibrate")
    before, weights = small.json_of(folder / "config.json"), (folder / "model.safetensors").read_bytes()
    assert evaluate("--ckpt", place / "model", *words, "benchmark.far=0.1") == 0
    after = small.json_of(folder / "config.json")
    found = Calibration(**after.pop("calibration"))
    assert after == before
    assert (folder / "model.safetensors").read_bytes() == weights
    assert found == Calibration(**small.json_of(tmp_path / "out" / "results.json")["calibration"])
    assert found.asked_far == 0.1
    assert found.title.startswith("figures (")
    assert str(folder) in capsys.readouterr().out
    # again, with another rate: replaced; the model is as before
    assert evaluate("--ckpt", folder / "model.safetensors", *words, "benchmark.far=0.2") == 0
    assert small.json_of(folder / "config.json")["calibration"]["asked_far"] == 0.2
    assert direct(place / "model", place / "people") == small.json_of(tmp_path / "out" / "results.json")["mAP"]
    # too few pairs for the default rate: the numbers are there, the old threshold stays
    assert evaluate("--ckpt", place / "model", *words) == 2
    assert "nothing to calibrate with" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").exists()
    assert small.json_of(folder / "config.json")["calibration"]["asked_far"] == 0.2


def test_following_scores_what_is_there(place, capsys):
    words = "--follow", place / "run", "--data", place / "people", "--once"
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    assert evaluate(*words) == 0
    teachers = sorted((place / "run" / "teachers").iterdir())
    scores = [direct(teacher, place / "people") for teacher in teachers]
    best = small.json_of(place / "run" / "follow" / "people" / "best.json")
    assert best["mAP"] == max(scores)
    assert best["ckpt"] == str(teachers[scores.index(max(scores))])
    assert all(path.read_bytes() == data for path, data in before.items()), "the pretraining is left as it was"
    assert f"epoch {best['epochs']:g}" in capsys.readouterr().out
    # scores of another protocol are not mixed with these
    assert evaluate(*words, "benchmark.protocol.same_camera=keep") == 2
    assert "protocol was" in capsys.readouterr().err


def test_a_short_fine_tune_has_a_short_warm_up():
    recipe = "recipes/finetune/bot_market1501.yaml"
    config = load(FinetuneConfig, recipe)
    given = argparse.Namespace(recipe=recipe, data=["data/x"], overrides=["seed=3"], finetune_epochs=12)
    made = short_finetune(given, config, Path("out"))
    assert made.overrides == [
        *('benchmark.shards="data/x"', "benchmark.draw=null", "seed=3"),
        *("optim.epochs=12", "optim.warmup_epochs=2"),  # of 120 epochs the recipe warms up 20
    ]
    assert made.folder == Path("out/finetune")
    assert load(FinetuneConfig, recipe, made.overrides).optim.epochs == 12


@pytest.mark.soak
def test_following_with_a_short_fine_tune(place, tmp_path):
    overrides = [*small.FINETUNE, "optim.epochs=20"]
    words = ["--follow", place / "run", "--data", place / "people", "--once", "--out", tmp_path, "--finetune-epochs", 1]
    assert evaluate(*words, "--recipe", "recipes/finetune/figures.yaml", *overrides) == 0
    best = small.json_of(tmp_path / "best.json")
    assert 0 < best["finetuned"]["mAP"] <= 1


FAULTS = {
    "--ckpt none --data {}/people": "--ckpt none with --data needs a --recipe",
    "--ckpt histogram --calibrate": "--ckpt histogram is no exported model of this project",
    "--ckpt {}/people --calibrate": "is no exported model of this project",
    "--ckpt {}/model --calibrate --data {}/people --data {}/people": "--calibrate takes one --ckpt and one test set",
    "--ckpt {}/model --calibrate --data {}/people benchmark.flip=true": "no benchmark.flip, which search.py has not",
    "--follow {}/run --data {}/people --data {}/people": "--follow scores on one test set",
    "--ckpt {}/model --once": "--once and --finetune-epochs belong to --follow RUN",
    "--follow {}/run --data {}/people --finetune-epochs 3": "--finetune-epochs takes 1 or more, and a --recipe",
    "--follow {}/run --data {}/people --poll 0": "--poll takes a number of seconds above 0",
    "--follow {}/people --data {}/people --once": "no run folder of pretrain/run.py",
    "--ckpt {}/model --data {}/nowhere": "shard set {}/nowhere does not exist",
    "--ckpt {}/model --data {}/people benchmark.protocol.same_camera=both": "same_camera = 'both' is refused",
}


@pytest.mark.parametrize("words", FAULTS)
def test_faults_are_one_sentence(words, place, tmp_path, capsys):
    out = [] if "--follow" in words else ["--out", tmp_path / "out"]
    given = [word.replace("{}", str(place)) for word in words.split()]
    assert evaluate(*given, *out) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert FAULTS[words].replace("{}", str(place)) in told
    assert not list(tmp_path.iterdir())
