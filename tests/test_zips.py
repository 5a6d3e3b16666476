"""Zips of crops in place: against zipfile, damaged, hostile, and with more members than the old directory counts."""

import io
import itertools
import random
import struct
import tracemalloc
import zipfile
import zlib

import pytest
from archive_files import FILES, contents, expected, make_zip

from recipes.errors import UserError
from shards.raw.zips import walk_zip
from shards.schema import BadSample
from shards.sources import archives


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips(tmp_path, method):
    files = FILES | {"images/é 1.jpg": b"accent", "images/": b"", "__MACOSX/images/._1.jpg": b"fork", "x/._2.jpg": b""}
    path = make_zip(tmp_path / "a.zip", files | {"images/1.json": b"{}"}, method)
    assert contents(path) == expected("a", FILES) | {"a/images/é_1": b"accent"}


def test_zip_against_zipfile(tmp_path):
    dice = random.Random(3)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(60):
            info = zipfile.ZipInfo(f"{number}{'x' * dice.randrange(200)}.JPG")
            info.compress_type = dice.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
            info.extra = struct.pack("<2H", 0x7777, 4) + b"more" if number % 2 else b""
            info.comment = b"c" * dice.randrange(100)
            with archive.open(info, "w", force_zip64=number % 3 == 0) as file:
                file.write(dice.randbytes(dice.randrange(5000)))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        truth = {info.filename[:-4]: archive.read(info) for info in archive.infolist()}
    assert contents(tmp_path / "a.zip", keys="basename", suffixes=["jpg"]) == truth


def test_a_zip_with_a_misleading_comment(tmp_path):
    path = make_zip(tmp_path / "a.zip")
    data = path.read_bytes()
    comment = b"not PK\5\6 here" + bytes(40)
    path.write_bytes(data[:-2] + struct.pack("<H", len(comment)) + comment)
    assert contents(path) == expected("a")


def write_stored_zip(path, count):
    """What zipfile writes for `count` stored members, without its cost of 50 us a member."""
    directory = io.BytesIO()
    with path.open("wb") as file:
        for number in range(count):
            name, data = b"%08d.jpg" % number, b"%d" % number
            numbers = (zlib.crc32(data), len(data), len(data), len(name))
            directory.write(
                struct.pack("<4s6H3L5H2L", b"PK\1\2", 0x31E, 20, 0, 0, 0, 33, *numbers, 0, 0, 0, 0, 0, file.tell())
            )
            directory.write(name)
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, *numbers, 0) + name + data)
        start, size = file.tell(), directory.tell()
        file.write(directory.getvalue())
        end = file.tell()
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, size, start, 0))


def test_a_zip_of_more_than_65535_members_streams(tmp_path):
    write_stored_zip(tmp_path / "small.zip", 3)
    with zipfile.ZipFile(tmp_path / "small.zip") as archive:
        assert [archive.read(name) for name in archive.namelist()] == [b"0", b"1", b"2"]
    count = 66_000  # so the directory needs the 64-bit record
    write_stored_zip(tmp_path / "a.zip", count)
    entries = walk_zip(str(tmp_path / "a.zip"), (".jpg",))
    tracemalloc.start()
    assert all(entry.name == f"{number:08d}.jpg" for number, entry in enumerate(itertools.islice(entries, 20_000)))
    assert tracemalloc.get_traced_memory()[1] < 6 * 2**20  # blocks of the directory; zipfile holds some 50 MB for it
    tracemalloc.stop()
    assert sum(entry.size for entry in entries) == (count - 20_000) * 5


def test_symlinks_in_a_zip_are_passed_over(tmp_path):
    info = zipfile.ZipInfo("link.jpg")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
        archive.writestr("1.jpg", b"one")
    assert contents(tmp_path / "a.zip") == {"a/1": b"one"}


def test_damaged_zip_members_are_bad_samples(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"1.jpg": b"first" * 50, "2.jpg": b"second" * 50}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"first", b"fXrst", 1))
    one, two = archives.records(archives.Config(path=path))
    with pytest.raises(BadSample, match="do not have the size and crc"):
        one.read()
    assert two.read() == b"second" * 50


def entry_at(data, name):
    """Where the directory entry of a member begins."""
    return data.rindex(name) - 46


@pytest.mark.parametrize("claimed", [10, 2**20, 2**31])
def test_a_zip_member_that_unpacks_to_another_size(tmp_path, claimed):
    path = make_zip(tmp_path / "a.zip", {"1.jpg": bytes(2**19)})
    data = bytearray(path.read_bytes())
    at = entry_at(data, b"1.jpg")
    data[at + 24 : at + 28] = struct.pack("<L", claimed)
    path.write_bytes(data)
    (record,) = archives.records(archives.Config(path=path))
    tracemalloc.start()
    with pytest.raises(BadSample, match=r"size and crc|are no crop"):
        record.read()
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [(8, 1, "is encrypted"), (10, 9, "packed by deflate64"), (10, 12, "packed by bzip2")],
)
def test_zip_members_that_cannot_be_unpacked_here(tmp_path, place, value, sentence):
    path = make_zip(tmp_path / "a.zip", {"1.jpg": b"x"})
    data = bytearray(path.read_bytes())
    at = entry_at(data, b"1.jpg")
    data[at + place : at + place + 2] = struct.pack("<H", value)
    path.write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        contents(path)


def test_a_zip_that_is_cut_or_damaged(tmp_path):
    whole = make_zip(tmp_path / "a.zip").read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "b.zip").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"b\.zip"):
            contents(tmp_path / "b.zip")
    (tmp_path / "c.zip").write_bytes(whole[:2000] + whole[3000:])  # a thousand bytes lost
    with pytest.raises(UserError, match=r"c\.zip has its directory not where it says"):
        contents(tmp_path / "c.zip")


def test_spanned_zips_name_the_command(tmp_path):
    make_zip(tmp_path / "a.zip")
    (tmp_path / "a.z01").write_bytes(b"PK\7\x08")
    with pytest.raises(UserError, match=r"zip -s 0 .*a\.zip --out .*a-whole\.zip"):
        contents(tmp_path)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[-18:-16] = b"\1\0"  # the number of this volume
    (tmp_path / "a.zip").write_bytes(data)
    (tmp_path / "a.z01").unlink()
    with pytest.raises(UserError, match=r"zip -s 0"):
        contents(tmp_path)
