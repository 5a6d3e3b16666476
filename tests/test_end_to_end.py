"""The whole chain on drawn people: build -> pretrain -> plain timm -> fine-tune -> evaluate."""

import math

import pytest
import small
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from pretrain.centering import teacher_targets
from pretrain.checkpoint import load_backbone
from pretrain.config import PretrainConfig
from pretrain.gaps import Gaps
from pretrain.loader import build_batches
from pretrain.losses import named_losses
from pretrain.modules import build_modules
from recipes.load import load
from shards.embeddings import EmbeddingTable
from shards.reader import ShardReader

LN_K = math.log(64)  # of heads.out_dim in small.PRETRAIN


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with the results of the five commands that a user would type: two sets, a pretraining, a fine-tune."""
    base = tmp_path_factory.mktemp("chain")
    for name, figures in (("crops", small.UNLABELED), ("people", small.LABELLED)):
        keys = [f"source.{key}={value}" for key, value in figures.items()]
        size = ["source.height=64", "source.width=32", "source.cameras=2"]
        out = ["--out", str(base / name), "packing.shard_samples=50"]
        assert small.run([str(small.ROOT / "shards/build.py"), "figures", *out, *size, *keys]) == 0
    pretraining = small.arguments("pretrain/run.py", base / "pretrain", base / "crops", "schedules.epochs=3")
    assert small.run([*pretraining, "checkpoint.teacher_every_epochs=1"]) == 0
    given = base / "finetune", base / "people"
    assert small.run(small.arguments("finetune/run.py", *given, ckpt=base / "pretrain" / "teacher")) == 0
    return base


def evaluate(chain, ckpt, name: str) -> dict:
    """results.json of finetune/eval.py."""
    command = small.arguments("finetune/eval.py", chain / name, chain / "people", ckpt=ckpt)
    assert small.run(command) == 0
    return small.json_of(chain / name / "results.json")


def test_every_step_is_one_line_of_numbers(chain):
    lines = small.metrics(chain / "pretrain")
    assert [line["step"] for line in lines] == list(range(24))
    assert [line["samples"] for line in lines] == [16 * (step + 1) for step in range(24)]
    keys = {"step", "samples", "loss", "loss_cls", "loss_patch", "lr", "momentum", "images_per_s"}
    for line in lines:
        assert keys <= line.keys()
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        assert line["loss"] == pytest.approx(line["loss_cls"] + line["loss_patch"])


def test_the_terms_start_near_ln_k_and_fall(chain):
    lines = small.metrics(chain / "pretrain")
    for term in ("loss_cls", "loss_patch"):
        assert LN_K - 1 <= lines[0][term] <= LN_K + 0.3
    assert sum(line["loss"] for line in lines[-4:]) / 4 < lines[0]["loss"] - 0.5


def test_without_prototypes_both_terms_are_exactly_ln_k(chain):
    given = [f"loader.shards=[{chain / 'crops'}]", *small.PRETRAIN]
    config = load(PretrainConfig, "pretrain/smoke.yaml", given)
    modules = build_modules(config, torch.device("cpu"), 1)
    reader = ShardReader(config.loader.shards, config.loader.splits)
    batch = next(build_batches(config, reader, modules["student"].backbone, (0, 1), Accelerator(), Gaps()))
    assert batch.masks.flatten(2).any(-1).all(), "a view without a mask adds nothing to the mean"
    with torch.no_grad():
        for name in ("student", "teacher"):
            modules[name].head.last_layer.weight_g.zero_()  # all logits 0: uniform targets and predictions
        targets = teacher_targets(modules["centres"], modules["teacher"](batch), 0.04)
        losses = named_losses(modules["student"](batch), targets, batch.mask_weights, config.losses)
    assert losses["loss_cls"].item() == pytest.approx(LN_K, rel=1e-6)
    assert losses["loss_patch"].item() == pytest.approx(LN_K, rel=1e-6)


def test_the_teacher_is_a_plain_timm_model(chain):
    folder = chain / "pretrain" / "teacher"
    arguments = small.json_of(folder / "config.json")["timm"]
    plain = timm.create_model(arguments.pop("model_name"), **arguments).eval()
    plain.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    ours, _ = load_backbone(folder)
    images = torch.rand(3, 3, 64, 32)
    with torch.no_grad():
        assert torch.allclose(plain(images), ours.eval()(images).cls, atol=1e-5)
        assert torch.allclose(plain.forward_features(images)[:, 1:], ours(images).patches, atol=1e-5)


def test_teachers_are_kept_along_the_way(chain):
    names = sorted(path.name for path in (chain / "pretrain" / "teachers").iterdir())
    assert names == ["epoch-0001.00", "epoch-0002.00", "epoch-0003.00"]
    last, exported = (
        load_file(chain / "pretrain" / p / "model.safetensors") for p in (f"teachers/{names[-1]}", "teacher")
    )
    assert all(torch.equal(last[key], exported[key]) for key in exported)


def test_the_fine_tune_leaves_its_results(chain):
    out = chain / "finetune"
    results = small.json_of(out / "results.json")
    assert 0 < results["mAP"] <= 1
    assert results["valid"] + results["skipped"] == 24 == len(results["average_precision"])
    assert results["classes"] == 12
    nearest = small.json_of(out / "nearest.json")
    assert len(nearest) == 24
    assert all(len(found) == 10 for found in nearest.values())
    assert Image.open(out / "strips.png").width > 100
    assert {path.name for path in (out / "model").iterdir()} == {"model.safetensors", "config.json"}
    assert {"commit", "versions", "command"} <= small.json_of(out / "environment.json").keys()


def test_evaluating_the_model_gives_the_same_numbers(chain):
    trained = small.json_of(chain / "finetune" / "results.json")
    again = evaluate(chain, chain / "finetune", "again")
    for key in ("mAP", "rank1", "mINP", "average_precision"):
        assert again[key] == trained[key]
    assert (chain / "again" / "nearest.json").read_bytes() == (chain / "finetune" / "nearest.json").read_bytes()
    tables = [EmbeddingTable.load(chain / "again" / "embeddings" / split) for split in ("query", "gallery")]
    assert [len(table) for table in tables] == [24, 36]


def test_evaluation_without_training(chain):
    found = {ckpt: evaluate(chain, ckpt, f"eval-{ckpt}")["mAP"] for ckpt in ("none", "histogram")}
    found["teacher"] = evaluate(chain, chain / "pretrain", "eval-teacher")["mAP"]
    assert all(0 < value < 1 for value in found.values())
    assert len(set(found.values())) == 3, "three embeddings that have nothing to do with each other"
