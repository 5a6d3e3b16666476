"""The command line: sources, overrides, recipes, errors as one sentence."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.errors import UserError
from shards.assembly import build_set
from shards.build import configure, main
from shards.images import ImagesConfig
from shards.packing import PackingConfig
from shards.reader import ShardReader
from shards.schema import UNKNOWN


def save_crop(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def raw(tmp_path):
    """`crops`: 5 images; `market`: 2 train, 1 query, 2 gallery."""
    for i in range(5):
        save_crop(tmp_path / "crops" / f"{i}.png", i)
    for name in (
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0007_c6s3_077419_03.jpg",
        "query/0001_c1s1_001051_00.jpg",
        "bounding_box_test/0000_c2s1_000151_01.jpg",
        "bounding_box_test/0001_c2s1_000301_00.jpg",
    ):
        save_crop(tmp_path / "market" / name)
    return tmp_path


def test_market_from_the_command_line(raw, capsys):
    assert main([f"market1501:{raw / 'market'}", "--out", str(raw / "set"), "packing.shard_samples=1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["split", "images", "identities", "cameras", "shards", "bytes"]
    assert [line[:5] for line in lines[1:4]] == [
        ["train", "2", "2", "2", "2"],
        ["query", "1", "1", "1", "1"],
        ["gallery", "2", "1", "1", "2"],
    ]
    assert lines[4][:3] == ["all", "5", "5"]
    reader = ShardReader([raw / "set"], "gallery")
    assert sorted(reader.pids.tolist()) == [0, 1]


def test_overrides_stand_anywhere(raw):
    arguments = ["source.split=gallery", "--out", str(raw / "set"), f"folder:{raw / 'crops'}", "images.max_height=8"]
    assert main(arguments) == 0
    assert len(ShardReader([raw / "set"], "gallery")) == 5


def test_several_sources(raw, capsys):
    given = [f"folder:{raw / 'crops'}", f"market1501:{raw / 'market'}"]
    assert main([*given, "--out", str(raw / "mixed")]) == 0
    reader = ShardReader([raw / "mixed"], ["train", "unlabeled"])
    assert sorted(key.partition(b"/")[0] for key in reader.keys) == [b"s0"] * 5 + [b"s1"] * 2
    given.append(f"cuhk03_np:{raw / 'market'}")
    for path in (raw / "market").glob("*/0007_c6*"):
        path.rename(path.with_name("0007_c2s3_077419_03.jpg"))
    with pytest.raises(UserError, match=r"market1501 and cuhk03_np both have labels, which may collide"):
        main([*given, "--out", str(raw / "both")])
    assert main([*given, "--out", str(raw / "both"), "packing.drop_labels=true", "packing.splits=[train]"]) == 0
    assert len(ShardReader([raw / "both"], "unlabeled")) == 4
    assert main([*given, "--out", str(raw / "union"), "packing.offset_labels=true"]) == 0
    union = ShardReader([raw / "union"], ["train", "gallery", "unlabeled"])
    labels = {(int(pid), int(camid)) for pid, camid in zip(union.pids, union.camids, strict=True)}
    # folder: none; market1501 is the second source, cuhk03_np the third; distractors stay distractors
    assert labels == {(UNKNOWN, UNKNOWN), (1_000_002, 100), (1_000_007, 101), (0, 101), (1_000_001, 101),
                      (2_000_002, 200), (2_000_007, 201), (0, 201), (2_000_001, 201)}  # fmt: skip
    capsys.readouterr()


def test_recipes_and_what_replaces_them(raw):
    config = configure(["market1501:x", "packing.workers=3"], None)
    assert config.sources == [{"name": "market1501", "path": "x"}]
    assert config.packing.workers == 3
    config = configure([], "recipes/shards/cuhk03_np.yaml")
    assert config.sources == [{"name": "cuhk03_np", "path": "cuhk03_np_detected", "variant": None}]
    assert configure(["folder:/a=b:c"], None).sources == [{"name": "folder", "path": "/a=b:c"}]
    recipe = raw / "mine.yaml"
    recipe.write_text(f"sources:\n  - name: folder\n    path: {raw / 'crops'}\nimages:\n  quality: 50\n")
    assert main(["--recipe", str(recipe), "--out", str(raw / "set")]) == 0


@pytest.mark.parametrize(
    "given,sentence",
    [
        ([], "nothing to pack: name a source"),
        (["flder:x"], "no source 'flder'; the nearest is 'folder'"),
        (["folder"], "source folder: key 'path' is missing"),
        (["folder:nowhere"], "image folder nowhere does not exist"),
        (["folder:crops", "packing.shard_sample=3"], "unknown key 'packing.shard_sample'; .*'shard_samples'"),
        (["folder:crops", "packing.splits=[training]"], "training"),
        (
            ["folder:crops", "source.junk=true"],
            "source.junk is a key of no source given here; they have keep_suffix, path, split",
        ),
        (["folder:crops", "source.split=val"], "source folder: split = 'val' is refused"),
        (["folder:crops", "--out", "crops/set"], "--out crops/set lies inside crops"),
        (["--recipe", "none.yaml"], "recipe none.yaml does not exist"),
    ],
)
def test_errors_are_sentences(raw, monkeypatch, given, sentence):
    monkeypatch.chdir(raw)
    before = sorted(raw.iterdir())
    with pytest.raises(UserError, match=sentence):
        main([*given, *([] if "--out" in given else ["--out", "set"])])
    assert sorted(raw.iterdir()) == before


def test_a_stray_file_is_named(raw):
    (raw / "crops" / "notes.txt").write_text("hello")
    out = ["--out", str(raw / "set")]
    with pytest.raises(UserError, match=r"crops/notes\.txt is not a JPEG, PNG, WebP or BMP image"):
        main([f"folder:{raw / 'crops'}", *out])
    assert main([f"folder:{raw / 'crops'}", *out, "images.on_bad=skip"]) == 0
    assert "notes.txt" in (raw / "set" / "skipped.txt").read_text()


def test_as_a_program(raw):
    script = Path(__file__).parents[1] / "shards" / "build.py"

    def run(*arguments):
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd=raw)

    shown = run("--help")
    assert shown.returncode == 0
    assert "examples:" in shown.stdout
    failed = run("folder:nowhere", "--out", "set")
    sentence = "error: image folder nowhere does not exist; give the folder that holds the crops\n"
    assert (failed.returncode, failed.stderr) == (2, sentence)


def test_from_another_part(raw):
    wanted = [{"name": "folder", "path": str(raw / "crops")}]
    manifest = build_set(wanted, raw / "set", PackingConfig(), ImagesConfig(), {"split": "train"})
    assert manifest.splits["train"].images == 5
    (source,) = manifest.sources
    assert source.items() >= {"name": "folder", "path": str(raw / "crops"), "split": "train"}.items()


def test_tars_of_others_are_used_where_they_lie(raw, capsys):
    main([f"folder:{raw / 'crops'}", "--out", str(raw / "packed"), "packing.shard_samples=2"])
    tars = raw / "elsewhere"
    tars.mkdir()
    for number, path in enumerate(sorted((raw / "packed").glob("*.tar"))):
        path.rename(tars / f"{number:05}.tar")
    capsys.readouterr()
    given = ["--in-place", str(tars / "{00000..00002}.tar"), "--out", str(raw / "set"), "source.split=train"]
    assert main(given) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["train", "5", "0", "0", "3"]
    assert not list((raw / "set").glob("*.tar"))
    reader = ShardReader([raw / "set"], "train")
    kept = {path.stem: path.read_bytes() for path in (raw / "crops").iterdir()}
    assert {reader[row].key: reader[row].image for row in range(5)} == kept
    with pytest.raises(UserError, match=r"--in-place changes no bytes: images.max_height"):
        main(["--in-place", str(tars), "--out", str(raw / "other"), "images.max_height=8"])


def test_counts_are_told_beside_the_published_ones(raw, capsys):
    main([f"market1501:{raw / 'market'}", "--out", str(raw / "set")])
    told = capsys.readouterr().out.splitlines()
    assert "Market-1501: differs from what was published" in told
    assert "  train: 2 images, 12,934 fewer than the published 12,936" in told
    main([f"market1501:{raw / 'market'}", "--out", str(raw / "part"), "packing.splits=[train]"])
    assert "published" not in capsys.readouterr().out
