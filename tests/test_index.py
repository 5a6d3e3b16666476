"""The index of any webdataset tar: offsets that find the bytes, and tars that are refused."""

import io
import json
import tarfile
import zlib

import numpy as np
import pytest

from recipes.errors import UserError
from shards import index
from shards.schema import UNKNOWN


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def labelled(n, image=b"image"):
    for i in range(n):
        yield f"a/{i:04}.jpg", image * (i + 1)
        yield f"a/{i:04}.json", json.dumps({"pid": i, "camid": i % 3}).encode()


def test_rows_find_the_bytes(tmp_path):
    path = write_tar(tmp_path / "x.tar", labelled(30))
    rows, raw = index.scan_tar(path, shard=7), path.read_bytes()
    assert len(rows) == 30
    for i, row in enumerate(rows):
        data = raw[row["offset"] : row["offset"] + row["length"]]
        assert data == b"image" * (i + 1)
        assert row["crc"] == zlib.crc32(data)
        meta = raw[row["meta_offset"] : row["meta_offset"] + row["meta_length"]]
        assert json.loads(meta) == {"pid": i, "camid": i % 3}
        assert (row["shard"], row["pid"], row["camid"], row["key"]) == (7, i, i % 3, f"a/{i:04}".encode())


def test_foreign_tars(tmp_path):
    image = b"\xff\xd8"
    members = [
        ("./00.jpg", image),
        ("./00.txt", b"a man in red"),
        ("./00.json", json.dumps({"caption": "a man in red", "key": "00", "width": 3}).encode()),
        ("./" + "long/" * 40 + "01.JPEG", image),  # beyond ustar: GNU and pax headers
        ("./" + "long/" * 40 + "01.json", b"{}"),
        ("./02.seg.png", b"mask"),
        ("./02.json", b'{"pid": 4}'),
        ("./02.jpg", image),
        ("README", b"no sample"),
    ]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write_tar(tmp_path / f"{form}.tar", members, format=form)
        rows, raw = index.scan_tar(path), path.read_bytes()
        assert [row["key"].decode() for row in rows] == ["./00", "./" + "long/" * 40 + "01", "./02"]
        assert all(raw[r["offset"] : r["offset"] + r["length"]] == image for r in rows)
        assert rows["pid"].tolist() == [UNKNOWN, UNKNOWN, 4]
        assert rows["camid"].tolist() == [UNKNOWN] * 3
        first = raw[rows[0]["meta_offset"] : rows[0]["meta_offset"] + rows[0]["meta_length"]]
        assert index.read_meta(first) == (UNKNOWN, UNKNOWN, ("a man in red",))


def test_images_only_and_text_only(tmp_path):
    rows = index.scan_tar(write_tar(tmp_path / "x.tar", [("0.png", b"p"), ("1.webp", b"w"), ("1.txt", b"hello\n")]))
    assert rows["meta_length"].tolist() == [0, 6]
    assert index.read_meta(b"hello\n") == (UNKNOWN, UNKNOWN, ("hello",))
    assert index.read_meta(b"") == (UNKNOWN, UNKNOWN, ())
    assert index.read_meta(b'{"captions": ["a", "b"], "camid": 0}') == (UNKNOWN, 0, ("a", "b"))


def test_every_cut_is_noticed(tmp_path):
    whole = write_tar(tmp_path / "x.tar", labelled(3)).read_bytes()
    end = 3 * 2 * 1024  # six members of one header and one data block, then zeros
    cut = tmp_path / "cut.tar"
    for size in [*range(0, end + 1024, 512), 100, 700, end + 1, end + 1023]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.tar is (cut short|not a whole)"):
            index.scan_tar(cut)
    cut.write_bytes(whole[: end + 1024])
    assert len(index.scan_tar(cut)) == 3


def test_damaged_header_is_noticed(tmp_path):
    path = write_tar(tmp_path / "x.tar", labelled(3))
    raw = bytearray(path.read_bytes())
    raw[2048 + 150] ^= 0xFF  # in the checksum field of the third member
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"x\.tar is cut short or damaged: no end-of-archive mark at byte 2048"):
        index.scan_tar(path)


@pytest.mark.parametrize(
    "members,sentence",
    [
        ([("0.json", b"{}")], "half a sample: 0 has .* no image"),
        ([("0.jpg", b"x"), ("0.json", b"{}"), ("1.jpg", b"x")], "half a sample: 1 has no json"),
        ([("0.jpg", b"x"), ("0.jpg", b"x")], "holds 0.jpg twice"),
        ([("0.jpg", b"x"), ("1.jpg", b"x"), ("0.jpg", b"x")], "holds the key 0 twice"),
        ([("0.jpg", b"x"), ("0.png", b"x")], "two images"),
        ([("0.jpg", b"x"), ("0.json", b'{"pid": "four"}')], "sample 0 has pid 'four'"),
    ],
)
def test_refused(tmp_path, members, sentence):
    with pytest.raises(UserError, match=rf"x\.tar.*{sentence}"):
        index.scan_tar(write_tar(tmp_path / "x.tar", members))


