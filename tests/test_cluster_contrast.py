"""Cluster Contrast from end to end: no label is read, a stopped run goes on as one that nobody disturbed, it learns."""

import os
import signal
import warnings

import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file
from test_two_processes import launch

from finetune import clusters, models
from finetune.config import FinetuneConfig
from finetune.methods import build
from finetune.methods.base import Parts
from finetune.methods.cluster_contrast import ClusterContrast
from pretrain import checkpoint
from recipes.load import load
from shards.assembly import build_set
from shards.images import ImagesConfig
from shards.packing import PackingConfig
from shards.reader import ShardReader

FIGURES = {"role": "reid", "identities": 16, "train_identities": 8, "images_per_identity": 8, "cameras": 2}
TINY = ["backbone.embed_dim=32", "backbone.depth=2", "backbone.num_heads=2"]
QUICK = [
    *TINY,
    *("benchmark.draw=null", "benchmark.strips=0", "benchmark.bootstrap=0", "log_every=1", "optim.epochs=3"),
    *("method.clusters.k1=6", "method.clusters.k2=2", "method.clusters.eps=0.7", "method.clusters.min_samples=2"),
    *("method.cluster_sampling.iterations=3", "sampling.identities_per_batch=4", "resume.every_epochs=1"),
]
READ_ONLY = ("purity", "ari", "images_per_s")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """8 identities x 8 images to train on, 8 others to search."""
    folder = tmp_path_factory.mktemp("people") / "set"
    build_set([{"name": "figures", "height": 64, "width": 32, **FIGURES}], folder, PackingConfig(), ImagesConfig())
    return folder


def command(out, people, *more: str, ckpt="none", script="finetune/run.py") -> list[str]:
    recipe = "recipes/finetune/cluster_contrast_figures.yaml"
    given = [f"benchmark.shards={people}", *QUICK, *more]
    return [str(small.ROOT / script), "--recipe", recipe, "--out", str(out), "--ckpt", str(ckpt), *given]


@pytest.fixture(scope="module")
def once(people, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("once") / "run"
    assert small.run(command(out, people)) == 0
    return out


def told(out) -> list[dict]:
    """All lines, without the numbers that are made of labels for people to read."""
    return [{key: value for key, value in line.items() if key not in READ_ONLY} for line in small.metrics(out)]


def assert_same(out, other) -> None:
    """Lines, state and model agree to the last bit."""
    assert told(out) == told(other)
    states = [checkpoint.states(run / "checkpoints")[-1] / "tensors.safetensors" for run in (out, other)]
    for ours, theirs in (states, [run / "model" / "model.safetensors" for run in (out, other)]):
        ours, theirs = load_file(ours), load_file(theirs)
        assert ours.keys() == theirs.keys()
        assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]


def test_a_run_tells_its_clusters_and_its_steps(once, people):
    lines = small.metrics(once)
    groups, steps = ([line for line in lines if ("clusters" in line) == wanted] for wanted in (True, False))
    assert [line["step"] for line in groups] == [0, 3, 6], "before the first step of each epoch"
    assert [line["step"] for line in steps] == list(range(9)), "a fixed number of iterations"
    rows = ShardReader([people], "train")
    for line in groups:
        assert line["clusters"] >= 2
        assert line["clusters"] * line["mean_size"] + line["noise"] == pytest.approx(len(rows))
        assert 0 < line["purity"] <= 1
        assert 0.5 <= line["camera_purity"] <= 1
    assert all(line["loss"] == line["nce"] for line in steps)
    assert 0 < small.json_of(once / "results.json")["mAP"] <= 1


def test_poisoned_labels_give_the_same_run(once, people, tmp_path, monkeypatch):
    """Every identity of the training images is another one, some are junk or missing."""
    honest = ShardReader.pids.func

    def poisoned(self):
        pids = honest(self)
        train = "train" in self.identity["sets"][0]["splits"]
        return np.random.default_rng(3).integers(-2, 5, len(pids)) if train else pids

    prop = type(ShardReader.__dict__["pids"])(poisoned)
    prop.__set_name__(ShardReader, "pids")
    monkeypatch.setattr(ShardReader, "pids", prop)
    assert small.run(command(tmp_path / "run", people)) == 0
    monkeypatch.undo()
    assert_same(tmp_path / "run", once)
    ours, theirs = (small.metrics(run)[0]["purity"] for run in (tmp_path / "run", once))
    assert ours != theirs, "the poison was there"


def test_a_plain_folder_ends_with_a_model_and_says_that_nothing_was_measured(people, tmp_path, capsys):
    reader, crops = ShardReader([people], "train"), tmp_path / "crops"
    for row in range(len(reader)):
        file = crops / f"day{row % 3}" / f"{row:03d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(reader[row].image)
    build_set([{"name": "folder", "path": str(crops)}], tmp_path / "set", PackingConfig(), ImagesConfig())
    line = command(tmp_path / "run", tmp_path / "set", "method.cluster_sampling.cameras=any", "optim.epochs=1")
    assert small.run(line) == 0
    out = capsys.readouterr().out
    assert "64 images without labels" in out
    assert "nothing was measured" in out
    assert not (tmp_path / "run" / "results.json").exists()
    first = small.metrics(tmp_path / "run")[0]
    assert "purity" not in first
    assert "camera_purity" not in first
    model, _ = models.load_stored(str(tmp_path / "run"))
    assert model.eval().embed(torch.randn(2, 3, 64, 32)).shape == (2, 32)


