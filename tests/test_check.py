"""Counts of a source worked out by hand, and what is missing, damaged or there twice."""

import functools
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from PIL import Image

from recipes.errors import UserError
from shards import check, inspection, processes, sources, verification
from shards.images import ImagesConfig
from shards.packing import PackingConfig
from shards.schema import Published, Record
from shards.writer import pack

MARKET = {  # folder -> names; identities 1, 2 | 3 | 3 with a distractor
    "bounding_box_train": ["0001_c1s1_1", "0001_c2s1_1", "0002_c1s1_1", "0002_c3s1_1"],
    "query": ["0003_c1s1_1"],
    "bounding_box_test": ["0003_c2s1_1", "0000_c4s1_1", "0000_c5s1_1"],
}


def crop(number: int, height: int = 32, width: int = 16) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def market(tmp_path) -> Path:
    for number, (folder, name) in enumerate((folder, name) for folder, names in MARKET.items() for name in names):
        path = tmp_path / "market" / folder / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(crop(number, height=32 + number))
    return tmp_path / "market"


@pytest.fixture
def crops(tmp_path) -> Path:
    """Eight good images of which two repeat others, one that is cut, an empty one and a text."""
    folder = tmp_path / "crops"
    (folder / "inner").mkdir(parents=True)
    for number, (height, width) in enumerate([(10, 20), (30, 30), (50, 25), (60, 25), (90, 30), (200, 40)]):
        (folder / f"{number}.jpg").write_bytes(crop(number, height, width))
    shutil.copy(folder / "1.jpg", folder / "inner" / "again.jpg")
    shutil.copy(folder / "1.jpg", folder / "inner" / "and_again.jpg")
    (folder / "cut.jpg").write_bytes(crop(9, 90, 60)[:2000])
    (folder / "nothing.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    return folder


@pytest.fixture
def packed(tmp_path) -> Path:
    records = [Record(f"k{i}", "train", functools.partial(crop, i), i // 2 + 1, i % 3) for i in range(10)]
    records += [Record(f"q{i}", "query", functools.partial(crop, 20 + i), i + 1, 0) for i in range(3)]
    pack(records, tmp_path / "set", PackingConfig(shard_samples=4, workers=0), ImagesConfig(), [{"name": "made"}])
    return tmp_path / "set"


def run(capsys, *arguments) -> tuple[int, str]:
    """Exit status and what is on screen."""
    capsys.readouterr()
    status = check.main([str(argument) for argument in (*arguments, "--workers", 0)])
    return status, capsys.readouterr().out


def publish(monkeypatch, **splits) -> None:
    """The counts that the authors of Market-1501 are said to publish."""
    module = sources.find("market1501")
    told = Published("Market-1501 small", "by hand, 2026", splits)
    monkeypatch.setattr(module, "published", lambda config: told, raising=False)


def test_counts_of_a_source(market, tmp_path, monkeypatch, capsys):
    publish(monkeypatch, train=(4, 2), query=(1, 1), gallery=(3, None))
    status, told = run(capsys, f"market1501:{market}", "--json", tmp_path / "all.json")
    assert status == 0
    found = json.loads((tmp_path / "all.json").read_text())
    empty = {"junk": 0, "unlabelled": 0, "captions": 0}
    assert found["splits"] == {
        "train": {"images": 4, "identities": 2, "cameras": 3, "distractors": 0, **empty},
        "query": {"images": 1, "identities": 1, "cameras": 1, "distractors": 0, **empty},
        "gallery": {"images": 3, "identities": 1, "cameras": 3, "distractors": 2, **empty},
    }
    assert (found["images"], found["title"], found["fine"]) == (8, "Market-1501 small", True)
    assert found["height"] == [32, 35, 39]  # of 32..39 the lower middle
    assert found["width"] == [16, 16, 16]
    assert found["aspects"] == {"0": 0, "1": 0, "1.5": 0, "2": 8, "2.5": 0, "3": 0, "4": 0}
    assert found["bytes"] == sum(path.stat().st_size for path in market.rglob("*.jpg"))
    lines = [line.split() for line in told.splitlines()]
    assert ["gallery", "3", "1", "3", "2", "0", "0", "0"] in lines
    assert "  train: 4 images as published" in told
    assert "  train: 2 identities as published" in told


def test_what_is_missing_is_named(market, monkeypatch, capsys):
    publish(monkeypatch, train=(12936, 751), query=(1, 1), gallery=(2, None), unlabeled=(7, None))
    status, told = run(capsys, f"market1501:{market}")
    assert status == 1
    assert "  train: 4 images, 12,932 fewer than the published 12,936" in told
    assert "  train: 2 identities, 749 fewer than the published 751" in told
    assert "  query: 1 images as published" in told
    assert "  gallery: 3 images, 1 more than the published 2" in told
    assert "  unlabeled: 0 images, 7 fewer than the published 7" in told


def test_damaged_and_repeated_images(crops, tmp_path, capsys):
    status, told = run(capsys, f"folder:{crops}", "--list", tmp_path / "all.txt", "--json", tmp_path / "all.json")
    assert status == 1
    found = json.loads((tmp_path / "all.json").read_text())
    assert (found["images"], found["undecodable"], found["repeated"]) == (11, 3, 2)
    assert (found["repeated_across_splits"], found["splits"]["unlabeled"]["unlabelled"]) == (0, 11)
    assert found["height"] == [10, 30, 200]
    assert found["aspects"] == {"0": 1, "1": 3, "1.5": 0, "2": 2, "2.5": 0, "3": 1, "4": 1}
    listed = [line.split("\t") for line in (tmp_path / "all.txt").read_text().splitlines()]
    damaged = {line[1].partition(" ")[0] for line in listed if line[0] == "damaged"}
    assert damaged == {str(crops / name) for name in ("cut.jpg", "nothing.jpg", "text.jpg")}
    [repeated] = [line[1:] for line in listed if line[0] == "duplicate"]
    assert set(repeated) == {str(crops / name) for name in ("1.jpg", "inner/again.jpg", "inner/and_again.jpg")}
    assert "nothing.jpg is empty (0 bytes)" in told


def test_quick_does_not_decode(crops, tmp_path, capsys):
    status, _ = run(capsys, f"folder:{crops}", "--quick", "--json", tmp_path / "all.json")
    found = json.loads((tmp_path / "all.json").read_text())
    assert (status, found["undecodable"], found["repeated"]) == (1, 2, 2), "the header of the cut one is whole"
    assert found["height"] == [10, 50, 200]


def test_the_screen_shows_twenty_and_the_file_all(tmp_path, capsys):
    (tmp_path / "crops").mkdir()
    for number in range(33):
        (tmp_path / "crops" / f"{number}.jpg").write_text(f"no image {number}")
    status, told = run(capsys, f"folder:{tmp_path / 'crops'}", "--list", tmp_path / "all.txt")
    assert (status, told.count(" is not a JPEG, PNG, WebP or BMP image")) == (1, check.SHOWN)
    assert f"and 13 more: all are in {tmp_path / 'all.txt'}" in told
    assert len((tmp_path / "all.txt").read_text().splitlines()) == 33


def test_the_same_image_in_two_splits_is_counted(market):
    shutil.copy(market / "query" / "0003_c1s1_1.jpg", market / "bounding_box_train" / "0002_c4s1_1.jpg")
    config = sources.find("market1501").Config(path=market)
    tally = inspection.inspect_source("market1501", config, workers=0, silent=True)
    assert tally.duplicates() == (1, 1)


def test_processes_count_the_same(tmp_path):
    for number in range(130):  # three tasks
        (tmp_path / f"{number}.jpg").write_bytes(crop(number % 100, 32 + number % 7) if number % 50 else b"no image")
    config = sources.find("folder").Config(path=tmp_path)
    found = []
    for workers in (0, 2):
        bad: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inspection, "ALONE", 1)
            tally = inspection.inspect_source("folder", config, workers, on_bad=bad.append, silent=True)
        found.append((inspection.numbers(tally), sorted(bad), inspection.name_duplicates("folder", config, tally)))
    assert found[0] == found[1]
    assert found[0][0]["images"] == 130
    assert len(found[0][1]) == 3


def test_tasks_are_taken_as_they_are_needed():
    taken = []

    def tasks():
        for number in range(1000):
            taken.append(number)
            yield -number

    results = processes.spread(abs, tasks(), workers=1)
    assert next(results) == 0
    assert len(taken) <= 3
    results = processes.spread(abs, tasks(), workers=2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(taken) < 3 + 40
    results.close()


def test_a_packed_set(packed, tmp_path, capsys):
    status, told = run(capsys, packed, "--json", tmp_path / "all.json")
    assert status == 0
    assert "every byte is as packed: 13 samples in 4 tars" in told
    assert json.loads((tmp_path / "all.json").read_text())["fine"] is True
    assert run(capsys, packed, "--quick")[0] == 0
    tar = packed / "train-000001.tar"
    raw = bytearray(tar.read_bytes())
    raw[600] ^= 1  # in the first image
    tar.write_bytes(raw)
    assert run(capsys, packed, "--quick")[0] == 0, "the size is the same"
    status, told = run(capsys, packed, "--list", tmp_path / "all.txt")
    assert status == 1
    lost = [line.split("\t") for line in (tmp_path / "all.txt").read_text().splitlines() if line.startswith("lost")]
    assert [line[:2] for line in lost] == [["lost", "train-000001.tar"]]
    assert f"train-000001.tar: 1 samples of 4 are lost: {lost[0][2]}" in told
    assert told.endswith("1 of 13 samples are lost\n")
    tar.write_bytes(raw[:5000])
    assert run(capsys, packed, "--quick")[0] == 1


def test_what_stands_on_the_command_line(packed):
    """As a program: the exit status, and one sentence for an error."""
    for given, status in (([str(packed)], 0), (["folder:nowhere"], 2)):
        command = [sys.executable, str(small.ROOT / "shards/check.py"), *given]
        done = subprocess.run(command, capture_output=True, text=True, env=small.environment(), timeout=60)
        assert done.returncode == status
        assert done.stderr.count("error: ") == (status == 2)
        assert "Traceback" not in done.stderr


def test_tars_and_rows_that_do_not_belong_together(packed):
    shutil.copy(packed / "query-000000.tar", packed / "train-000007.tar")
    report = verification.verify_set(str(packed), workers=0, silent=True)
    assert report.faults == [f"{packed}/train-000007.tar is not in the manifest"]
    (packed / "train-000007.tar").unlink()
    manifest = json.loads((packed / "manifest.json").read_text())
    manifest["shards"][0]["samples"] += 1
    manifest["splits"]["train"]["images"] += 1
    (packed / "manifest.json").write_text(json.dumps(manifest))
    report = verification.verify_set(str(packed), workers=0, silent=True)
    assert "has 10 samples, the manifest says 11" in report.faults[0]
    assert "the index has 4 samples of it, the manifest 5" in report.tars[0].faults[0]
    assert report.lost == 0


def test_without_its_index_a_set_is_still_read(packed):
    (packed / "index-train.npy").unlink()
    report = verification.verify_set(str(packed), workers=0, silent=True)
    assert report.faults == [f"index {packed}/index-train.npy does not exist"]
    assert all(tar.fine for tar in report.tars)
    tar = packed / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:1500])
    [damaged] = [tar for tar in verification.verify_set(str(packed), workers=0, silent=True).tars if not tar.fine]
    assert any("holds 0 whole samples, the manifest says 4" in fault for fault in damaged.faults)


@pytest.mark.parametrize(
    "given,sentence",
    [
        (["market1502:x"], "there is no source 'market1502'; the nearest is 'market1501'"),
        (["market1501:nowhere"], "nowhere does not exist"),
        (["folder:x", "packing.seed=1"], "'packing.seed=1' is not of the form source.key=value"),
        (["folder:x", "source.splitt=train"], "source.splitt is a key of no source given here"),
        (["{}/set", "source.split=train"], "a packed set has no settings"),
        (["{}"], "is no packed set .* for example folder:"),
        (["nowhere"], "shard set nowhere does not exist"),
        (["{}/set", "--list", "{}/no/file"], "cannot write .*/no/file: No such file"),
    ],
)
def test_wrong_usage(packed, monkeypatch, given, sentence):
    monkeypatch.chdir(packed)
    with pytest.raises(UserError, match=sentence):
        check.main([text.format(packed.parent) for text in given])


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        check.main(["--help"])
    told = capsys.readouterr().out
    assert "python shards/check.py market1501:" in told
    assert "exit status: 0 all is well, 1 something is missing" in told
