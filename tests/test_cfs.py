"""The catastrophic forgetting score on planted tables, and what is kept by it: lists, controls, sets of their own."""

import functools
import json
import math

import numpy as np
import pytest
import small
from conftest import encoded
from PIL import Image

from recipes.errors import UserError
from shards import cfs, keep_list
from shards.embeddings import EmbeddingTable
from shards.images import ImagesConfig
from shards.manifests import read_manifest
from shards.name_lists import read_names
from shards.packing import PackingConfig
from shards.reader import ShardReader
from shards.schema import Record
from shards.writer import pack

COUNT = 40


def table(features, keys=None, facts=None) -> EmbeddingTable:
    features = np.asarray(features)
    if features.dtype != np.float16:
        features = features.astype(np.float32)
    labels = np.full(len(features), -2, np.int64)
    return EmbeddingTable(features, labels, labels, keys or [f"k{i}" for i in range(len(features))], facts or {})


def planted(cosines, dim=16, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Two tables of float32 whose rows have these cosines: t = c s + sqrt(1 - c^2) n with n orthogonal to s."""
    rng = np.random.default_rng(seed)
    c = np.asarray(cosines)[:, None]
    s, n = rng.normal(size=(2, len(c), dim))
    s /= np.linalg.norm(s, axis=1, keepdims=True)
    n -= (n * s).sum(1, keepdims=True) * s
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    t = c * s + np.sqrt(1 - c**2) * n
    lengths = rng.uniform(0.1, 9, (2, len(c), 1))  # they must not matter
    return (s * lengths[0]).astype(np.float32), (t * lengths[1]).astype(np.float32)


def test_by_hand():
    source = table([[1, 0], [1, 0], [3, 4], [1, 1], [2, 0]])
    target = table([[5, 0], [0, 2], [4, 3], [-1, -1], [1, 1]])
    np.testing.assert_allclose(cfs.scores(source, target), [1, 0, 24 / 25, -1, math.sqrt(0.5)], atol=1e-15)
    assert cfs.ranking(cfs.scores(source, target)).tolist() == [0, 2, 4, 1, 3]


@pytest.mark.parametrize("block", [cfs.BLOCK, 16, 50])
def test_planted_cosines_are_ranked_exactly(monkeypatch, block):
    monkeypatch.setattr(cfs, "BLOCK", block)  # 1 and 3 rows at a time
    cosines = np.random.default_rng(1).permutation(np.linspace(-0.999, 0.999, 997))
    found = cfs.scores(*map(table, planted(cosines)))
    np.testing.assert_allclose(found, cosines, atol=1e-6)
    np.testing.assert_array_equal(cfs.ranking(found), np.argsort(-cosines))


def test_ties_go_by_the_row():
    s, t = planted([0.5, 0.9, 0.1, 0.9, 0.5])
    for array in (s, t):
        array[3], array[4] = array[1], array[0]
    assert cfs.ranking(cfs.scores(table(s), table(t))).tolist() == [1, 3, 0, 4, 2]
    assert cfs.ranking(np.zeros(1000)).tolist() == list(range(1000))


def test_mapped_half_precision_is_scored_the_same(tmp_path):
    halves = [part.astype(np.float16) for part in planted(np.linspace(-0.9, 0.9, 50))]
    exact = [part.astype(np.float64) for part in halves]
    expected = (exact[0] * exact[1]).sum(1) / np.linalg.norm(exact[0], axis=1) / np.linalg.norm(exact[1], axis=1)
    for part, name in zip(halves, "st", strict=True):
        table(part).save(tmp_path / name)
    mapped = [EmbeddingTable.load(tmp_path / name, mapped=True) for name in "st"]
    np.testing.assert_allclose(cfs.scores(*mapped), expected, atol=1e-14)


def test_tables_must_belong_together():
    good, ones = table(np.eye(3)), {"set": {"samples": 3}}
    with pytest.raises(UserError, match="3 and 2 rows"):
        cfs.scores(good, table(np.eye(3)[:2]))
    with pytest.raises(UserError, match="row 1 is 'k1' in one table and 'x' in the other"):
        cfs.scores(good, table(np.eye(3), keys=["k0", "x", "k2"]))
    with pytest.raises(UserError, match="different sets"):
        cfs.scores(table(np.eye(3), facts=ones), table(np.eye(3), facts={"set": {"samples": 4}}))
    # the facts decide where both tell them
    assert cfs.scores(table(np.eye(3), facts=ones), table(np.eye(3), facts=ones)).tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="3 and 4 numbers"):
        cfs.scores(good, table(np.eye(3, 4)))
    for bad, match in ((0.0, "target feature of row 2 .'k2'. is zero"), (np.nan, "row 2 .'k2'. is not finite")):
        broken = np.eye(3)
        broken[2] = bad
        with pytest.raises(UserError, match=match):
            cfs.scores(good, table(broken))


def test_the_published_cuts():
    assert cfs.wanted(4_180_243, 0.5, None) == 2_090_122
    assert cfs.wanted(4_180_243, 0.6, None) == 2_508_146
    assert cfs.wanted(10, None, 10) == cfs.wanted(10, 1.0, None) == 10
    for fraction, number in ((0.0, None), (1.1, None), (None, 0), (None, 11), (0.04, None), (None, None), (0.5, 5)):
        with pytest.raises(UserError):
            cfs.wanted(10, fraction, number)


def test_the_control_is_drawn_once_and_evenly():
    assert cfs.drawn(100, 30, 1).tolist() == cfs.drawn(100, 30, 1).tolist() != cfs.drawn(100, 30, 2).tolist()
    hits = np.zeros(20)
    for seed in range(2000):
        rows = cfs.drawn(20, 5, seed)
        assert len(set(rows.tolist())) == 5
        hits[rows] += 1
    # binomial with p = 1/4: mean 500, deviation 19.4; five deviations
    assert (abs(hits - 500) < 97).all()


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """A packed set of 40 images in shards of 12."""
    rows = [
        Record(f"v/{i:02}", "unlabeled", functools.partial(encoded, i), captions=("x",) * (i == 3)) for i in range(40)
    ]
    folder = tmp_path_factory.mktemp("sets") / "crops"
    pack(rows, folder, PackingConfig(shard_samples=12, seed=5), ImagesConfig(), [{"name": "made", "title": "Made 1"}])
    return folder


@pytest.fixture(scope="module")
def scored(crops, tmp_path_factory):
    """Planted tables of that set, scored by the script; cosine of the row."""
    base = tmp_path_factory.mktemp("scored")
    reader = ShardReader([crops], "unlabeled")
    cosines = np.random.default_rng(0).permutation(np.linspace(0, 0.975, COUNT))
    for part, name in zip(planted(cosines), ("source", "target"), strict=True):
        facts = {"set": reader.identity, "model": name}
        EmbeddingTable(part, reader.pids, reader.camids, reader.keys, facts).save(base / name)
    arguments = [str(base / "source"), str(base / "target"), "--out", str(base / "scores"), "--shards", str(crops)]
    assert small.run([str(small.ROOT / "shards/cfs_score.py"), *arguments]) == 0
    return base, cosines


def keep(*arguments) -> int:
    return small.run([str(small.ROOT / "shards/cfs_keep.py"), *map(str, arguments)])


def test_scores_tell_what_they_were_made_from(scored):
    base, cosines = scored
    scores = cfs.Scores.load(base / "scores")
    np.testing.assert_allclose(scores.values, cosines, atol=1e-6)
    assert scores.facts["source"] == {"model": "source"}
    assert scores.facts["target"] == {"model": "target"}
    assert scores.facts["quantiles"]["0.5"] == pytest.approx(0.4875, abs=1e-6)
    for name in ("histogram.png", "sheet.png"):
        assert Image.open(base / "scores" / name).size[0] > 300
    (base / "scores" / "scores.json").rename(base / "away")
    with pytest.raises(UserError, match=r"no scores\.json"):
        cfs.Scores.load(base / "scores")
    (base / "away").rename(base / "scores" / "scores.json")


def test_the_best_are_kept_and_honoured(scored, crops):
    base, cosines = scored
    best = np.sort(np.argsort(-cosines)[:10])
    assert keep(base / "scores", "--fraction", "0.25", "--out", base / "keep.npz") == 0
    reader = ShardReader([crops], "unlabeled", keep=base / "keep.npz")
    whole = ShardReader([crops], "unlabeled")
    assert [reader[i] for i in range(10)] == [whole[int(row)] for row in best]
    assert len(reader) == reader.shard_sizes.sum() == 10
    for suffix in ("pkl", "txt"):
        assert keep(base / "scores", "--number", "10", "--out", base / f"keep.{suffix}") == 0
        names = read_names(base / f"keep.{suffix}")
        assert names == [f"{whole[int(row)].key}.jpg" for row in np.argsort(-cosines)[:10]]
        assert keep_list.load(base / f"keep.{suffix}", whole).tolist() == best.tolist()


def test_the_control_has_the_size_and_its_seed(scored, crops):
    base, _ = scored
    whole = ShardReader([crops], "unlabeled")
    rows = []
    for seed in (0, 0, 1):
        assert keep(base / "scores", "--number", "10", "--random", "--seed", seed, "--out", base / "random.npz") == 0
        rows.append(keep_list.load(base / "random.npz", whole).tolist())
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] == np.sort(cfs.drawn(COUNT, 10, 0)).tolist()
    # without scores the same
    assert keep("--shards", crops, "--number", "10", "--random", "--seed", 1, "--out", base / "random.npz") == 0
    assert rows[2] == keep_list.load(base / "random.npz", whole).tolist()


def test_a_published_list_becomes_rows(crops, tmp_path):
    reader = ShardReader([crops], "unlabeled")
    names = [f"{reader[row].key.removeprefix('v/')}.jpg" for row in (7, 3, 9, 7, 1)]
    keep_list.write_names(tmp_path / "CFS_list.pkl", ["lost.jpg", *names])
    given = ("--from", tmp_path / "CFS_list.pkl", "--shards", crops)
    assert keep(*given, "--number", "2", "--out", tmp_path / "keep.npz") == 0
    assert keep_list.load(tmp_path / "keep.npz", reader).tolist() == [3, 7]
    assert keep(*given, "--fraction", "0.75", "--out", tmp_path / "three.npz") == 0
    assert keep_list.load(tmp_path / "three.npz", reader).tolist() == [3, 7, 9]
    assert keep(*given, "--number", "5", "--out", tmp_path / "five.npz") == 2, "four names are there"


def test_new_shards_name_their_parent(scored, crops, tmp_path):
    base, _ = scored
    given = (base / "scores", "--fraction", "0.5", "--shards", crops, "--pack", tmp_path / "half")
    assert keep(*given, "--out", tmp_path / "half.npz") == 0
    kept = ShardReader([crops], "unlabeled", keep=tmp_path / "half.npz", captions=True)
    packed = ShardReader([tmp_path / "half"], "unlabeled", captions=True)
    ours, theirs = ({s.key: s for s in map(reader.__getitem__, range(len(reader)))} for reader in (packed, kept))
    assert ours == theirs
    assert len(ours) == 20
    manifest = read_manifest(tmp_path / "half")
    (source,) = manifest.sources
    parent = read_manifest(crops)
    assert source["parent"] == {"sets": [{"plan": parent.packing["plan"], "splits": ["unlabeled"]}], "samples": COUNT}
    assert source["scores"] == json.loads((base / "scores" / "scores.json").read_text())["facts"]["digest"]
    assert (source["by"], source["kept"], source["of"]) == ("cfs", 20, COUNT)
    assert source["title"] == "Made 1, 20 of 40 kept (cfs)"
    assert source["parent_sources"] == parent.sources
    assert (manifest.packing["shard_samples"], manifest.packing["seed"]) == (12, 5)
    assert keep(*given) == 0, "the same command again finds it done"
    assert keep(*given[:2], "0.4", *given[3:]) == 2, "another selection does not fit into the folder"


def test_damage_in_the_parent_is_not_copied(scored, crops, tmp_path, capsys):
    base, _ = scored
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in crops.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tar = next(broken.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    assert keep(base / "scores", "--fraction", "1", "--shards", broken, "--pack", tmp_path / "all") == 2
    assert "is damaged at byte" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


def test_wrong_use_is_told(scored, crops, tmp_path, capsys):
    base, _ = scored
    other = tmp_path / "other"
    pack([Record("a", "unlabeled", functools.partial(encoded, 1))], other, PackingConfig(), ImagesConfig(), [])
    out = ("--out", tmp_path / "keep.npz")
    for arguments, match in [
        ((base / "scores", *out), "either --fraction or --number"),
        (("--fraction", "0.5", *out), "a folder of scores, a list by --from, or --random"),
        ((base / "scores", "--from", "x.pkl", "--number", "5", *out), "not both"),
        (("--random", "--fraction", "0.5", *out), "need the set"),
        ((base / "scores", "--fraction", "0.5"), "say what to write"),
        ((base / "scores", "--fraction", "0.5", "--out", tmp_path / "keep.csv"), "ending must be"),
        ((base / "scores", "--fraction", "0.5", "--pack", tmp_path / "x"), "need the set"),
        ((base / "scores", "--fraction", "0.5", "--shards", other, *out), "but the scores are of"),
        ((base / "gone", "--fraction", "0.5", *out), "gone does not exist"),
        ((base / "source", "--fraction", "0.5", *out), r"has no scores.json"),
    ]:
        assert keep(*arguments) == 2
        assert match in capsys.readouterr().err
    assert not (tmp_path / "keep.npz").exists()
