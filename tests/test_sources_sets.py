"""MSMT17, SynergyReID and the sets with captions, each in a tiny copy of its published layout."""

import json
from pathlib import Path

import pytest
from record_checks import check_records

from recipes.errors import UserError
from shards.sources import cuhk_pedes, icfg_pedes, msmt17, rstpreid, synergyreid

TRAIN = ["0000/0000_000_01_0303morning_0015_0.jpg 0", "0001/0001_000_15_0303noon_0015_0.jpg 1"]
LISTS = {
    "list_train.txt": TRAIN,
    "list_val.txt": ["0000/0000_001_05_0303morning_0016_0.jpg 0"],
    "list_query.txt": ["0000/0000_002_03_0113afternoon_1_0.jpg 0"],
    "list_gallery.txt": ["0000/0000_003_04_0113noon_2_0.jpg 0", "3059/3059_003_04_0113noon_2_0.jpg 3059"],
}


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(path.name.encode())


def make_msmt17(root, train="train", test="test"):
    for name, lines in LISTS.items():
        folder = train if name in ("list_train.txt", "list_val.txt") else test
        for line in lines:
            touch(root / folder / line.split()[0])
        (root / name).write_text("\n".join(lines) + "\n")
    return root


def rows(module, path, **keys):
    return list(module.records(module.Config(path=path, **keys)))


@pytest.mark.parametrize(
    ("version", "folders", "inside"),
    [
        ("V1", ("train", "test"), ""),
        ("V1", ("train", "test"), "MSMT17_V1"),
        ("V1", ("train", "test"), "MSMT17"),
        ("V2", ("mask_train_v2", "mask_test_v2"), ""),
        ("V2", ("mask_train_v2", "mask_test_v2"), "MSMT17_V2"),
    ],
)
def test_msmt17(tmp_path, version, folders, inside):
    make_msmt17(tmp_path / inside, *folders)
    found = rows(msmt17, tmp_path)
    assert [(r.split, r.pid, r.camid) for r in found] == [
        ("train", 1, 0),
        ("train", 2, 14),
        ("train", 1, 4),
        ("query", 1042, 2),
        ("gallery", 1042, 3),
        ("gallery", 4101, 3),
    ]
    assert found[0].key == f"{folders[0]}/0000/0000_000_01_0303morning_0015_0"
    assert found[0].read() == b"0000_000_01_0303morning_0015_0.jpg"
    assert found[0].origin == str(tmp_path / inside / folders[0] / TRAIN[0].split()[0])
    assert [r.split for r in rows(msmt17, tmp_path, val="leave")].count("train") == 2
    published = msmt17.published(msmt17.Config(path=tmp_path))
    assert published.title == f"MSMT17 {version}"
    assert published.splits == {"train": (32_621, 1_041), "query": (11_659, 3_060), "gallery": (82_161, 3_060)}
    left = msmt17.published(msmt17.Config(path=tmp_path, val="leave"))
    assert (left.title, left.splits["train"][0]) == (f"MSMT17 {version} without val", 30_248)


def test_msmt17_which_version(tmp_path):
    make_msmt17(tmp_path / "MSMT17_V1")
    make_msmt17(tmp_path / "MSMT17_V2", "mask_train_v2", "mask_test_v2")
    with pytest.raises(UserError, match=r"holds MSMT17 V1 in .*MSMT17_V1 and V2 in .*MSMT17_V2; results differ"):
        rows(msmt17, tmp_path)
    (tmp_path / "mirror" / "bounding_box_train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds neither train, test .* does not tell V1 from V2"):
        rows(msmt17, tmp_path / "mirror")
    with pytest.raises(UserError, match="nowhere does not exist"):
        rows(msmt17, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "line", "sentence"),
    [
        ("list_val.txt", "0000/0000_001_16_x.jpg 0", "does not name a camera from 1 to 15"),
        ("list_val.txt", "0000/0000_001.jpg 0", "does not name a camera"),
        ("list_val.txt", "0000/0000_001_05_x.jpg 1041", "has identity 1041; MSMT17 has 0 to 1040 there"),
        ("list_query.txt", "0000/0000_001_05_x.jpg 3060", "MSMT17 has 0 to 3059 there"),
        ("list_query.txt", "0000/0000_001_05_x.jpg", "line 1 of .*list_query.txt is not of the form PATH IDENTITY"),
        ("list_query.txt", "../../0000_001_05_x.jpg 0", "leads out of the folder"),
        ("list_query.txt", "/0000_001_05_x.jpg 0", "leads out of the folder"),
        (
            "list_query.txt",
            "0000/0000_001_05_x.jpg 0",
            r"1 of the 6 images that MSMT17 V1 lists are missing, the first",
        ),
    ],
)
def test_msmt17_faults(tmp_path, name, line, sentence):
    make_msmt17(tmp_path)
    (tmp_path / name).write_text(line)
    with pytest.raises(UserError, match=sentence):
        rows(msmt17, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"lacks {name}"):
        rows(msmt17, tmp_path)


