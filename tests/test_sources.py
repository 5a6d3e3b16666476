"""Sources on tiny folders: splits, labels, junk, and the sentence about each thing that is missing."""

import itertools
import os
import pickle
import tracemalloc

import pytest
from record_checks import check_records

from recipes.errors import UserError
from shards import sources
from shards.catalogue import KEY
from shards.raw import walking
from shards.schema import SPLITS, Published
from shards.sources import cuhk03_np, dukemtmc, folder, market1501, occluded_duke

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


def market_like(root, train, query, gallery, suffix="jpg"):
    """Empty files in the layout of Market-1501, so many in each folder."""
    for name, count in zip(NAMES, (train, query, gallery), strict=True):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"0767_c2s5_{number:06d}_04.{suffix}").touch()
    return root


def test_cuhk03_np(tmp_path):
    market_like(tmp_path / "set", 1, 1, 1, "png")
    rows = list(cuhk03_np.records(cuhk03_np.Config(path=tmp_path / "set")))
    assert [(r.split, r.pid, r.camid) for r in rows] == [(s, 767, 1) for s in ("train", "query", "gallery")]
    (tmp_path / "set" / "query" / "0767_c3s5_000123_04.png").touch()
    with pytest.raises(UserError, match="names camera 3; CUHK03-NP has the cameras 1 to 2"):
        list(cuhk03_np.records(cuhk03_np.Config(path=tmp_path / "set")))


def test_the_variants_of_cuhk03_np_are_told_apart(tmp_path, monkeypatch):
    assert cuhk03_np.COUNTS == {"detected": (7_365, 5_332), "labeled": (7_368, 5_328)}
    monkeypatch.setattr(cuhk03_np, "COUNTS", {"detected": (3, 5), "labeled": (4, 2)})

    def title(path, variant=None):
        return cuhk03_np.published(cuhk03_np.Config(path=path, variant=variant)).title

    by_count = market_like(tmp_path / "one" / "labeled_they_say", 3, 1, 5)
    assert title(by_count) == title(by_count.parent) == "CUHK03-NP detected"
    with pytest.raises(UserError, match=r"exactly the images of CUHK03-NP detected, but source\.variant=labeled"):
        list(cuhk03_np.records(cuhk03_np.Config(path=by_count, variant="labeled")))
    both = tmp_path / "two"
    for name in ("detected", "labeled"):
        market_like(both / name, 1, 1, 1)
    assert title(both / "labeled") == title(both, "labeled") == "CUHK03-NP labeled"
    assert title(both / "detected") == title(both, "detected") == "CUHK03-NP detected"
    rows = cuhk03_np.records(cuhk03_np.Config(path=both, variant="labeled"))
    assert all("/labeled/" in row.origin for row in rows)
    with pytest.raises(UserError, match="more than one CUHK03-NP set"):
        title(both)
    unknown = market_like(tmp_path / "three", 1, 1, 1)
    assert "unknown" in title(unknown)
    assert cuhk03_np.published(cuhk03_np.Config(path=unknown)).splits == {"query": (1_400, 700)}
    assert title(unknown, "labeled") == "CUHK03-NP labeled"


def test_published_counts_of_market1501():
    plain, junk = (market1501.published(market1501.Config(path="x", keep_junk=keep)) for keep in (False, True))
    assert plain.splits == {"train": (12_936, 751), "query": (3_368, 750), "gallery": (15_913, 750)}
    assert junk.splits["gallery"] == (19_732, 750)


@pytest.mark.parametrize("module", [dukemtmc, occluded_duke])
def test_withdrawn_sets_ask_for_an_acknowledgement(market, module):
    for name in ("-1_c1s1_000401_03.jpg", "0000_c2s1_000151_01.jpg", "0001_c2s1_000301_00.jpg"):
        (market / "bounding_box_test" / name).unlink()
    (market / "bounding_box_test" / "0001_c8_f0046182.jpg").touch()
    with pytest.raises(UserError, match=r"withdrawn by its authors in 2019 for privacy.*acknowledge_withdrawn=true"):
        list(module.records(module.Config(path=market)))
    rows = list(module.records(module.Config(path=market, acknowledge_withdrawn=True)))
    assert [(r.split, r.pid, r.camid) for r in rows][-1] == ("gallery", 1, 7)
    published = module.published(module.Config(path=market))
    assert published.title.endswith("(withdrawn)")
    assert published.splits["gallery"] == (17_661, 1_110)


