"""LUPerson in every shape that goes around: LMDB with both key lists and without, folders, archives."""

import io
import itertools
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import lmdb
import pytest
from record_checks import check_records

from recipes.errors import UserError
from shards.raw import lmdb_files, walking
from shards.schema import BadSample, Published
from shards.sources import luperson

NUMBERS = [(country, *rest) for country in (0, 34) for rest in ((0, 0, 0), (0, 0, 1), (1, 341, 1865))]
KEYS = [f"{country:02d}_{city:02d}_{video:04d}_{image:08d}" for country, city, video, image in NUMBERS]
IMAGES = {key: b"jpeg of " + key.encode() for key in KEYS}


def make_lmdb(folder, entries=None, **options):
    folder.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(folder), map_size=2**24, **options)
    with environment.begin(write=True) as transaction:
        for key, value in (IMAGES if entries is None else entries).items():
            transaction.put(key.encode(), value)
    environment.close()
    return folder


def read(path, **keys):
    return {record.key: record.read() for record in luperson.records(luperson.Config(path=path, **keys))}


@pytest.mark.parametrize("shape", [list, tuple, lambda keys: {"keys": keys}])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("place", ["set/lmdb", "set"])
def test_lmdb_with_a_key_list(tmp_path, shape, binary, place):
    folder = make_lmdb(tmp_path / "set" / "lmdb")
    some = [key.encode() if binary else key for key in (KEYS[4], KEYS[1], KEYS[2])]
    (tmp_path / place / "keys.pkl").write_bytes(pickle.dumps(shape(some)))
    for path in (folder, folder / "data.mdb", tmp_path / "set"):
        assert read(path) == {key: IMAGES[key] for key in (KEYS[4], KEYS[1], KEYS[2])}
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "copy").mkdir()
    os.link(folder / "data.mdb", tmp_path / "copy" / "data.mdb")
    assert read(tmp_path / "link" / "data.mdb").keys() >= {KEYS[1]}  # the same file under other names
    assert read(tmp_path / "copy") == IMAGES


def test_lmdb_without_a_key_list(tmp_path):
    notes = {"__len__": b"6", "__keys__": pickle.dumps(KEYS)}
    make_lmdb(tmp_path / "lmdb", IMAGES | notes)
    assert read(tmp_path / "lmdb") == IMAGES
    records = luperson.records(luperson.Config(path=tmp_path / "lmdb"))
    assert {(r.split, r.pid, r.camid, r.captions) for r in records} == {("unlabeled", None, None, ())}


def test_lmdb_in_one_file_and_without_its_lock(tmp_path):
    environment = lmdb.open(str(tmp_path / "lup.lmdb"), subdir=False, map_size=2**24)
    with environment.begin(write=True) as transaction:
        transaction.put(b"a/b.c.jpg", b"image")
    environment.close()
    (tmp_path / "lup.lmdb-lock").unlink()
    before = set(os.listdir(tmp_path))
    assert read(tmp_path / "lup.lmdb") == {"b_c": b"image"}
    assert read(tmp_path / "lup.lmdb", keys="path") == {"a/b_c": b"image"}
    assert set(os.listdir(tmp_path)) == before  # reading writes nothing, not even a lock


def test_names_that_the_lmdb_lacks(tmp_path):
    make_lmdb(tmp_path, {key: IMAGES[key] for key in KEYS[:4]})
    wanted = [*KEYS, "", "x" * 600]
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps(wanted))
    with pytest.raises(UserError, match=r"4 of the 8 names in .*keys\.pkl are not in .*data\.mdb, the first is ''"):
        read(tmp_path)
    assert set(read(tmp_path, missing="skip")) == set(KEYS[:4])
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps(["a", "b"]))
    with pytest.raises(UserError, match="2 of the 2 names"):  # nothing fits: not the list of this LMDB
        read(tmp_path, missing="skip")


class Attack:
    def __init__(self, sign):
        self.sign = sign

    def __reduce__(self):
        return os.system, (f"touch {self.sign}",)


def test_a_value_or_key_list_that_is_a_pickle_is_not_run(tmp_path):
    attack = pickle.dumps(Attack(tmp_path / "sign"))
    make_lmdb(tmp_path / "lmdb", {"a": attack})
    assert read(tmp_path / "lmdb") == {"a": attack}
    (tmp_path / "keys.pkl").write_bytes(attack)
    with pytest.raises(UserError, match="nothing of it was run"):
        read(tmp_path / "lmdb")
    assert not (tmp_path / "sign").exists()


def test_a_huge_value_and_a_lost_entry_are_bad_samples(tmp_path, monkeypatch):
    make_lmdb(tmp_path / "lmdb", {"a": b"x" * 100})
    file = str(tmp_path / "lmdb" / "data.mdb")
    monkeypatch.setattr(lmdb_files, "VALUE_LIMIT", 99)
    with pytest.raises(BadSample, match=r"entry 'a' of LMDB .* has 100 bytes; no crop is that large"):
        lmdb_files.read_value(file, "a")
    with pytest.raises(BadSample, match=r"has no entry 'b'"):
        lmdb_files.read_value(file, "b")