SYNERGY = {
    "reid_training": ["0000_0001_0003.jpeg", "0435_0001_0004.jpeg"],
    "reid_test/query": ["0436_0002_0000.jpeg"],
    "reid_test/gallery": ["0436_0002_0001.jpeg", "0436_0002_0019.jpeg"],
    "reid_challenge/query": ["17.jpeg"],
    "reid_challenge/gallery": ["18.jpeg"],
}


@pytest.mark.parametrize("inside", ["", "data_reid", "raw/data_reid"])
def test_synergyreid(tmp_path, inside):
    for folder, names in SYNERGY.items():
        for name in names:
            touch(tmp_path / inside / folder / name)
    found = rows(synergyreid, tmp_path)
    labels = [("train", 1, 0), ("train", 436, 0), ("query", 437, 0), ("gallery", 437, 1), ("gallery", 437, 1)]
    assert [(r.split, r.pid, r.camid) for r in found] == labels
    assert found[2].key == "reid_test/query/0436_0002_0000"
    more = rows(synergyreid, tmp_path, challenge="unlabeled")[5:]
    assert [(r.split, r.pid, r.camid) for r in more] == [("unlabeled", None, 0), ("unlabeled", None, 1)]
    assert synergyreid.published(synergyreid.Config(path=tmp_path)).splits["train"] == (8_569, 436)
    touch(tmp_path / inside / "reid_training" / "person.jpeg")
    with pytest.raises(UserError, match="is not named like an image of SynergyReID"):
        rows(synergyreid, tmp_path)
    with pytest.raises(UserError, match="is no folder of SynergyReID"):
        rows(synergyreid, tmp_path / "nowhere")


def entry(split, file, number, *captions, key="file_path"):
    return {"split": split, key: file, "id": number, "captions": list(captions), "processed_tokens": [["a"]]}


RAW = [
    entry("train", "cam_a/001_45.bmp", 1, "A man in red. ", "Someone red"),
    entry("train", "Market/0002_c1.jpg", 2, "A woman", ""),
    entry("val", "test_query/p10.jpg", 12000, "A boy"),
    entry("test", "CUHK01/0363004.png", 13003, "A girl", "She runs", "Blue shoes"),
]


def make_raw(root, entries=RAW, name="reid_raw.json", images="imgs", key="file_path"):
    for item in entries:
        touch(root / images / item[key])
    (root / name).write_text(json.dumps(entries))
    return root


def labels(found):
    return [(r.split, r.pid, r.camid, r.captions) for r in found]


def test_cuhk_pedes(tmp_path):
    make_raw(tmp_path)
    train = [("train", 1, None, ("A man in red.", "Someone red")), ("train", 2, None, ("A woman",))]
    test = ("gallery", 13003, None, ("A girl", "She runs", "Blue shoes"))
    found = rows(cuhk_pedes, tmp_path)
    assert labels(found) == [*train, test]
    assert [r.key for r in found] == ["cam_a/001_45", "Market/0002_c1", "CUHK01/0363004"]
    assert found[1].read() == b"0002_c1.jpg"
    val = ("A boy",)
    assert labels(rows(cuhk_pedes, tmp_path, val="train")) == [*train, ("train", 12000, None, val), test]
    assert labels(rows(cuhk_pedes, tmp_path, gallery="val")) == [*train, ("gallery", 12000, None, val)]
    with pytest.raises(UserError, match="contradict each other"):
        rows(cuhk_pedes, tmp_path, val="train", gallery="val")


def test_cuhk_pedes_with_one_sentence_an_entry(tmp_path):
    # the form of TextReID; identities count from 0 in each part, for other people
    (tmp_path / "annotations").mkdir()
    for part, images in {"train": ["a", "a", "b"], "val": ["c"], "test": ["d", "d"]}.items():
        entries = [
            {
                "file_path": f"cam_a/{name}.jpg",
                "id": images.index(name),
                "image_id": 7,
                "sentence": f"{name} {n}",
                "onehot": [],
            }
            for n, name in enumerate(images)
        ]
        (tmp_path / "annotations" / f"{part}.json").write_text(json.dumps({"annotations": entries, "categories": []}))
        for name in images:
            touch(tmp_path / "imgs" / "cam_a" / f"{name}.jpg")
    assert labels(rows(cuhk_pedes, tmp_path)) == [
        ("train", 1, None, ("a 0", "a 1")),
        ("train", 3, None, ("b 2",)),
        ("gallery", 5, None, ("d 0", "d 1")),
    ]
    assert [r.pid for r in rows(cuhk_pedes, tmp_path, gallery="val") if r.split == "gallery"] == [4]


