"""Whatever a user gives wrongly is told in one sentence on stderr, with exit status 2, and nothing is left behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from PIL import Image
from safetensors.torch import save_file

from pretrain.backbone import Backbone
from pretrain.checkpoint import save_teacher

BUILD, PRETRAIN, FINETUNE, EVAL = "shards/build.py", "pretrain/run.py", "finetune/run.py", "finetune/eval.py"
TIMM = {"model_name": "vit_tiny_patch16_224", "num_classes": 0, "img_size": [64, 32], "patch_size": 8}
NAMES = (
    "bounding_box_train/{}_c1s1_000001_00.png",
    "query/{}_c1s1_000002_00.png",
    "bounding_box_test/{}_c2s1_000003_00.png",
)


def save_crop(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((64, 32, 3), 99, np.uint8)).save(path)


def raw_folders(base: Path) -> None:
    """`empty`; `mixed`, an image and a text; `market`, where identity 2 has one training image."""
    (base / "empty").mkdir()
    save_crop(base / "mixed" / "a.png")
    (base / "mixed" / "notes.jpg").write_text("no image")
    for name in NAMES:
        save_crop(base / "market" / name.format("0001"))
    save_crop(base / "market" / NAMES[0].format("0001").replace("c1", "c2"))
    save_crop(base / "market" / NAMES[0].format("0002"))


def checkpoints(base: Path) -> None:
    """Teachers: `wide` (64 instead of 32), `cut` (half a file), `other` (no model), `listed` (config is a list)."""
    wide = Backbone({**TIMM, "dynamic_img_size": True, "embed_dim": 64, "depth": 2, "num_heads": 2})
    save_teacher(base / "wide", wide, {})
    for name in ("cut", "listed"):
        shutil.copytree(base / "wide", base / name)
    weights = base / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    (base / "listed" / "config.json").write_text("[]")
    (base / "other").mkdir()
    save_file({}, base / "other" / "some.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the cases name: sets, raw images, checkpoints, a run, a file."""
    base = tmp_path_factory.mktemp("bad")
    raw_folders(base)
    checkpoints(base)
    crops = small.drawn(base, small.UNLABELED)
    small.drawn(base, small.LABELLED)
    single = [str(small.ROOT / BUILD), f"market1501:{base / 'market'}", "--out", str(base / "single")]
    assert small.run(single) == 0
    assert small.run(small.arguments(PRETRAIN, base / "run", crops, "schedules.epochs=0.01")) == 0
    (base / "file").write_text("a file")
    return base


