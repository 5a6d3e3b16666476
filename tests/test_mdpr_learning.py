"""MDPR learns: unseen drawn people are found, and branches that learn from each other find them better."""

from pathlib import Path

import numpy as np
import pytest
import small
from accelerate import Accelerator

from finetune import models
from finetune.augment import Augment
from finetune.features import Embedder
from finetune.metrics import evaluate
from shards.reader import ShardReader

FIGURES = {"role": "reid", "images_per_identity": 8, "cameras": 6, "backdrop": 0.0, "variation": 0.55,
           "misaligned": 0.7, "camera_strength": 0.3}  # fmt: skip
BRANCHES = ("global", "last")  # what the distillation acts on


def trained(data: Path, out: Path, ckpt: str, *more: str) -> Path:
    """The recipe of the figures."""
    recipe = ["--recipe", "recipes/finetune/mdpr_figures.yaml", "--ckpt", ckpt, "--out", str(out)]
    given = [f"benchmark.shards={data}", "benchmark.draw=null", "benchmark.strips=0", "benchmark.bootstrap=0", *more]
    assert small.run([str(small.ROOT / "finetune/run.py"), *recipe, *given]) == 0
    return out


def found(run: Path, data: Path, streams: tuple[str, ...]) -> float:
    """mAP of a model searched by some of its streams."""
    model, augment = models.load_stored(str(run))
    model.search_by(streams)
    embed = Embedder(model, Augment(augment), Accelerator(cpu=True), 0)
    query, gallery = (embed(ShardReader([data], split)) for split in ("query", "gallery"))
    return evaluate(query, gallery).mAP


def test_a_short_training_finds_unseen_people(tmp_path):
    """20 people with 8 images each, as small as they can be: 13.9 % before any training, 27.9 % after it."""
    shape = {"identities": 60, "train_identities": 40, "height": 32, "width": 16}
    data = small.drawn(tmp_path, {**FIGURES, **shape})
    tiny = ["augment.height=32", "augment.width=16", "augment.pad=1", "method.dim=32", "optim.epochs=12"]
    run = trained(data, tmp_path / "run", "none", *tiny)
    untrained = trained(data, tmp_path / "start", "none", *tiny, "optim.epochs=1", "optim.lr=1e-9")
    before, after = (small.json_of(out / "results.json")["mAP"] for out in (untrained, run))
    assert after >= 1.5 * before


@pytest.mark.soak
def test_branches_that_learn_from_each_other_find_unseen_people_better(tmp_path):
    """From the teacher of the demo, three seeds; the mean over both branches, of 100 people that no training saw."""
    teacher, scripts = tmp_path / "teacher", small.ROOT / "pretrain"
    unlabelled = f"loader.shards=[{tmp_path / 'crops'}]"
    line = ["--recipe", "recipes/pretrain/demo.yaml", "--out", str(teacher), unlabelled, "pictures.images=0"]
    assert small.run([str(scripts / "run.py"), *line]) == 0
    data = small.drawn(tmp_path, {**FIGURES, "identities": 200, "train_identities": 100, "height": 64, "width": 32})
    gains = []
    for seed in range(3):
        runs = [trained(data, tmp_path / f"{name}-{seed}", str(teacher), f"seed={seed}", *more)
                for name, more in (("alone", ["method.distillation=null"]), ("together", []))]  # fmt: skip
        alone, together = ([found(run, data, (stream,)) for stream in BRANCHES] for run in runs)
        gains.append(np.mean(together) - np.mean(alone))
    assert np.mean(gains) > 0, gains
    assert sum(gain > 0 for gain in gains) >= 2, gains
