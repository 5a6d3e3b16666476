"""Sets of tars that stay where they are: read like packed ones, refused when damaged."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from recipes.errors import UserError
from shards import index, remote
from shards.in_place import expand, index_in_place
from shards.manifests import read_manifest
from shards.reader import ShardReader
from shards.verification import verify_set


def write_tar(path: Path, first: int, count: int = 4) -> Path:
    """A tar as img2dataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            told = json.dumps({"caption": f"person {number}", "width": 64}).encode()
            for suffix, data in (("jpg", b"image %d" % number), ("json", told), ("txt", b"person")):
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def tars(tmp_path) -> Path:
    for number in range(3):
        write_tar(tmp_path / "tars" / str(number % 2) / f"{number:05}.tar", 10 * number)
    return tmp_path / "tars"


def test_read_like_a_packed_set(tars, tmp_path):
    before = {path: path.read_bytes() for path in tars.rglob("*.tar")}
    manifest = index_in_place([str(tars)], tmp_path / "set", "unlabeled", workers=0)
    assert manifest == read_manifest(tmp_path / "set")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["index-unlabeled.npy", "manifest.json"]
    assert [Path(entry.name).name for entry in manifest.shards] == ["00000.tar", "00002.tar", "00001.tar"]
    assert (manifest.splits["unlabeled"].images, manifest.skipped) == (12, 0)
    reader = ShardReader([tmp_path / "set"], "unlabeled", captions=True)
    numbers = [*range(4), *range(20, 24), *range(10, 14)]
    assert [reader[row].key for row in range(12)] == [f"{number:09}" for number in numbers]
    assert [reader[row].image for row in range(12)] == [b"image %d" % number for number in numbers]
    assert reader[5].captions == ("person 21",)
    assert verify_set(str(tmp_path / "set"), workers=0, silent=True).fine
    assert before == {path: path.read_bytes() for path in tars.rglob("*.tar")}


def test_the_plan_tells_sets_apart(tars, tmp_path):
    def plan(out: str) -> str:
        return index_in_place([str(tars)], tmp_path / out, "train", workers=0).packing["plan"]

    first = plan("a")
    assert plan("b") == first
    write_tar(tars / "0" / "00000.tar", 50)
    assert plan("c") != first


def test_processes_give_the_same(tars, tmp_path):
    for number in range(3, 6):
        write_tar(tars / f"{number:05}.tar", 10 * number)
    for out, workers in (("a", 0), ("b", 2)):
        index_in_place([str(tars)], tmp_path / out, "train", workers=workers)
    for name in ("manifest.json", "index-train.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_keys_of_two_tars(tars, tmp_path):
    again = write_tar(tars / "2.tar", 12)
    with pytest.raises(UserError, match=rf"00001\.tar and {again} both hold the key 000000012"):
        index_in_place([str(tars)], tmp_path / "set", "train", workers=0)
    manifest = index_in_place([str(tars)], tmp_path / "set", "train", workers=0, on_bad="skip")
    assert (manifest.splits["train"].images, manifest.skipped) == (14, 2)
    assert (tmp_path / "set" / "skipped.txt").read_text().count("both hold the key") == 2
    assert manifest.shards[-1].samples == 2
    reader = ShardReader([tmp_path / "set"], "train")
    assert len({reader[row].key for row in range(14)}) == 14


def test_damage_is_refused_or_left_out(tars, tmp_path):
    path = tars / "0" / "00002.tar"
    path.write_bytes(path.read_bytes()[: 3 * 3 * 1024])  # without the last sample and the end
    gone = tars / "1" / "00001.tar"
    gone.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"00002\.tar is cut short or damaged: .*on_bad=skip"):
        index_in_place([str(tars)], tmp_path / "set", "train", workers=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tars"], "nothing is left behind"
    manifest = index_in_place([str(tars)], tmp_path / "set", "train", workers=0, on_bad="skip")
    assert [(Path(entry.name).name, entry.samples) for entry in manifest.shards] == [("00000.tar", 4), ("00002.tar", 3)]
    assert np.unique(index.load(tmp_path / "set" / "index-train.npy")["shard"]).tolist() == [0, 1]
    assert manifest.skipped == len((tmp_path / "set" / "skipped.txt").read_text().splitlines()) == 2
    reader = ShardReader([tmp_path / "set"], "train")
    assert [reader[row].image for row in range(7)] == [b"image %d" % number for number in (0, 1, 2, 3, 20, 21, 22)]


def test_tars_behind_urls(tars, tmp_path, monkeypatch):
    """A server that only this test knows; fetching itself is tested elsewhere."""
    fetched = []

    def fetch(url, into, size, crc32):
        fetched.append(Path(into))
        shutil.copy(tars / url.removeprefix("made://"), into)

    monkeypatch.setattr(remote, "fetch", fetch)
    urls = ["made://0/0000{0..2}.tar"]
    with pytest.raises(FileNotFoundError):
        index_in_place(urls, tmp_path / "set", "train", workers=0)
    shutil.copy(tars / "1" / "00001.tar", tars / "0" / "00001.tar")
    manifest = index_in_place(urls, tmp_path / "set", "train", workers=0)
    assert [entry.name for entry in manifest.shards] == [f"made://0/0000{number}.tar" for number in range(3)]
    assert verify_set(str(tmp_path / "set"), workers=0, silent=True).fine
    assert not any(path.exists() for path in fetched)
    write_tar(tars / "0" / "00001.tar", 90)
    report = verify_set(str(tmp_path / "set"), workers=0, silent=True)
    assert report.lost == 4
    assert report.tars[1].faults[0].startswith("made://0/00001.tar has other bytes")


def test_places(tmp_path):
    assert expand(["a/{08..11}-{0..1}.tar"])[:3] == [f"{Path.cwd()}/a/{name}.tar" for name in ("08-0", "08-1", "09-0")]
    assert expand(["s3://bucket/{9..10}.tar"]) == ["s3://bucket/9.tar", "s3://bucket/10.tar"]
    with pytest.raises(UserError, match=r"x\.tar is given twice"):
        expand(["x.tar", "./x.tar"])
    with pytest.raises(UserError, match="holds no tars"):
        expand([str(tmp_path)])
    with pytest.raises(UserError, match="no tars are given"):
        expand([])


def test_refused(tars, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out, split, places, sentence in (
        ("full", "train", [str(tars)], "full exists already"),
        ("set", "trian", [str(tars)], "'trian' is no split"),
        ("set", "train", ["gone.tar"], r"tar .*/gone\.tar does not exist"),
    ):
        with pytest.raises(UserError, match=sentence):
            index_in_place(places, tmp_path / out, split, workers=0)
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(UserError, match=r"empty\.tar hold no samples"):
        index_in_place([str(tmp_path / "empty.tar")], tmp_path / "set", "train", workers=0)
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "set.partial").exists()
