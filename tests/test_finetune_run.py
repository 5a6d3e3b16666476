"""A fine-tune is a function of its recipe and its checkpoint, starts from the teacher's weights, and learns."""

import math

import pytest
import small
import torch
from safetensors.torch import load_file

from finetune import models
from finetune.config import FinetuneConfig
from pretrain.backbone import Backbone
from pretrain.checkpoint import save_teacher
from recipes.load import load

FINETUNE = "finetune/run.py"
TIMM = {"model_name": "vit_tiny_patch16_224", "num_classes": 0, "img_size": [64, 32], "patch_size": 8}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """12 identities x 5 images to train on, 12 others to search."""
    return small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An exported teacher with random weights that no seed of the recipe gives."""
    torch.manual_seed(1234)
    backbone = Backbone({**TIMM, "dynamic_img_size": True, "embed_dim": 32, "depth": 2, "num_heads": 2})
    backbone.initialise("fan_in")
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder / "teacher", backbone, {})
    return folder


@pytest.fixture(scope="module")
def once(people, teacher, tmp_path_factory):
    """A finished fine-tune."""
    out = tmp_path_factory.mktemp("once") / "run"
    assert small.run(small.arguments(FINETUNE, out, people, ckpt=teacher)) == 0
    return out


def same(out, other) -> bool:
    """Whether two runs agree to the last bit: losses, weights, numbers."""
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (out, other))
    assert ours.keys() == theirs.keys()
    scores = [small.json_of(run / "results.json")["average_precision"] for run in (out, other)]
    weights = all(torch.equal(ours[key], theirs[key]) for key in ours)
    return weights and small.metrics(out) == small.metrics(other) and scores[0] == scores[1]


@pytest.mark.parametrize("more", [[], ["benchmark.workers=1"], ["seed=1"]], ids=["again", "worker", "seed"])
def test_the_seed_decides_and_the_workers_do_not(more, once, people, teacher, tmp_path):
    assert small.run(small.arguments(FINETUNE, tmp_path / "run", people, *more, ckpt=teacher)) == 0
    assert same(tmp_path / "run", once) == (more != ["seed=1"])


def test_every_step_is_a_line(once):
    lines = small.metrics(once)
    assert [line["step"] for line in lines] == list(range(6)), "2 epochs of 3 batches of 4 x 4 of 60 images"
    assert [line["epoch"] for line in lines] == [0] * 3 + [1] * 3
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
        assert line["loss"] == pytest.approx(line["id"] + line["triplet"])
    assert lines[0]["id"] == pytest.approx(math.log(12), rel=2e-2), "a fresh classifier knows nothing"


def test_it_starts_from_the_teacher(people, teacher):
    config = load(FinetuneConfig, "finetune/figures.yaml", [f"benchmark.shards={people}", *small.FINETUNE])
    backbone, _ = models.start_backbone(str(teacher), config.backbone, config.augment.size, config.seed)
    ours = backbone.vit.state_dict()
    theirs = load_file(teacher / "teacher" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_larger_images_than_the_teacher_saw(people, teacher, tmp_path):
    command = small.arguments(FINETUNE, tmp_path / "run", people, "augment.height=128", "optim.epochs=1", ckpt=teacher)
    assert small.run(command) == 0
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")["backbone.vit.pos_embed"].shape == (1, 65, 32)
    config = small.json_of(tmp_path / "run" / "model" / "config.json")
    assert config["timm"]["img_size"] == [128, 32]


def test_it_learns_the_training_identities(people, tmp_path):
    easy = ["augment.erase=0", "augment.pad=0", "method.id_losses.triplet_weight=0", "optim.lr=3e-3", "optim.epochs=20"]
    assert small.run(small.arguments(FINETUNE, tmp_path / "run", people, *easy, ckpt="none")) == 0
    losses = [line["id"] for line in small.metrics(tmp_path / "run")]
    assert sum(losses[-10:]) / 10 < math.log(12) - 0.3


@pytest.mark.parametrize(
    "more",
    [
        ["optim.kind=sgd", "optim.by=epoch", "optim.lr=0.01"],
        ["precision=bf16"],
        ["identities.max_identities=6", "identities.images_per_identity=3", "sampling.images_per_identity=2"],
        ["method.necks.feature=after", "method.id_losses.margin=0.3", "benchmark.strips=0"],
    ],
    ids=["sgd", "bf16", "few labels", "method"],
)
def test_settings_reach_their_part(more, people, teacher, tmp_path, capsys):
    assert small.run(small.arguments(FINETUNE, tmp_path / "run", people, *more, "optim.epochs=1", ckpt=teacher)) == 0
    told = capsys.readouterr().out
    results = small.json_of(tmp_path / "run" / "results.json")
    assert 0 < results["mAP"] <= 1
    assert results["classes"] == (6 if "max_identities" in more[0] else 12)
    assert ("18 images of 6" if results["classes"] == 6 else "60 images of 12") in told
    assert (tmp_path / "run" / "strips.png").exists() == ("benchmark.strips=0" not in more)
    assert small.json_of(tmp_path / "run" / "model" / "config.json")["method"]["name"] == "bot"
