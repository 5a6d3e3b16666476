"""Shard sets: plain webdataset reads them, bytes depend on nothing but the plan, bad input leaves nothing behind."""

import functools
import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import webdataset
from PIL import Image

from recipes.errors import UserError
from shards import index
from shards.images import ImagesConfig, decode
from shards.market_style import read_file
from shards.packing import PackingConfig, make_plan
from shards.schema import UNKNOWN, Record
from shards.tars import PARTS
from shards.writer import pack

CONFIGS = [{"name": "made"}]


def crop(number: int, kind: str = "JPEG", height: int = 32) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height // 8, 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((16, height)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def made(tmp_path):
    """50 training images with labels, 6 queries with captions, 10 unlabeled PNGs."""
    (tmp_path / "raw").mkdir()
    rows = []
    for i in range(66):
        path = tmp_path / "raw" / f"{i:03}"
        path.write_bytes(crop(i, "PNG" if i >= 56 else "JPEG"))
        read = functools.partial(read_file, path)
        if i < 50:
            rows.append(Record(f"train/{i:03}", "train", read, i // 5, i % 2, origin=str(path)))
        elif i < 56:
            rows.append(Record(f"query/{i:03}", "query", read, i, 0, (f"person {i} in red, éàü",), origin=str(path)))
        else:
            rows.append(Record(f"{i:03}", "unlabeled", read, origin=str(path)))
    return rows


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(rows, out, images=None, **packing):
    return pack(rows, out, PackingConfig(**{"shard_samples": 8} | packing), images or ImagesConfig(), CONFIGS)


def test_plain_webdataset_reads_the_set(tmp_path, made):
    manifest = run(made, tmp_path / "set")
    assert {s: (c.images, c.identities, c.cameras) for s, c in manifest.splits.items()} == {
        "train": (50, 9, 2),  # ids 0..9, of which 0 is a distractor
        "query": (6, 6, 1),
        "unlabeled": (10, 0, 0),
    }
    assert [e.samples for e in manifest.shards] == [8] * 6 + [2, 6, 8, 2]
    tars = [str(tmp_path / "set" / entry.name) for entry in manifest.shards]
    found = {s["__key__"]: s for s in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)}
    assert len(found) == 66
    for row in made:
        sample, meta = found[row.key], json.loads(found[row.key]["json"])
        assert sample.get("jpg", sample.get("png")) == row.read()
        expected = {"pid": row.pid, "camid": row.camid, "captions": list(row.captions) or None}
        assert meta == {name: value for name, value in expected.items() if value is not None}
    assert not (tmp_path / "set.partial").exists()


def test_bytes_are_those_of_webdatasets_writer(tmp_path, made):
    run(made, tmp_path / "set")
    plan = make_plan(made, PackingConfig(shard_samples=8), ImagesConfig(), CONFIGS)
    for shard in plan.shards:
        buffer = io.BytesIO()
        with webdataset.TarWriter(buffer, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            for row in shard.records:
                meta = {"pid": row.pid, "camid": row.camid, "captions": list(row.captions) or None}
                meta = json.dumps({k: v for k, v in meta.items() if v is not None}, sort_keys=True)
                # two calls, because one call would sort json before png
                tar.write({"__key__": row.key, "png" if shard.split == "unlabeled" else "jpg": row.read()})
                tar.write({"__key__": row.key, "json": meta.encode()})
        assert (tmp_path / "set" / shard.name).read_bytes() == buffer.getvalue()


def test_index_agrees_with_the_tars(tmp_path, made):
    manifest = run(made, tmp_path / "set")
    by_key = {row.key: row for row in made}
    for split in manifest.splits:
        rows = index.load(tmp_path / "set" / f"index-{split}.npy")
        tars = [(tmp_path / "set" / e.name).read_bytes() for e in manifest.shards if e.split == split]
        assert [int((rows["shard"] == n).sum()) for n in range(len(tars))] == [
            e.samples for e in manifest.shards if e.split == split
        ]
        for row in rows:
            record = by_key[row["key"].decode()]
            assert tars[row["shard"]][row["offset"] : row["offset"] + row["length"]] == record.read()
            assert row["pid"] == (UNKNOWN if record.pid is None else record.pid)
            assert row["camid"] == (UNKNOWN if record.camid is None else record.camid)


def test_permuted_by_seed(made):
    def keys(**packing):
        plan = make_plan(made, PackingConfig(**packing), ImagesConfig(), CONFIGS)
        return [r.key for r in plan.shards[0].records], plan.digest

    first, digest = keys()
    assert sorted(first) == [f"train/{i:03}" for i in range(50)]
    assert first != sorted(first)
    assert keys()[0] == first
    assert keys(seed=1)[0] != first
    assert len({digest, keys(seed=1)[1], keys(shard_samples=7)[1], keys(drop_labels=True)[1]}) == 4
    assert keys(workers=3)[1] == digest


def test_bytes_do_not_depend_on_the_workers_or_the_time(tmp_path, made):
    images = ImagesConfig(max_height=24)
    run(made, tmp_path / "a", images)
    run(made, tmp_path / "b", images, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    rows = index.load(tmp_path / "a" / "index-train.npy")
    image = (tmp_path / "a" / "train-000000.tar").read_bytes()[rows[0]["offset"] :][: rows[0]["length"]]
    assert decode(image).size == (12, 24)


def test_splits_and_dropped_labels(tmp_path, made):
    manifest = run(made, tmp_path / "set", splits=["train", "unlabeled"], drop_labels=True)
    assert {s: (c.images, c.identities, c.cameras) for s, c in manifest.splits.items()} == {"unlabeled": (60, 0, 0)}
    rows = index.load(tmp_path / "set" / "index-unlabeled.npy")
    assert set(rows["pid"]) == set(rows["camid"]) == {UNKNOWN}
    assert not any(key.startswith(b"query") for key in rows["key"])
    with pytest.raises(UserError, match=r"leaves no images; the source has query 6, train 50, unlabeled 10"):
        run(made, tmp_path / "other", splits=["gallery"])


def interrupt_at(rows, place):
    """The same records, but reading the one at `place` is Ctrl-C."""

    def stop():
        raise KeyboardInterrupt

    row = rows[place]
    cut = Record(row.key, row.split, stop, row.pid, row.camid, row.captions, row.origin)
    return [*rows[:place], cut, *rows[place + 1 :]]


def test_interrupted_and_continued(tmp_path, made, capsys):
    run(made, tmp_path / "whole")
    last = make_plan(made, PackingConfig(shard_samples=8), ImagesConfig(), CONFIGS).shards[4].records[3]
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_at(made, made.index(last)), tmp_path / "set")
    assert not (tmp_path / "set").exists()
    partial = tmp_path / "set.partial"
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert len(kept) == 4
    (partial / "train-000001.tar").write_bytes(b"short")  # not as long as its marker says: written again
    run(made, tmp_path / "set")
    assert "continuing an interrupted run: 3 of 10 tars" in capsys.readouterr().out
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert (tmp_path / "set" / "train-000000.tar").stat().st_mtime_ns == kept["train-000000.tar"]


def test_partial_of_another_plan_is_not_continued(tmp_path, made):
    run(made, tmp_path / "whole", seed=1)
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_at(made, 20), tmp_path / "set")
    run(made, tmp_path / "set", seed=1)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_killed_with_its_processes_and_continued(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(160):
        (raw / f"{i:03}.jpg").write_bytes(crop(i))
    program = (
        "from pathlib import Path; from shards.assembly import build_set; from shards.images import ImagesConfig; "
        "from shards.packing import PackingConfig\n"
        "if __name__ == '__main__':\n"
        "    build_set([{'name': 'folder', 'path': 'raw'}], 'OUT', PackingConfig(shard_samples=2, workers=W), "
        "ImagesConfig())\n"
    )

    def start(out, workers):
        script = tmp_path / f"{out}.py"
        script.write_text(program.replace("OUT", out).replace("W)", f"{workers})"))
        return subprocess.Popen([sys.executable, script], cwd=tmp_path, stderr=subprocess.DEVNULL)

    victim, whole = start("set", 2), start("whole", 0)
    partial = tmp_path / "set.partial"
    while len(list(partial.glob("*.tar"))) < 5:
        assert victim.poll() is None, "killed too late to test anything"
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "set").exists()
    assert whole.wait(60) == 0
    assert start("set", 0).wait(60) == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    assert not partial.exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_leaves_nothing(tmp_path, made, workers):
    bad = tmp_path / "raw" / "020"
    bad.write_bytes(crop(20)[:-30])
    with pytest.raises(UserError, match=r"raw/020 is a damaged or truncated JPEG image.*images\.on_bad=skip"):
        run(made, tmp_path / "set", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_bad_images_are_skipped_and_listed(tmp_path, made):
    (tmp_path / "raw" / "020").write_bytes(b"hello")
    (tmp_path / "raw" / "030").unlink()
    for i in range(50, 56):
        (tmp_path / "raw" / f"{i:03}").write_bytes(b"")
    manifest = run(made, tmp_path / "set", ImagesConfig(on_bad="skip"))
    assert manifest.skipped == 8
    assert {s: c.images for s, c in manifest.splits.items()} == {"train": 48, "unlabeled": 10}
    assert not list((tmp_path / "set").glob("query-*"))
    lines = (tmp_path / "set" / "skipped.txt").read_text().splitlines()
    assert len(lines) == 8
    assert any("raw/030 cannot be read (No such file or directory)" in line for line in lines)
    sizes = sum(len(index.load(path)) for path in (tmp_path / "set").glob("index-*.npy"))
    assert sizes == 58


def test_nothing_but_bad_images(tmp_path, made):
    for path in (tmp_path / "raw").iterdir():
        path.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"none of the 66 images can be decoded; the first: .*raw/"):
        run(made, tmp_path / "set", ImagesConfig(on_bad="skip"))
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_out_that_exists(tmp_path, made, capsys):
    first = run(made, tmp_path / "set")
    before = contents(tmp_path / "set")
    assert run(iter(made), tmp_path / "set", workers=2) == first
    assert "already holds this set; nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"set holds a set packed from other sources or with other settings; choose"):
        run(made, tmp_path / "set", seed=5)
    with pytest.raises(UserError, match=r"raw exists already and is not a shard set; choose another --out or delete"):
        run(made, tmp_path / "raw")
    assert contents(tmp_path / "set") == before
    (tmp_path / "set" / "train-000002.tar").unlink()
    with pytest.raises(UserError, match=r"set is incomplete: train-000002\.tar is missing"):
        run(made, tmp_path / "set")
    (tmp_path / "empty").mkdir()
    run(made, tmp_path / "empty")
    assert contents(tmp_path / "empty") == before


def test_a_folder_in_the_way_is_not_deleted(tmp_path, made):
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"set\.partial is in the way"):
        run(made, tmp_path / "set")
    assert (tmp_path / "set.partial" / "thesis.txt").exists()