def test_icfg_pedes(tmp_path):
    entries = [
        entry("train", "train/0000/0000_002_01_0303morning_0009_0.jpg", 0, "One"),
        entry("train", "train/0001/0001_002_01_0303morning_0009_0.jpg", 1, "Two"),
        entry("train", "train/0001/0001_002_01_0303morning_0009_0.jpg", 1, "Two again"),  # listed twice
        entry("test", "test/0000/0000_002_01_0303morning_0009_0.jpg", 0, "Another person"),
    ]
    expected = [("train", 1), ("train", 2), ("gallery", 3)]
    for number, name in enumerate(("ICFG-PEDES.json", "ICFG_PEDES.json")):
        make_raw(tmp_path / name, entries, name, images="imgs" if number else "")
        found = rows(icfg_pedes, tmp_path / name)
        assert [(r.split, r.pid) for r in found] == expected
        assert found[1].captions == ("Two", "Two again")
    assert icfg_pedes.published(icfg_pedes.Config(path="x")).splits == {
        "train": (34_674, 3_102),
        "gallery": (19_848, 1_000),
    }


def test_rstpreid(tmp_path):
    entries = [
        entry("train", "0000_c14_0031.jpg", 0, "One", "Two", key="img_path"),
        entry("val", "3701_c1_0031.jpg", 3701, "Three", key="img_path"),
        entry("test", "4100_c1_0031.jpg", 4100, "Four", key="img_path"),
    ]
    make_raw(tmp_path, entries, "data_captions.json", key="img_path")
    assert labels(rows(rstpreid, tmp_path, val="train")) == [
        ("train", 1, None, ("One", "Two")),
        ("train", 3702, None, ("Three",)),
        ("gallery", 4101, None, ("Four",)),
    ]


def test_published_counts_follow_the_parts():
    def splits(module, **keys):
        return module.published(module.Config(path="x", **keys)).splits

    assert splits(cuhk_pedes) == {"train": (34_054, 11_003), "gallery": (3_074, 1_000)}
    assert splits(cuhk_pedes, val="train") == {"train": (37_132, 12_003), "gallery": (3_074, 1_000)}
    assert splits(rstpreid, gallery="val") == {"train": (18_505, 3_701), "gallery": (1_000, 200)}
    assert 34_054 + 3_078 + 3_074 == 40_206  # what the paper says in all
    assert 34_674 + 19_848 == 54_522
    assert 18_505 + 2 * 1_000 == 20_505


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("{}", "is no list of images"),
        ("[3]", "entry 0 of .* is int"),
        (
            '[{"id": 1, "file_path": "a.jpg", "captions": []}]',
            "has no 'split'.*take the one with 'split', reid_raw.json",
        ),
        ('[{"split": "train", "file_path": "a.jpg", "captions": ["x"]}]', "lacks file_path, id, captions"),
        ('[{"split": "dev", "id": 1, "file_path": "a.jpg", "captions": ["x"]}]', "a split out of train, val, test"),
        ('[{"split": "train", "id": 1, "file_path": "../a.jpg", "captions": ["x"]}]', "leads out of the folder"),
    ],
)
def test_lists_of_captions_that_are_wrong(tmp_path, text, sentence):
    (tmp_path / "reid_raw.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        rows(cuhk_pedes, tmp_path)


def test_images_that_are_listed_but_not_there(tmp_path):
    make_raw(tmp_path)
    (tmp_path / "imgs" / "Market" / "0002_c1.jpg").unlink()
    (tmp_path / "imgs" / "test_query" / "p10.jpg").unlink()  # not asked for, so not missed
    with pytest.raises(UserError, match=r"1 of the 3 images that CUHK-PEDES lists are missing, the first is .*0002_c1"):
        rows(cuhk_pedes, tmp_path)
    assert [r.pid for r in rows(cuhk_pedes, tmp_path, missing="skip")] == [1, 13003]
    with pytest.raises(UserError, match=r"has no data_captions\.json, the list of images"):
        rows(rstpreid, tmp_path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        rows(icfg_pedes, tmp_path / "nowhere")
    twice = [*RAW, entry("train", "cam_a/001_45.bmp", 3, "x")]
    with pytest.raises(UserError, match=r"gives cam_a/001_45\.bmp the identities 1 and 3"):
        rows(cuhk_pedes, make_raw(tmp_path / "twice", twice))


def test_records_are_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_msmt17(Path("sets/MSMT17_V2"), "mask_train_v2", "mask_test_v2")
    make_raw(Path("sets/CUHK-PEDES"))
    for folder, names in SYNERGY.items():
        for name in names:
            touch(Path("sets/synergy") / folder / name)
    assert len(check_records(rows(msmt17, "sets/MSMT17_V2"))) == 6
    assert len(check_records(rows(cuhk_pedes, "sets/CUHK-PEDES"))) == 3
    assert len(check_records(rows(synergyreid, "sets/synergy", challenge="unlabeled"))) == 7