CASES = {
    "unknown section": (PRETRAIN, "optm.clip=1", "unknown key 'optm'; the nearest known key is 'optim'"),
    "unknown key": (PRETRAIN, "optim.clipp=1", "unknown key 'optim.clipp'; the nearest known key is 'clip'"),
    "unknown key of a fine-tune": (FINETUNE, "--ckpt none augment.with=32", "the nearest known key is 'width'"),
    "out of range": (PRETRAIN, "schedules.lr=-1", "schedules.lr = -1 is refused: Input should be greater than 0"),
    "betas": (PRETRAIN, "optim.betas=[2,3]", "betas"),
    "no recipe": (PRETRAIN, "--recipe none.yaml", "recipe none.yaml does not exist"),
    "no set": (PRETRAIN, "loader.shards=[nowhere]", "shard set nowhere does not exist; pack one with"),
    "no sets": (PRETRAIN, "loader.shards=[]", "loader.shards = "),
    "a folder that is no set": (PRETRAIN, "loader.shards=[{}/mixed]", "mixed is no shard set"),
    "no set to fine-tune on": (FINETUNE, "--ckpt none benchmark.shards=nowhere", "shard set nowhere does not exist"),
    "no set to evaluate on": (EVAL, "--ckpt none benchmark.shards=nowhere", "shard set nowhere does not exist"),
    "no such split": (FINETUNE, "--ckpt none benchmark.shards={}/drawn-unlabeled", "holds none of the splits train"),
    "patches do not tile": (
        PRETRAIN,
        "views.global_size=[60,32]",
        "images of 60 x 32 pixels cannot be cut into patches",
    ),
    "patches of a crop": (PRETRAIN, "views.local_size=[32,12]", "32 x 12 pixels cannot be cut into patches"),
    "patches of a fine-tune": (FINETUNE, "--ckpt none augment.height=60", "images of 60 x 32 pixels cannot be cut"),
    "heads": (PRETRAIN, "backbone.num_heads=5", "dim should be divisible by num_heads"),
    "no ViT": (PRETRAIN, "backbone.name=resnet50", "resnet50"),
    "another run's folder": (PRETRAIN, "--out {}/run schedules.lr=0.001", "schedules.lr was 0.016 and is now 0.001"),
    "a set as run folder": (PRETRAIN, "--out {}/single", "it is no run folder; choose another --out"),
    "a file as run folder": (FINETUNE, "--ckpt none --out {}/file", "file: File exists; choose another --out"),
    "a file as result folder": (EVAL, "--ckpt histogram --out {}/file", "file is a file; results go into a folder"),
    "no checkpoint": (FINETUNE, "--ckpt nowhere", "--ckpt nowhere is no checkpoint: expected a folder with"),
    "no model inside": (EVAL, "--ckpt {}/other", "other is no checkpoint: expected a folder with"),
    "an image as checkpoint": (FINETUNE, "--ckpt {}/mixed/a.png", "a.png is no checkpoint"),
    "half a checkpoint": (EVAL, "--ckpt {}/cut", "cut cannot be read"),
    "a config that is none": (FINETUNE, "--ckpt {}/listed", "config.json is damaged (it holds no JSON object)"),
    "another width": (FINETUNE, "--ckpt {}/wide", "embed_dim is 64, the recipe asks for 32"),
    "another width to evaluate": (EVAL, "--ckpt {}/wide", "embed_dim is 64, the recipe asks for 32"),
    "no method named": (FINETUNE, "--ckpt none method={{}}", "method.name is missing; there are: aligned, bot,"),
    "no such method": (
        FINETUNE,
        "--ckpt none method.name=bott",
        "method.name = 'bott' is unknown; there are: aligned, bot,",
    ),
    "one image": (
        FINETUNE,
        "--ckpt none benchmark.shards={}/single",
        "identity 2 has only one training image; no pair can be formed from it: set identities.singletons=repeat",
    ),
    "too few identities": (
        FINETUNE,
        "--ckpt none sampling.identities_per_batch=13",
        "sampling.identities_per_batch = 13 identities cannot be filled: the training split has 12",
    ),
}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def command(script: str, given: str, place: Path, out: Path) -> list[str]:
    """The command line of a case; {} in it is `place`."""
    words = given.format(*[place] * given.count("{}")).split()
    options = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    data = place / ("drawn-unlabeled" if script == PRETRAIN else "drawn-reid")
    line = small.arguments(script, out, data, *overrides)
    return [*line[:5], *options, *line[5:]]


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_nothing_else(case, place, tmp_path, capsys):
    script, given, sentence = CASES[case]
    before = snapshot(place)
    capsys.readouterr()
    assert small.run(command(script, given, place, tmp_path / "new")) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert sentence in told
    assert snapshot(place) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "source,sentence",
    [
        ("folder:{}/nowhere", "nowhere does not exist"),
        ("folder:{}/empty", "empty holds no images"),
        ("folder:{}/mixed", "notes.jpg is not a JPEG, PNG, WebP or BMP image"),
        ("market1501:{}/mixed", "lacks bounding_box_train, query, bounding_box_test"),
    ],
)
def test_packing_leaves_nothing_behind(source, sentence, place, tmp_path, capsys):
    capsys.readouterr()
    assert small.run([str(small.ROOT / BUILD), source.format(place), "--out", str(tmp_path / "new")]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("packing ")]
    assert len(told) == 1
    assert told[0].startswith("error: ")
    assert sentence in told[0]
    assert not list(tmp_path.iterdir())


def test_as_a_program(place, tmp_path):
    """In a process of its own, warnings of the libraries included."""
    given = command(PRETRAIN, "optim.clipp=1", place, tmp_path / "new")
    done = subprocess.run(
        [sys.executable, *given], capture_output=True, text=True, env=small.environment(), timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "script,given,sentence",
    [
        (PRETRAIN, "loader.batch=15", "2 processes do not divide the global batch loader.batch=15"),
        (FINETUNE, "--ckpt none sampling.identities_per_batch=5", "identities_per_batch = 5 cannot be shared by 2"),
    ],
)
def test_processes_that_cannot_share_a_batch(script, given, sentence, place, tmp_path):
    line = command(script, given, place, tmp_path / "new")
    world = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": small.free_port(),
        "ACCELERATE_USE_CPU": "true",
    }
    both = [small.start(line, RANK=rank, LOCAL_RANK=rank, **world) for rank in ("0", "1")]
    for process in both:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 2
        assert told.startswith("error: ")
        assert told.count("\n") == 1
        assert sentence in told
    assert not list(tmp_path.iterdir())
