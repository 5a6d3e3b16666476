"""Embedding a whole set: the same bytes for any number of processes and after kills, and nothing of another model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small
import torch

from finetune import models
from finetune.augment import Augment, AugmentConfig
from finetune.methods import base as methods
from finetune.methods import build
from finetune.sampling import SamplingConfig
from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.checkpoint import load_backbone, save_teacher
from recipes.errors import UserError
from shards.embedding_parts import Parts
from shards.embeddings import EmbeddingTable, Keys
from shards.images import decode
from shards.reader import ShardReader

FILES = ("features.npy", "pids.npy", "camids.npy", "keys.npy", "table.json")
NORMALIZE = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
SIZE = (48, 16)  # not that of the images, 64 x 32


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


def make_teacher(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = BackboneConfig(name="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=2, num_heads=2)
    backbone = Backbone(timm_arguments(config, SIZE))
    backbone.initialise("fan_in")
    save_teacher(folder / "teacher", backbone, {"normalize": NORMALIZE})
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"), 0)


def command(teacher: Path, crops: Path, out: Path, *more: str) -> list[str]:
    script = str(small.ROOT / "finetune/embed.py")
    settings = ["--precision", "no", "--batch", "4", "--chunk", "4", "--workers", "0"]
    return [script, "--ckpt", str(teacher), "--shards", str(crops), "--out", str(out), *settings, *more]


@pytest.fixture(scope="module")
def alone(teacher, crops, tmp_path_factory) -> Path:
    """The table by one process that nobody disturbed: 128 images in 32 parts."""
    out = tmp_path_factory.mktemp("alone") / "table"
    assert small.run(command(teacher, crops, out)) == 0
    return out


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    assert [name for name in FILES if (ours / name).read_bytes() != (theirs / name).read_bytes()] == []
    assert sorted(path.name for path in ours.iterdir()) == sorted(FILES)
    assert not ours.with_name(f"{ours.name}.parts").exists()


def test_rows_are_the_cls_tokens_of_the_images_in_the_order_of_the_set(alone, teacher, crops):
    reader = ShardReader([crops], "unlabeled")
    loaded = EmbeddingTable.load(alone)
    assert loaded.keys == list(Keys(reader.keys))
    np.testing.assert_array_equal(loaded.pids, reader.pids)
    assert loaded.facts["set"] == reader.identity
    assert loaded.facts["input"] == {"height": 48, "width": 16, **NORMALIZE}
    direct, augment = models.load_stored(str(teacher))
    # by hand: torchvision's own way to size, to [0, 1] and normalise
    for row in (0, 77, 127):
        image = decode(reader[row].image).resize((16, 48), 2)
        pixels = torch.from_numpy(np.asarray(image) / 255.0).permute(2, 0, 1)
        mean, std = (torch.tensor(NORMALIZE[name])[:, None, None] for name in ("mean", "std"))
        with torch.no_grad():
            tokens = direct.backbone.vit.forward_features(((pixels - mean) / std).float()[None])
        cls = torch.nn.functional.normalize(tokens[0, 0], dim=0)
        np.testing.assert_allclose(loaded.features[row], cls, atol=2e-6)
        view = Augment(augment).test_view(decode(reader[row].image))
        assert view.shape == (3, *SIZE)


def test_half_precision_stores_the_same_rounded(alone, teacher, crops, tmp_path):
    assert small.run(command(teacher, crops, tmp_path / "half", "--half")) == 0
    half = EmbeddingTable.load(tmp_path / "half", mapped=True).features
    np.testing.assert_array_equal(half, EmbeddingTable.load(alone).features.astype(np.float16))


def test_a_fine_tuned_model_gives_its_retrieval_feature(teacher, crops, tmp_path):
    backbone = load_backbone(teacher)[0]
    augment = AugmentConfig(height=48, width=16, pad=4)
    method = build({"name": "bot"}, methods.Parts(backbone, 5, 0, SamplingConfig(), 0))
    models.save(tmp_path / "run" / "model", method, {"name": "bot"}, augment, {"classes": 5})
    assert small.run(command(tmp_path / "run", crops, tmp_path / "table")) == 0
    loaded = EmbeddingTable.load(tmp_path / "table")
    assert loaded.facts["input"]["mean"] == [0.5, 0.5, 0.5], "as in its training, not as in the pretraining"
    view = Augment(augment).test_view(decode(ShardReader([crops], "unlabeled")[5].image))
    with torch.no_grad():
        expected = method.eval().embed(torch.from_numpy(view)[None])[0]
    np.testing.assert_allclose(loaded.features[5], expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(loaded.features, axis=1), 1, atol=1e-6)


def test_two_processes_write_the_same_bytes(alone, teacher, crops, tmp_path):
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", small.free_port()]
    environment = small.environment(ACCELERATE_USE_CPU="true")
    line = [sys.executable, "-m", *launcher, *command(teacher, crops, tmp_path / "two")]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("128 images embedded") == 1
    assert "embed (process 1 of 2) 64/64" in done.stderr
    assert_same_bytes(tmp_path / "two", alone)


def test_killed_and_started_again(alone, teacher, crops, tmp_path, capsys):
    out = tmp_path / "table"
    parts = tmp_path / "table.parts"
    process = small.start(command(teacher, crops, out))
    try:
        deadline = time.monotonic() + 120
        while len(list(parts.glob("features-*.npy"))) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.0005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "table.json").exists()
    there = {path.name: path.stat().st_mtime_ns for path in parts.glob("features-*.npy")}
    assert 2 <= len(there) < 32
    assert small.run(command(teacher, crops, out)) == 0
    assert f"going on: {4 * len(there)} of the 128 images" in capsys.readouterr().out
    assert_same_bytes(out, alone)


@pytest.fixture
def half_done(alone, tmp_path) -> tuple[Path, Parts]:
    """A table of which some parts are there, as a kill leaves them."""
    whole = EmbeddingTable.load(alone)
    parts = Parts(tmp_path / "table", 128, 4, "float32", whole.facts)
    parts.begin()
    for number in (0, 3, 4):
        parts.save(number, whole.features[4 * number : 4 * number + 4])
    return tmp_path / "table", parts


def test_it_goes_on_after_a_kill_at_any_moment(half_done, alone, teacher, crops):
    out, parts = half_done
    marked = np.full((4, 32), 0.5, np.float32)
    parts.save(3, marked)  # a part that is there is not computed again
    (parts.folder / ".features-000005.npy.77.tmp").write_bytes(b"half")  # left by a kill
    out.mkdir()
    (out / "features.npy").write_bytes(b"half")  # a joining that was cut off
    assert small.run(command(teacher, crops, out)) == 0
    expected = EmbeddingTable.load(alone).features.copy()
    expected[12:16] = 0.5
    np.testing.assert_array_equal(EmbeddingTable.load(out).features, expected)


def test_killed_between_the_table_and_its_parts(half_done, alone, teacher, crops, capsys):
    out, _ = half_done
    shutil.copytree(alone, out)
    assert small.run(command(teacher, crops, out)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert_same_bytes(out, alone)


@pytest.mark.parametrize("which", ["parts", "table"])
def test_what_belongs_to_another_model_set_or_setting_is_refused(
    half_done, alone, teacher, crops, tmp_path, capsys, which
):
    out, parts = half_done
    if which == "table":
        shutil.copytree(alone, out)
        shutil.rmtree(parts.folder)
    other_set = small.drawn(tmp_path, {**small.UNLABELED, "identities": 30})
    other_model = make_teacher(tmp_path / "other", 1)
    for given, match in [
        (command(other_model, crops, out), "made with model"),
        (command(teacher, other_set, out), "made with set"),
        (command(teacher, crops, out, "--batch", "8"), "made with batch 4, now it is 8"),
        (command(teacher, crops, out, "--half"), "made with dtype float32, now it is float16"),
    ]:
        assert small.run(given) == 2
        assert match in capsys.readouterr().err
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)  # the same weights somewhere else
    assert small.run(command(moved, crops, out)) == 0
    assert (out / "features.npy").read_bytes() == (alone / "features.npy").read_bytes()


def test_wrong_use_is_told(teacher, crops, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    (tmp_path / "way.parts").mkdir()
    (tmp_path / "way.parts" / "thesis.txt").write_text("")
    for given, match in [
        (command(teacher, crops, tmp_path / "full"), "full exists already and is no embedding table"),
        (command(teacher, crops, tmp_path / "way"), "way.parts is in the way"),
        (command(tmp_path / "full", crops, tmp_path / "out"), "is no checkpoint"),
        (command(teacher, crops, tmp_path / "out", "--splits", "query"), "holds none of the splits query"),
    ]:
        assert small.run(given) == 2
        assert match in capsys.readouterr().err
    assert (tmp_path / "full" / "thesis.txt").exists()


def test_parts_of_all_shapes_are_joined_once(tmp_path):
    features = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    labels, keys = np.arange(10), Keys([f"k{i}" for i in range(10)])
    for chunk, ranks in ((3, 2), (10, 3), (1, 4), (100, 1)):
        out = tmp_path / f"t{chunk}"
        parts = Parts(out, 10, chunk, "float32", {"model": "m"})
        assert not parts.complete()
        parts.begin()
        shares = [parts.share(rank, ranks)[0] for rank in range(ranks)]
        assert sorted(number for share in shares for number in share) == list(range(-(-10 // chunk)))
        for share in reversed(shares):
            for number in share:
                parts.save(number, features[parts.span(number).start : parts.span(number).stop])
        parts.join(labels, labels, keys)
        assert parts.complete()
        np.testing.assert_array_equal(EmbeddingTable.load(out).features, features)
        assert json.loads((out / "table.json").read_text())["facts"] == {"model": "m"}


def test_a_missing_part_and_a_feature_that_is_not_finite(tmp_path):
    parts = Parts(tmp_path / "t", 4, 2, "float16", {})
    parts.begin()
    parts.save(0, np.ones((2, 3), np.float32))
    with pytest.raises(UserError, match=r"1 parts of .* are missing, first .*features-000001"):
        parts.join(np.zeros(4, np.int64), np.zeros(4, np.int64), Keys("abcd"))
    too_large = np.array([[1, 2, 3], [1, 1e6, 1]], np.float32)  # for float16
    with pytest.raises(UserError, match="features of row 3 are not finite"):
        parts.save(1, too_large)
