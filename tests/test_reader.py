"""Random access gives what plain webdataset gives; damage and wrong paths are told in one sentence."""

import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
import threading

import numpy as np
import pytest
import webdataset

from recipes.errors import UserError
from shards import index, packed
from shards.manifests import read_manifest, save_index
from shards.on_demand import ensure_sets
from shards.reader import ShardReader
from shards.schema import UNKNOWN, BadSample


def set_rows(folder, split, rows):
    """Replace the index of a split, with its place in the manifest."""
    count = save_index(np.array(rows), folder / f"index-{split}.npy")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"][split] = count.model_dump()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def plain(folder, split) -> list[dict]:
    """All samples of a split as webdataset's own stream has them."""
    tars = sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
    return list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))


@pytest.fixture
def copy(small_set, tmp_path):
    return shutil.copytree(small_set, tmp_path / "copy")


@pytest.mark.parametrize("split, count", [("train", 53), ("query", 5), ("gallery", 7)])
def test_random_access_equals_plain_webdataset(small_set, split, count):
    own, other = ShardReader([small_set], split, captions=True), plain(small_set, split)
    assert len(own) == len(other) == count
    for row in np.random.default_rng(0).permutation(count):
        sample, expected = own[int(row)], other[row]
        meta = json.loads(expected["json"])
        assert (sample.key, sample.image) == (expected["__key__"], expected["jpg"])
        assert (sample.pid, sample.camid) == (meta["pid"], meta["camid"])
        assert sample.captions == tuple(meta.get("captions", ()))
    assert own.keys.tolist() == [sample["__key__"].encode() for sample in other]
    assert own.pids.tolist() == [json.loads(sample["json"])["pid"] for sample in other]
    assert own.camids.tolist() == [json.loads(sample["json"])["camid"] for sample in other]
    assert own.pids.dtype == own.camids.dtype == np.int64


def test_sets_and_splits_follow_each_other(small_set, copy):
    both = ShardReader([small_set, copy], ["gallery", "query"])
    keys = [sample["__key__"] for split in ("gallery", "query") for sample in plain(small_set, split)]
    assert both.keys.tolist() == [key.encode() for key in keys + keys]
    assert [both[row].key for row in range(len(both))] == keys + keys
    assert both.shard_sizes.tolist() == [7, 5, 7, 5]
    assert ShardReader([small_set], "train").shard_sizes.tolist() == [12, 12, 12, 12, 5]