def test_missing_and_compressed(tmp_path):
    with pytest.raises(UserError, match=r"gone\.tar does not exist"):
        index.scan_tar(tmp_path / "gone.tar")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"x\.tar\.gz is not a whole, uncompressed tar"):
        index.scan_tar(tmp_path / "x.tar.gz")


def test_join_save_load(tmp_path):
    first = index.scan_tar(write_tar(tmp_path / "a.tar", [("k.jpg", b"1")]), 0)
    second = index.scan_tar(write_tar(tmp_path / "b.tar", [("long/key.jpg", b"22")]), 1)
    rows = index.join([first, second])
    index.save(rows, tmp_path / "index.npy")
    again = index.load(tmp_path / "index.npy")
    assert isinstance(again, np.memmap)
    assert again["key"].tolist() == [b"k", b"long/key"]
    assert again["shard"].tolist() == [0, 1]
    assert not list(tmp_path.glob(".index*")), "nothing is left beside"
    assert len(index.join([])) == 0


def test_load_refuses(tmp_path):
    with pytest.raises(UserError, match=r"none\.npy does not exist"):
        index.load(tmp_path / "none.npy")
    (tmp_path / "text.npy").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"text\.npy is damaged"):
        index.load(tmp_path / "text.npy")
    np.save(tmp_path / "other.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"other\.npy does not hold"):
        index.load(tmp_path / "other.npy")


def test_tars_of_img2dataset(tmp_path):
    members = []
    for i in range(5):
        told = {"caption": f"person {i}", "url": "http://x", "key": f"{i:09}", "status": "success", "width": 64}
        members += [(f"{i:09}.jpg", b"image"), (f"{i:09}.json", json.dumps(told).encode()), (f"{i:09}.txt", b"no")]
    path = write_tar(tmp_path / "00000.tar", members)
    rows, raw = index.scan_tar(path), path.read_bytes()
    assert rows["key"].tolist() == [b"%09d" % i for i in range(5)]
    for i, row in enumerate(rows):
        meta = raw[row["meta_offset"] :][: row["meta_length"]]
        assert row["meta_crc"] == zlib.crc32(meta)
        assert index.read_meta(meta) == (UNKNOWN, UNKNOWN, (f"person {i}",))


@pytest.mark.parametrize("value", ["10000000000000000000", "-1e3", "true", "[4]"])
def test_labels_that_do_not_fit(tmp_path, value):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", b"x"), ("0.json", b'{"pid": %s}' % value.encode())])
    with pytest.raises(UserError, match=r"sample 0 has pid .*an integer is expected"):
        index.scan_tar(path)


def test_the_scan_goes_on_behind_damage(tmp_path):
    path = write_tar(tmp_path / "x.tar", labelled(6))
    raw = bytearray(path.read_bytes())
    raw[2048 + 5] ^= 1  # header of the image of sample 1
    raw[2 * 2048 + 1024 + 150] ^= 1  # header of the json of sample 2
    path.write_bytes(raw)
    scan = index.inspect_tar(path)
    assert scan.rows["key"].tolist() == [b"a/0000", b"a/0003", b"a/0004", b"a/0005"]
    assert [(fault.kind, fault.key, fault.position) for fault in scan.faults] == [
        ("damaged header", "", 2048),
        ("damaged header", "", 5120),
        ("half sample", "a/0001", 3072),
        ("half sample", "a/0002", 4096),
    ]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_that_lost_its_extended_header_is_not_believed(tmp_path, form):
    long = "x" * 94 + ".jpg"  # 98 bytes, and with its folder beyond what a header holds
    path = write_tar(tmp_path / "x.tar", [("0.jpg", b"0"), ("f/" * 3 + long, b"1"), ("2.jpg", b"2")], format=form)
    raw = bytearray(path.read_bytes())
    raw[1024 + 20] ^= 1  # of the header that announces the long name
    path.write_bytes(raw)
    scan = index.inspect_tar(path)
    assert scan.rows["key"].tolist() == [b"0", b"2"]
    assert scan.faults


@pytest.mark.parametrize(
    "images,cut,left",
    [
        (3, 2 * 1024, [b"0", b"1"]),  # like the first, the second has no labels
        (1, 1024, []),  # nothing tells whether it had any
    ],
)
def test_what_is_next_to_a_cut_must_be_like_the_others(tmp_path, images, cut, left):
    path = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"image") for i in range(images)])
    path.write_bytes(path.read_bytes()[:cut])
    assert index.inspect_tar(path).rows["key"].tolist() == left


def test_tars_behind_one_another_are_noticed(tmp_path):
    first = write_tar(tmp_path / "a.tar", [("0.jpg", b"0"), ("1.jpg", b"1")]).read_bytes()
    second = write_tar(tmp_path / "b.tar", [("2.jpg", b"2"), ("3.jpg", b"3")]).read_bytes()
    (tmp_path / "x.tar").write_bytes(first + second)
    with pytest.raises(UserError, match=r"x\.tar goes on after its end-of-archive mark at byte 2048"):
        index.scan_tar(tmp_path / "x.tar")
    assert index.inspect_tar(tmp_path / "x.tar").rows["key"].tolist() == [b"0", b"1", b"2", b"3"]


def test_a_folder_is_no_tar(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        index.scan_tar(tmp_path)