def test_stopped_inside_and_between_epochs(once, people, tmp_path, monkeypatch):
    line, original, count = command(tmp_path / "run", people), ClusterContrast.end_step, [0]

    def stopping(self):
        original(self)
        count[0] += 1
        if count[0] in (2, 6):  # inside the first epoch; in the last step of the second
            os.kill(os.getpid(), signal.SIGUSR1)

    embedded = []
    find = clusters.find
    monkeypatch.setattr(clusters, "find", lambda *given: embedded.append(len(given[0])) or find(*given))
    monkeypatch.setattr(ClusterContrast, "end_step", stopping)
    assert small.run(line) == 75
    assert len(embedded) == 1
    assert small.run(line) == 75
    assert len(embedded) == 2, "the clusters of the first epoch come from the state"
    assert small.run(line) == 0
    assert_same(tmp_path / "run", once)


def test_the_model_that_comes_out_holds_no_memory(once):
    tensors, config = checkpoint.load_model(once)
    assert not [key for key in tensors if "memory" in key or "centroid" in key or "labels" in key]
    assert {key for key in tensors if not key.startswith("backbone.")} == {
        *("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    }
    assert (config["classes"], config["method"]["name"]) == (0, "cluster_contrast")
    state = load_file(checkpoint.states(once / "checkpoints")[-1] / "tensors.safetensors")
    assert state["cluster_memory.labels"].shape == (64,)
    assert int(state["cluster_memory.epoch"]) == 2


def test_domain_adaptation_starts_with_the_features_of_its_source(people, tmp_path):
    source = small.arguments("finetune/run.py", tmp_path / "source", people, ckpt="none")
    assert small.run([*source, "optim.epochs=1"]) == 0
    bot, _ = models.load_stored(str(tmp_path / "source"))
    config = load(FinetuneConfig, "finetune/cluster_contrast_figures.yaml", TINY)
    backbone, _ = models.start_backbone(str(tmp_path / "source"), config.backbone, config.augment.size, 0)
    start = build(config.method, Parts(backbone, 0, 2, config.sampling, 0)).eval()
    images = torch.randn(4, 3, 64, 32)
    with torch.no_grad():
        # BoT searches with the feature before its neck, and a fresh BatchNorm changes nothing but the last digits
        torch.testing.assert_close(start.embed(images), bot.eval().embed(images), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["identities.labels=given"], "trains without labels; say so: identities.labels=none"),
        (["method.clusters.min_samples=60"], "so there is nothing to learn. Start from a pretrained teacher"),
    ],
)
def test_what_cannot_be_trained_is_told(more, told, people, tmp_path, capsys):
    assert small.run(command(tmp_path / "run", people, *more)) == 2
    assert told in capsys.readouterr().err


def test_a_method_with_classes_needs_labels(people, tmp_path, capsys):
    line = small.arguments("finetune/run.py", tmp_path / "run", people, "identities.labels=none", ckpt="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is told to initialise a classifier of no classes
        assert small.run(line) == 2
    assert "identities.labels = none leaves no classes to learn" in capsys.readouterr().err


@pytest.mark.soak
def test_two_processes_find_the_clusters_of_one(once, people, tmp_path):
    launch("torchrun", command(tmp_path / "run", people))
    assert small.json_of(tmp_path / "run" / "environment.json")["processes"] == 2
    ours, theirs = told(tmp_path / "run"), told(once)
    assert ours[0] == theirs[0], "each embeds its share, one clusters"
    assert ours[0]["clusters"] >= 2
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    # BatchNorm sees half of the images in each process, so later numbers are others
    assert 0 < small.json_of(tmp_path / "run" / "results.json")["mAP"] <= 1


def test_it_learns_people_that_it_never_saw(tmp_path):
    """24 people without labels, 24 others to search: mAP of the model after four epochs against random weights."""
    source = {"name": "figures", "role": "reid", "identities": 48, "train_identities": 24, "images_per_identity": 12}
    source |= {"cameras": 3, "height": 64, "width": 32, "camera_strength": 0.1, "variation": 0.2, "backdrop": 0.0}
    build_set([{**source, "similar": 0.0}], tmp_path / "set", PackingConfig(), ImagesConfig())
    more = ["method.clusters.k1=10", "method.clusters.k2=4", "method.clusters.eps=0.5", "method.clusters.min_samples=4"]
    more += ["method.cluster_sampling.iterations=16", "sampling.identities_per_batch=8", "optim.epochs=4"]
    more += ["optim.lr=1e-3", "backbone.embed_dim=64", "backbone.depth=3", "resume.every_epochs=4"]
    scores = {}
    for script in ("finetune/eval.py", "finetune/run.py"):
        assert small.run(command(tmp_path / script[9:-3], tmp_path / "set", *more, script=script)) == 0
        scores[script] = small.json_of(tmp_path / script[9:-3] / "results.json")["mAP"]
    assert scores["finetune/run.py"] >= 1.4 * scores["finetune/eval.py"], scores
