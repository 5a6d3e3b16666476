"""Shard sets: plain webdataset reads them, bytes depend on nothing but the plan, bad input leaves nothing behind."""

import dataclasses
import hashlib
import io
import json

import pytest
import webdataset
from writing import contents, made_rows, planned, run

from recipes.errors import UserError
from shards import catalogue, index
from shards.images import ImagesConfig, decode
from shards.schema import UNKNOWN, Record


@pytest.fixture
def made(tmp_path):
    return made_rows(tmp_path)


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
    for name, split, records in planned(made, tmp_path)[0]:
        buffer = io.BytesIO()
        with webdataset.TarWriter(buffer, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
            for row in records:
                meta = {"pid": row.pid, "camid": row.camid, "captions": list(row.captions) or None}
                meta = json.dumps({k: v for k, v in meta.items() if v is not None}, sort_keys=True)
                # two calls, because one call would sort json before png
                tar.write({"__key__": row.key, "png" if split == "unlabeled" else "jpg": row.read()})
                tar.write({"__key__": row.key, "json": meta.encode()})
        assert (tmp_path / "set" / name).read_bytes() == buffer.getvalue()


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


def test_permuted_by_seed(tmp_path, made):
    def keys(rows=made, **packing):
        shards, digest = planned(rows, tmp_path, **packing)
        return [record.key for _, split, records in shards for record in records if split == "train"], digest

    first, digest = keys()
    assert sorted(first) == [f"train/{i:03}" for i in range(50)]
    assert first != sorted(first)
    assert keys() == (first, digest)
    assert keys(made[::-1]) == (first, digest), "the order in which a source lists its records does not matter"
    assert keys(seed=1)[0] != first
    assert len({digest, keys(seed=1)[1], keys(shard_samples=7)[1], keys(drop_labels=True)[1]}) == 4
    assert keys(workers=3)[1] == digest
    relabelled = [dataclasses.replace(made[0], pid=77), *made[1:]]
    assert keys(relabelled)[0] == first
    assert keys(relabelled)[1] != digest


def test_two_keys_of_one_hash_stand_in_the_order_of_the_keys(tmp_path, made, monkeypatch):
    class Same:
        def digest(self):
            return bytes(8)

    real = hashlib.blake2b
    monkeypatch.setattr(
        catalogue.hashlib, "blake2b", lambda data, digest_size, **more: real(data) if digest_size == 32 else Same()
    )
    pair = made[3:5]
    orders = [[r.key for r in planned(rows, tmp_path)[0][0][2]] for rows in (pair, pair[::-1])]
    assert orders == [["train/003", "train/004"]] * 2


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