@pytest.mark.parametrize("key", ["a.b", "a b", "/a", "", "a\tb"])
def test_bad_keys(tmp_path, key):
    with pytest.raises(UserError, match="a key has no dot or white space"):
        run([Record(key, "train", bytes)], tmp_path / "set")


def test_bad_records(tmp_path, made):
    with pytest.raises(UserError, match=r"raw/000 and .*raw/000 have the same key 'train/000'"):
        run([*made, made[0]], tmp_path / "set")
    with pytest.raises(UserError, match="is of split 'val'; known splits are train, query"):
        run([Record("a", "val", bytes)], tmp_path / "set")
    with pytest.raises(UserError, match="key too long for a tar"):
        run([Record("a" * 101, "train", bytes)], tmp_path / "set")
    with pytest.raises(UserError, match="made holds no images"):
        run([], tmp_path / "set")
    assert not (tmp_path / "set.partial").exists()


def test_a_tar_is_written_while_its_name_is_not_there(tmp_path, made, monkeypatch):
    """A crash before the rename leaves no tar under its final name, and the next run does not trust leftovers."""
    with pytest.raises(KeyboardInterrupt):
        run(interrupt_at(made, 0), tmp_path / "set", shard_samples=50)
    partial = tmp_path / "set.partial"
    assert not list(partial.glob("*.tar"))
    assert list((partial / PARTS).glob("train-000000.tar.*")), "the unfinished tar lies among the parts"
    run(made, tmp_path / "set", shard_samples=50)
    assert not (tmp_path / "set" / PARTS).exists()