@pytest.fixture
def crops(tmp_path):
    files = ["b/x.y z.jpg", "b/1.png", "b/1.jpg", "a.jpg", "notes.txt", ".hidden", "Thumbs.db", ".cache/1.jpg"]
    for name in files:
        (tmp_path / "crops" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "crops" / name).write_bytes(name.encode())
    (tmp_path / "crops" / "b" / "loop").symlink_to(tmp_path / "crops")
    return tmp_path / "crops"


def keys(path, **options):
    """(key, content) in an order of its own: the walk has none."""
    return sorted((r.key, r.read().decode()) for r in folder.records(folder.Config(path=path, **options)))


def test_folder(crops):
    # files that differ in their ending only have one key; the packer refuses them and names keep_suffix
    taken = [("a", "a.jpg"), ("b/1", "b/1.jpg"), ("b/1", "b/1.png"), ("b/x_y_z", "b/x.y z.jpg")]
    assert keys(crops) == [*taken, ("notes", "notes.txt")]
    assert keys(crops, suffixes=["PNG", ".jpg"]) == taken
    assert [key for key, _ in keys(crops, keep_suffix=True)] == [
        "a_jpg",
        "b/1_jpg",
        "b/1_png",
        "b/x_y_z_jpg",
        "notes_txt",
    ]
    rows = list(folder.records(folder.Config(path=crops, split="gallery")))
    assert {(r.split, r.pid, r.camid) for r in rows} == {("gallery", None, None)}
    with pytest.raises(UserError, match=r"crops holds no images with the ending \.bmp"):
        list(folder.records(folder.Config(path=crops, suffixes=["bmp"])))


def test_folder_with_odd_names(tmp_path):
    names = ["__this__/1.jpg", "__x.jpg", "no suffix", "é\u3000\u00a0b.jpg", "a.b/c.d/e.f.jpg", "-.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"?")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "__x.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    rows = list(folder.records(folder.Config(path=tmp_path)))
    found = {r.key: r.read() for r in rows}
    assert set(found) == {"_this__/1", "_x", "no_suffix", "é__b", "a_b/c_d/e_f", "-", os.fsdecode(b"\xff"), "link"}
    assert found["link"] == b"__x.jpg"
    assert all(KEY.fullmatch(key) for key in found)


def test_folder_that_cannot_be_listed(crops, monkeypatch):
    listed = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(walking.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"crops/b cannot be listed completely \(Permission denied\)"):
        list(folder.records(folder.Config(path=crops)))


def test_a_walk_holds_nothing_per_file(tmp_path):
    for number in range(1200):
        (tmp_path / f"{number:08d}.jpg").touch()

    def peak(count):
        tracemalloc.start()
        assert sum(1 for _ in itertools.islice(folder.records(folder.Config(path=tmp_path)), count)) == count
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return memory

    peak(100)
    assert peak(1200) < peak(100) + 20_000


def test_folder_missing_or_empty(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        list(folder.records(folder.Config(path=tmp_path / "nowhere")))
    with pytest.raises(UserError, match="holds no images"):
        list(folder.records(folder.Config(path=tmp_path)))


def test_found_by_name():
    ours = {"folder", "archives", "luperson", "market1501", "cuhk03_np", "msmt17", "dukemtmc", "occluded_duke"}
    assert ours | {"synergyreid", "cuhk_pedes", "icfg_pedes", "rstpreid", "figures"} <= set(sources.names())
    for name in sources.names():
        assert sources.find(name).Config.model_config["extra"] == "forbid"
        assert callable(sources.find(name).records)
    with pytest.raises(UserError, match=r"no source 'market'; the nearest is 'market1501', known are .*folder"):
        sources.find("market")


# these look into the folder for which version it is, or what it was packed from
@pytest.mark.parametrize("name", [n for n in sources.names() if n not in ("msmt17", "cuhk03_np", "cropped")])
def test_published_counts_are_of_known_splits(name):
    module = sources.find(name)
    if hasattr(module, "published"):
        known = module.published(module.Config(path="x"))
        assert isinstance(known, Published)
        assert set(known.splits) <= set(SPLITS)


def test_records_are_small(tmp_path, monkeypatch, market):
    monkeypatch.chdir(tmp_path)
    assert len(check_records(list(market1501.records(market1501.Config(path="market"))))) == 5
    assert len(check_records(list(folder.records(folder.Config(path="market"))))) == 6
    market_like(tmp_path / "cuhk", 1, 1, 1)
    assert len(check_records(list(cuhk03_np.records(cuhk03_np.Config(path="cuhk"))))) == 3
    duke = dukemtmc.Config(path="cuhk", acknowledge_withdrawn=True)
    assert len(check_records(list(dukemtmc.records(duke)))) == 3
    assert len(check_records(list(occluded_duke.records(occluded_duke.Config(**duke.model_dump()))))) == 3
