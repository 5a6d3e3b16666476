"""Sources on tiny folders: splits, labels, junk, and the sentence about each thing that is missing."""

import pickle

import pytest

from recipes.errors import UserError
from shards import sources
from shards.sources import cuhk03_np, folder, market1501

NAMES = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0007_c6s3_077419_03.jpg"],
    "query": ["0001_c1s1_001051_00.jpg"],
    "bounding_box_test": ["-1_c1s1_000401_03.jpg", "0000_c2s1_000151_01.jpg", "0001_c2s1_000301_00.jpg", "Thumbs.db"],
}


@pytest.fixture
def market(tmp_path):
    for name, files in NAMES.items():
        (tmp_path / "market" / name).mkdir(parents=True)
        for file in files:
            (tmp_path / "market" / name / file).write_bytes(file.encode())
    return tmp_path / "market"


def test_market1501(market):
    rows = list(market1501.records(market1501.Config(path=market)))
    assert [(r.split, r.pid, r.camid) for r in rows] == [
        ("train", 2, 0),
        ("train", 7, 5),
        ("query", 1, 0),
        ("gallery", 0, 1),
        ("gallery", 1, 1),
    ]
    assert rows[0].key == "bounding_box_train/0002_c1s1_000451_03"
    assert pickle.loads(pickle.dumps(rows[0])).read() == b"0002_c1s1_000451_03.jpg"
    kept = list(market1501.records(market1501.Config(path=market, keep_junk=True)))
    assert [r.pid for r in kept if r.split == "gallery"] == [-1, 0, 1]


def test_the_folder_above_will_do_unless_it_holds_two(market):
    assert len(list(market1501.records(market1501.Config(path=market.parent)))) == 5
    for name in NAMES:
        (market.parent / "other" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"more than one Market-1501 set; give one of .*market, .*other"):
        list(market1501.records(market1501.Config(path=market.parent)))


def test_market_style_faults(market, tmp_path):
    def read():
        return list(market1501.records(market1501.Config(path=market)))

    with pytest.raises(UserError, match="nowhere does not exist"):
        list(market1501.records(market1501.Config(path=tmp_path / "nowhere")))
    stray = market / "query" / "person.jpg"
    stray.touch()
    with pytest.raises(UserError, match=r"person\.jpg is not named like an image of Market-1501"):
        read()
    stray.unlink()
    stray = market / "query" / "0001_c7s1_001051_00.jpg"
    stray.touch()
    with pytest.raises(UserError, match="names camera 7; Market-1501 has the cameras 1 to 6"):
        read()
    stray.unlink()
    (market / "query" / NAMES["query"][0]).unlink()
    with pytest.raises(UserError, match=r"query holds no images"):
        read()
    (market / "query").rmdir()
    with pytest.raises(UserError, match=r"market lacks query; expected"):
        read()


def test_cuhk03_np(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0767_c2s5_000123_04.png").touch()
    rows = list(cuhk03_np.records(cuhk03_np.Config(path=tmp_path)))
    assert [(r.split, r.pid, r.camid) for r in rows] == [(s, 767, 1) for s in ("train", "query", "gallery")]
    (tmp_path / "query" / "0767_c3s5_000123_04.png").touch()
    with pytest.raises(UserError, match="names camera 3; CUHK03-NP has the cameras 1 to 2"):
        list(cuhk03_np.records(cuhk03_np.Config(path=tmp_path)))


def test_folder(tmp_path):
    crops = tmp_path / "crops"
    files = ["b/x.y z.jpg", "b/1.png", "b/1.jpg", "a.jpg", "notes.txt", ".hidden", "Thumbs.db", ".cache/1.jpg"]
    for name in files:
        (crops / name).parent.mkdir(parents=True, exist_ok=True)
        (crops / name).write_bytes(name.encode())
    (crops / "b" / "loop").symlink_to(crops)
    rows = list(folder.records(folder.Config(path=crops)))
    assert [r.read().decode() for r in rows] == ["a.jpg", "notes.txt", "b/1.jpg", "b/1.png", "b/x.y z.jpg"]
    assert [r.key for r in rows] == ["a", "notes", "b/1", "b/1_png", "b/x_y_z"]
    assert {(r.split, r.pid, r.camid) for r in rows} == {("unlabeled", None, None)}
    some = folder.records(folder.Config(path=crops, suffixes=["PNG", ".jpg"], split="gallery"))
    assert [(r.key, r.split) for r in some] == [(k, "gallery") for k in ("a", "b/1", "b/1_png", "b/x_y_z")]
    with pytest.raises(UserError, match=r"crops holds no images with the ending \.bmp"):
        list(folder.records(folder.Config(path=crops, suffixes=["bmp"])))


def test_folder_missing_or_empty(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        list(folder.records(folder.Config(path=tmp_path / "nowhere")))
    with pytest.raises(UserError, match="holds no images"):
        list(folder.records(folder.Config(path=tmp_path)))


def test_found_by_name():
    assert {"folder", "market1501", "cuhk03_np"} <= set(sources.names())
    for name in sources.names():
        assert sources.find(name).Config.model_config["extra"] == "forbid"
        assert callable(sources.find(name).records)
    with pytest.raises(UserError, match=r"no source 'market'; the nearest is 'market1501', known are .*folder"):
        sources.find("market")