def test_an_lmdb_that_is_cut_or_damaged(tmp_path):
    make_lmdb(tmp_path / "whole", {str(i): bytes(20_000) for i in range(20)})
    data = (tmp_path / "whole" / "data.mdb").read_bytes()
    assert len(data) > 400_000
    for size in (len(data) - 4096, len(data) // 2, 8192):
        (tmp_path / f"{size}").mkdir()
        (tmp_path / f"{size}" / "data.mdb").write_bytes(data[:size])
        with pytest.raises(UserError, match=rf"data\.mdb is cut short: it has {size:,} bytes"):
            read(tmp_path / f"{size}")
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "data.mdb").write_bytes(b"no database" * 2000)
    with pytest.raises(UserError, match=r"data\.mdb is no LMDB that can be read"):
        read(tmp_path / "noise")


def test_two_lmdbs(tmp_path):
    for name in ("a", "b"):
        make_lmdb(tmp_path / name)
    with pytest.raises(UserError, match=r"more than one LMDB; give one of .*a, .*b"):
        read(tmp_path)


def read_record(record):
    return os.getpid(), record.read()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_records_are_read_in_other_processes(tmp_path, method):
    make_lmdb(tmp_path / "lmdb")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("7.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"tar"))
    records = [
        *luperson.records(luperson.Config(path=tmp_path / "lmdb")),
        *luperson.records(luperson.Config(path=tmp_path / "a.tar")),
    ]
    here = [record.read() for record in records]  # the LMDB is open in this process
    with multiprocessing.get_context(method).Pool(1) as pool:
        there = pool.map(read_record, records)
    assert [data for _, data in there] == here
    assert os.getpid() not in {process for process, _ in there}
    assert [record.read() for record in records] == here


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(path.name.encode())


def test_a_flat_folder_goes_by_the_names_of_its_files(tmp_path):
    for key in KEYS:
        touch(tmp_path / "LUP" / "images" / f"{key}.jpg")
    touch(tmp_path / "LUP" / "README.md")
    for path in (tmp_path, tmp_path / "LUP", tmp_path / "LUP" / "images"):
        assert read(path) == {key: f"{key}.jpg".encode() for key in KEYS}


def test_folders_by_country_and_city_go_by_their_paths(tmp_path):
    names = ["CN/Beijing/1.jpg", "CN/Xi an/1.jpg", "US/New.York/2.JPG"]
    for name in [*names, "keys.pkl", "CN/list.txt"]:
        touch(tmp_path / name)
    assert set(read(tmp_path)) == {"CN/Beijing/1", "CN/Xi_an/1", "US/New_York/2"}
    basenames = [record.key for record in luperson.records(luperson.Config(path=tmp_path, keys="basename"))]
    assert sorted(basenames) == ["1", "1", "2"]


def test_archives_go_by_the_names_of_their_images(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("LUP/images/a.jpg", "LUP/images/b.jpg", "LUP/list.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(name[-5:-4].encode() * 4))
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "parts").mkdir()
    for number in range(3):
        (tmp_path / "parts" / f"x.tar.{number + 1:03d}").write_bytes(data[number * 5000 : number * 5000 + 5000])
    for path in (tmp_path / "x.tar", tmp_path / "parts", tmp_path / "parts" / "x.tar.001"):
        assert read(path) == {"a": b"aaaa", "b": b"bbbb"}
        assert set(read(path, keys="path")) == {"x/LUP/images/a", "x/LUP/images/b"}


def test_mixed_or_empty_folders_and_links_in_a_circle(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "back").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match=r"holds no data\.mdb, no images and no tars or zips"):
        read(tmp_path)
    for name in ("mix/1.jpg", "mix/2.tar"):
        touch(tmp_path / name)
    with pytest.raises(UserError, match=r"images and archives|archives and images"):
        read(tmp_path / "mix")


def test_luperson_and_luperson_nl_are_told_apart(tmp_path, monkeypatch):
    assert luperson.published(luperson.Config(path="x")).splits == {"unlabeled": (4_180_243, None)}
    other = luperson.published(luperson.Config(path="x", expect="luperson_nl"))
    assert other.splits == {"unlabeled": (10_683_716, None)}
    assert "LUPerson-NL" in other.title
    assert luperson.published(luperson.Config(path="x", expect="none")).splits == {}
    small = {"luperson": 4, "luperson_nl": 6, "none": None}
    sets = {
        name: Published(luperson.SETS[name].title, "", {"unlabeled": (count, None)} if count else {})
        for name, count in small.items()
    }
    monkeypatch.setattr(luperson, "SETS", sets)
    make_lmdb(tmp_path)
    with pytest.raises(UserError, match=r"holds 6 images: that is LUPerson-NL .*source\.expect=luperson_nl"):
        read(tmp_path)
    assert len(read(tmp_path, expect="luperson_nl")) == len(read(tmp_path, expect="none")) == 6


def test_records_are_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_lmdb(Path("sets/luperson/lmdb"))
    for key in KEYS:
        touch(Path("sets/luperson/images") / f"{key}.jpg")
    for path in ("sets/luperson/lmdb", "sets/luperson/images"):
        records = luperson.records(luperson.Config(path=path))
        assert len(check_records(list(records))) == 6


class EndlessFolder:
    """A folder that never ends, as os.scandir gives it."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return (Entry(f"{self.path}/{number:08d}.jpg") for number in itertools.count())

    def __exit__(self, *fault):
        return False


class Entry:
    def __init__(self, path):
        self.path, self.name = path, path.rpartition("/")[2]

    def is_file(self):
        return True

    def is_dir(self):
        return False


def test_a_folder_of_any_size_begins_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(walking.os, "scandir", EndlessFolder)  # also where the shape is found out
    records = luperson.records(luperson.Config(path=tmp_path))
    assert [record.key for record in itertools.islice(records, 3)] == ["00000000", "00000001", "00000002"]
