"""The embedding table on disk and the neighbours search over it."""

import os

import numpy as np
import pytest

from recipes.errors import UserError
from shards import embeddings
from shards.embeddings import EmbeddingTable, Keys, write_table
from shards.neighbours import search


def a_table(rows: int = 5, seed: int = 0, **more) -> EmbeddingTable:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, 3)).astype(np.float32)
    keys = [f"kam/é{seed}-{i}" for i in range(rows)]
    return EmbeddingTable(features, np.arange(rows) - 1, np.arange(rows) % 2, keys, **more)


def test_what_is_saved_is_loaded(tmp_path):
    table = a_table(facts={"set": {"samples": 5}, "model": "abc"})
    table.save(tmp_path / "new" / "query")
    loaded = EmbeddingTable.load(tmp_path / "new" / "query")
    for name in ("features", "pids", "camids"):
        saved, read = getattr(table, name), getattr(loaded, name)
        assert saved.dtype == read.dtype
        np.testing.assert_array_equal(saved, read)
    assert loaded.keys == table.keys == [f"kam/é0-{i}" for i in range(5)]
    assert loaded.facts == {"set": {"samples": 5}, "model": "abc"}
    assert len(loaded) == 5
    assert sorted(p.name for p in (tmp_path / "new" / "query").iterdir()) == [
        "camids.npy", "features.npy", "keys.npy", "pids.npy", "table.json",
    ]  # fmt: skip
    mapped = EmbeddingTable.load(tmp_path / "new" / "query", mapped=True)
    assert isinstance(mapped.features, np.memmap)
    np.testing.assert_array_equal(mapped.features, table.features)


def test_half_precision_is_kept_on_disk_only(tmp_path):
    table = a_table()
    half = table.features.astype(np.float16)
    EmbeddingTable(half, table.pids, table.camids, table.keys).save(tmp_path)
    assert EmbeddingTable.load(tmp_path, mapped=True).features.dtype == np.float16
    loaded = EmbeddingTable.load(tmp_path).features
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, half.astype(np.float32))
    assert (tmp_path / "features.npy").stat().st_size == 128 + 5 * 3 * 2


def test_keys_are_strings_to_whoever_asks():
    keys = Keys(np.array([b"a/1", "é".encode(), b"c"]))
    assert (keys[1], list(keys), keys[1:], len(keys)) == ("é", ["a/1", "é", "c"], ["é", "c"], 3)
    assert keys[np.array([2, 0])] == ["c", "a/1"]
    assert keys == Keys(["a/1", "é", "c"])
    assert keys != ["a/1", "é"]
    assert "c" in keys
    odd = "\udcff"  # a byte of a file name that is no UTF-8
    assert list(Keys([odd])) == [odd]
    assert list(Keys([])) == []