def test_a_split_may_be_missing_in_one_of_the_sets(small_set, copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"].pop("gallery")
    manifest["shards"] = [shard for shard in manifest["shards"] if shard["split"] != "gallery"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert len(ShardReader([small_set, copy], ["gallery", "query"])) == 7 + 5 + 5


@pytest.mark.parametrize("row", [-1, 53])
def test_rows_outside_are_refused(train_reader, row):
    with pytest.raises(IndexError):
        train_reader[row]


def test_captions_of_a_sample_without_any_are_empty(small_set):
    captions = {
        sample.key: sample.captions
        for sample in map(ShardReader([small_set], "query", captions=True).__getitem__, range(5))
    }
    assert captions["query/54"] == ()
    assert captions["query/55"] == ("person 55 wears red",)
    assert captions["query/56"] == ("person 56 wears red", "ein zweiter Satz, ä")


def test_labels_are_unknown_where_there_are_none(copy):
    rows = np.array(index.load(copy / "index-query.npy"))
    rows["pid"] = rows["camid"] = UNKNOWN
    set_rows(copy, "query", rows)
    sample = ShardReader([copy], "query")[0]
    assert (sample.pid, sample.camid) == (UNKNOWN, UNKNOWN)


@pytest.mark.row("R7")
def test_one_damaged_byte_is_noticed(copy):
    entry = index.load(copy / "index-train.npy")[20]
    tar = copy / "train-000001.tar"
    assert int(entry["shard"]) == 1
    data = bytearray(tar.read_bytes())
    data[int(entry["offset"]) + int(entry["length"]) // 2] ^= 1
    tar.write_bytes(data)
    damaged = ShardReader([copy], "train")
    with pytest.raises(BadSample) as caught:
        damaged[20]
    assert str(caught.value) == (
        f"sample {entry['key'].decode()!r} in {tar} is damaged: its bytes do not match the index"
    )
    assert damaged[19].key == damaged.keys[19].decode()
    assert damaged[21].key == damaged.keys[21].decode()


@pytest.mark.row("R7")
def test_a_shard_that_was_cut_or_lost_is_named(copy):
    tar = copy / "train-000004.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(UserError, match=r"train-000004\.tar is damaged"):
        ShardReader([copy], "train")[52]
    tar.unlink()
    with pytest.raises(UserError, match=r"cannot open shard .*train-000004\.tar: No such file"):
        ShardReader([copy], "train")[52]


def test_a_missing_set_is_told_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError) as caught:
        ShardReader([tmp_path / "luperson"], "train")
    assert str(caught.value) == (
        f"shard set {tmp_path}/luperson does not exist; "
        f"pack one with `python shards/build.py SOURCE:PATH --out {tmp_path}/luperson`"
    )


def test_a_folder_of_images_is_no_set(tmp_path):
    (tmp_path / "0001.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"is no shard set \(it holds no manifest\.json\)"):
        ShardReader([tmp_path], "train")


def test_a_split_that_is_not_there(small_set):
    with pytest.raises(UserError) as caught:
        ShardReader([small_set], ["unlabeled"])
    assert (
        str(caught.value) == f"shard set {small_set} holds none of the splits unlabeled; it has train, query, gallery"
    )


def test_a_misspelt_split_is_not_passed_over(small_set):
    with pytest.raises(UserError, match="'galery' is no split; known are train, query, gallery, unlabeled"):
        ShardReader([small_set], ["train", "galery"])


@pytest.mark.parametrize(
    "text, told",
    [("{", "is damaged"), ("[]", "is damaged"), ('{"format_version": 2}', "is damaged"), (None, "has format 99")],
)
def test_a_manifest_that_cannot_be_read(copy, text, told):
    path = copy / "manifest.json"
    if text is None:
        text = json.dumps(json.loads(path.read_text()) | {"format_version": 99})
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        read_manifest(copy)


def test_manifest_and_index_must_agree(copy):
    rows = np.array(index.load(copy / "index-train.npy"))
    index.save(rows[:-1], copy / "index-train.npy")
    with pytest.raises(UserError, match="does not hold the 53 samples of the manifest"):
        ShardReader([copy], "train")
    set_rows(copy, "train", rows[:-1])
    with pytest.raises(UserError, match="counts different samples in its tars and its splits"):
        ShardReader([copy], "train")


def open_tars(folder) -> int:
    """Files of a folder, ending in .tar, that this process holds open."""
    links, inside = [], os.path.realpath(folder)
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(link.startswith(inside) and link.endswith(".tar") for link in links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_few_files_stay_open(copy, monkeypatch):
    monkeypatch.setattr(packed, "OPEN_FILES", 2)
    own, expected, most = ShardReader([copy], "train"), plain(copy, "train"), 0
    for row in np.random.default_rng(1).integers(0, 53, size=200):
        assert own[int(row)].image == expected[row]["jpg"]
        most = max(most, open_tars(copy))
    assert most == 2
    own.close()
    assert open_tars(copy) == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_several_sets_share_the_files_that_may_be_open(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "OPEN_FILES", 4)
    other = shutil.copytree(copy, tmp_path / "other")
    own, most = ShardReader([copy, other], ["train", "gallery"]), 0
    for row in np.random.default_rng(1).integers(0, len(own), size=300):
        own[int(row)]
        most = max(most, open_tars(copy) + open_tars(other))
    assert 2 <= most <= 4
    own.close()


def test_a_pickled_reader_opens_its_own_files(small_set):
    own = ShardReader([small_set], "train")
    expected = [own[row] for row in range(53)]
    copy = pickle.loads(pickle.dumps(own))
    assert not copy.parts[0].files
    own.close()
    assert [copy[row] for row in range(53)] == expected


def _read_all(own: ShardReader, answers) -> None:
    answers.put([own[row].image for _ in range(5) for row in range(len(own))])


def test_forked_processes_read_at_the_same_time(small_set):
    # descriptors are shared after a fork: reading must not depend on their common file position
    own = ShardReader([small_set], "train")
    expected = [own[row].image for row in range(53)]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=_read_all, args=(own, answers)) for _ in range(3)]
    files = own.parts[0].files
    assert files
    assert [os.lseek(file, 0, os.SEEK_CUR) for file in files.values()] == [0] * len(files)
    for child in children:
        child.start()
    assert [own[row].image for _ in range(5) for row in range(53)] == expected * 5
    assert [answers.get(timeout=30) for _ in children] == [expected * 5] * 3
    for child in children:
        child.join(30)


def test_threads_do_not_close_each_others_files(small_set, monkeypatch):
    monkeypatch.setattr(packed, "OPEN_FILES", 1)
    own, expected = ShardReader([small_set], "train"), plain(small_set, "train")
    wrong = []

    def check(seed):
        for row in np.random.default_rng(seed).integers(0, 53, size=200):
            try:
                if own[int(row)].image != expected[row]["jpg"]:
                    wrong.append(row)
            except (OSError, UserError) as error:
                wrong.append(error)

    threads = [threading.Thread(target=check, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_set_is_made_on_first_use(tmp_path):
    recipe = tmp_path / "drawn.yaml"
    recipe.write_text("sources: [{name: figures, role: unlabeled, identities: 3, height: 32, width: 16}]\n")
    waits = []
    ensure_sets([tmp_path / "made"], recipe, main=False, wait=lambda: waits.append("other"))
    assert not (tmp_path / "made").exists()
    ensure_sets([tmp_path / "made"], recipe, main=True, wait=lambda: waits.append("main"))
    assert len(ShardReader([tmp_path / "made"], "unlabeled")) == 24
    time = (tmp_path / "made" / "manifest.json").stat().st_mtime_ns
    ensure_sets([tmp_path / "made"], recipe, main=True, wait=lambda: waits.append("again"))
    assert (tmp_path / "made" / "manifest.json").stat().st_mtime_ns == time
    assert waits == ["other", "main", "again"]


def test_without_a_recipe_a_missing_set_is_an_error(tmp_path, small_set):
    with pytest.raises(UserError, match="does not exist; pack one with"):
        ensure_sets([small_set, tmp_path / "none"], None, main=True, wait=lambda: None)
