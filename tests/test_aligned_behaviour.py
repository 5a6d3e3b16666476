"""What the aligned distance is for: people of whom a part is cut away."""

import functools

import numpy as np
import pytest
import small
import torch

from finetune.aligned_distance import pairwise
from finetune.metrics import evaluate
from finetune.rescoring import Rescored, RescoringConfig
from shards.assembly import build_set
from shards.embeddings import EmbeddingTable, Keys
from shards.images import ImagesConfig, decode
from shards.packing import PackingConfig
from shards.reader import ShardReader

FIGURES = {"role": "reid", "identities": 82, "train_identities": 2, "images_per_identity": 6, "cameras": 3,
           "height": 64, "width": 32}  # fmt: skip
STRIPES, SCALE = 16, 8.0


def colours(reader: ShardReader) -> EmbeddingTable:
    """Mean and spread of the colours of 16 stripes without what they have in common, by hand: [N, 16 * 6]."""
    found = []
    for row in range(len(reader)):
        picture = np.asarray(decode(reader[row].image).resize((32, 64)), np.float32)[:, 8:24] / 255
        rows = (picture - picture.mean(axis=(0, 1))).reshape(STRIPES, -1, 3)
        found.append(SCALE * np.concatenate([rows.mean(axis=1), rows.std(axis=1)], axis=1).ravel())
    return EmbeddingTable(np.stack(found), reader.pids, reader.camids, Keys(reader.keys))


def rank1(query: EmbeddingTable, gallery: EmbeddingTable, aligned: bool) -> float:
    local = tuple(table.features.reshape(len(table), STRIPES, -1) for table in (query, gallery))
    distance = functools.partial(lambda a, b, _, aligned: pairwise(a, b, aligned), aligned=aligned)
    found = Rescored((query.features, gallery.features), local, distance, "local", RescoringConfig(candidates=0))
    return float(evaluate(query, gallery, scores=found.scores).cmc[0])


def test_colours_of_cut_people_are_found_by_alignment(tmp_path):
    """240 queries of which 0.7 of the height is left; 80 people. By hand-made features: nothing is trained."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    build_set([{"name": "figures", **FIGURES}], whole, PackingConfig(workers=0), ImagesConfig())
    source = {"name": "cropped", "path": str(whole), "keep": [0.7, 0.7]}
    build_set([source], cut, PackingConfig(workers=0), ImagesConfig())
    query, gallery = (colours(ShardReader([cut], split)) for split in ("query", "gallery"))
    aligned, straight = (rank1(query, gallery, how) for how in (True, False))
    assert aligned >= 2 * straight  # 12.1 against 4.6 %
    assert aligned >= straight + 0.05


@pytest.mark.soak
def test_a_trained_model_finds_cut_people_by_alignment(tmp_path):
    """The recipe from random weights; Rank-1 of queries cut to 0.7, over all candidates."""
    torch.manual_seed(0)
    out, people, cut = tmp_path / "run", tmp_path / "people", tmp_path / "cut"
    figures = {"role": "reid", "identities": 200, "train_identities": 100, "images_per_identity": 8, "cameras": 6}
    build_set([{"name": "figures", "height": 64, "width": 32, **figures}], people, PackingConfig(), ImagesConfig())
    source = {"name": "cropped", "path": str(people), "keep": [0.7, 0.7]}
    build_set([source], cut, PackingConfig(), ImagesConfig())
    scripts = [str(small.ROOT / "finetune" / name) for name in ("run.py", "eval.py")]
    recipe = ["--recipe", "recipes/finetune/aligned_figures.yaml", "benchmark.draw=null", "benchmark.strips=0"]
    assert small.run([scripts[0], *recipe, "--ckpt", "none", "--out", str(out), f"benchmark.shards={people}"]) == 0
    second = ["benchmark.rescoring.distances=[local,both,unaligned]", "benchmark.rescoring.candidates=0"]
    line = [scripts[1], "--ckpt", str(out), "--data", str(cut), "--out", str(tmp_path / "cut-out"), *second]
    assert small.run(line) == 0
    told = small.json_of(tmp_path / "cut-out" / "results.json")
    found = {one["distance"]: one["rank1"] for one in told["rescored"]}
    assert found["local"] >= found["unaligned"] + 0.1
    assert found["local"] > told["rank1"], "and better than the global feature of the same model"