def test_blocks_of_any_length_give_the_same_bytes(tmp_path):
    table = a_table(7)
    table.save(tmp_path / "whole")
    blocks = [table.features[:4].astype(np.float64), table.features[4:4], table.features[4:]]
    write_table(tmp_path / "blocks", iter(blocks), (7, 3), (table.pids, table.camids), table.keys, {})
    for name in ("features.npy", "keys.npy", "table.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "blocks" / name).read_bytes()


def test_an_empty_table_and_a_strided_one(tmp_path):
    empty = EmbeddingTable(np.empty((0, 3), np.float32), np.empty(0, np.int64), np.empty(0, np.int64), [])
    empty.save(tmp_path)
    assert EmbeddingTable.load(tmp_path).features.shape == (0, 3)
    base = a_table(6)
    EmbeddingTable(base.features[::2], base.pids[::2], base.camids[::2], base.keys[::2]).save(tmp_path)
    loaded = EmbeddingTable.load(tmp_path)
    np.testing.assert_array_equal(loaded.features, base.features[::2])
    assert loaded.keys == list(base.keys)[::2]


def test_saving_again_replaces(tmp_path):
    a_table(5).save(tmp_path)
    a_table(3, seed=1).save(tmp_path)
    assert EmbeddingTable.load(tmp_path).keys == a_table(3, seed=1).keys


@pytest.mark.parametrize("cut", range(5))
def test_a_save_that_was_cut_off_is_noticed(tmp_path, monkeypatch, cut):
    a_table(5).save(tmp_path)
    replace, calls = os.replace, []

    def failing(*given):
        calls.append(given)
        if len(calls) > cut:
            raise KeyboardInterrupt
        replace(*given)

    monkeypatch.setattr(embeddings.os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        a_table(5, seed=1).save(tmp_path)  # of the same size: only the order of writing tells
    with pytest.raises(UserError, match=r"no table\.json.*cut off"):
        EmbeddingTable.load(tmp_path)


def test_a_failing_write_leaves_no_temporary_file(tmp_path):
    def half(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        embeddings._write(tmp_path / "features.npy", half)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mapped", [False, True])
def test_faults_name_the_file(tmp_path, mapped):
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        EmbeddingTable.load(tmp_path / "nowhere", mapped)
    a_table().save(tmp_path)

    def damaged(name, content, match):
        path = tmp_path / name
        before = path.read_bytes()
        path.write_bytes(content(before))
        with pytest.raises(UserError, match=match):
            EmbeddingTable.load(tmp_path, mapped)
        path.write_bytes(before)

    damaged("features.npy", lambda b: b[:-4], r"features\.npy is not a readable")
    damaged("features.npy", lambda b: b"", r"features\.npy is not a readable")
    damaged("table.json", lambda b: b[:-3], r"table\.json is not readable JSON")
    damaged("table.json", lambda b: b"[1]", r"table\.json must hold an object")
    damaged("table.json", lambda b: b.replace(b'"format_version": 1', b'"format_version": 9'), r"has format 9")
    damaged(
        "table.json", lambda b: b.replace(b'"rows": 5', b'"rows": 4'), r"shape \(5, 3\), but table\.json says \(4, 3\)"
    )
    np.save(tmp_path / "pids.npy", np.arange(5, dtype=np.int32))
    with pytest.raises(UserError, match=r"pids\.npy holds int32, expected int64"):
        EmbeddingTable.load(tmp_path, mapped)
    (tmp_path / "pids.npy").unlink()
    with pytest.raises(UserError, match=r"lacks pids\.npy"):
        EmbeddingTable.load(tmp_path, mapped)


def test_a_table_with_objects_in_it_is_not_unpickled(tmp_path):
    a_table().save(tmp_path)
    np.save(tmp_path / "keys.npy", np.array([{"a": 1}] * 5, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"keys\.npy is not a readable"):
        EmbeddingTable.load(tmp_path)


def test_a_file_in_the_way_is_a_user_error(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out cannot be written"):
        a_table().save(tmp_path / "out")


def test_parts_that_do_not_fit_are_our_fault():
    table = a_table()
    with pytest.raises(AssertionError):
        EmbeddingTable(table.features, table.pids[:4], table.camids, table.keys)
    with pytest.raises(AssertionError):
        EmbeddingTable(table.features.astype(np.float64), table.pids, table.camids, table.keys)


def test_neighbours_by_hand():
    gallery = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], np.float32)
    scores, rows = search(gallery, np.array([[1, 0], [0, 2]], np.float32), 3)
    np.testing.assert_array_equal(rows[:, :2], [[0, 3], [1, 3]])
    assert rows[0, 2] == 1
    assert rows[1, 2] in (0, 2)  # equal scores: either
    np.testing.assert_allclose(scores, [[1, 0.6, 0], [2, 1.6, 0]], atol=1e-6)
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64


def test_neighbours_equal_sorting():
    rng = np.random.default_rng(0)
    gallery, queries = (rng.normal(size=(rows, 16)).astype(np.float32) for rows in (500, 20))
    scores, rows = search(gallery, queries, 10)
    exact = queries.astype(np.float64) @ gallery.T.astype(np.float64)
    np.testing.assert_array_equal(rows, np.argsort(-exact, axis=1)[:, :10])
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, axis=1), rtol=1e-4, atol=1e-5)


def test_neighbours_refuse_what_they_cannot_answer():
    gallery = np.eye(3, dtype=np.float32)
    with pytest.raises(UserError, match=r"k = 4 .* 3 images"):
        search(gallery, gallery, 4)
    with pytest.raises(UserError, match="k = 0"):
        search(gallery, gallery, 0)
    with pytest.raises(UserError, match="3 dimensions and query features 2"):
        search(gallery, gallery[:, :2], 1)
    broken = gallery.copy()
    broken[1, 1] = np.nan
    with pytest.raises(UserError, match="query features hold a value that is not finite in row 1"):
        search(gallery, broken, 1)
