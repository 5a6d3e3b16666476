"""Tars of crops in place: what is listed, what is read, what is refused; nothing reaches the disk."""

import tarfile
from pathlib import Path

import pytest
from archive_files import FILES, contents, expected, make_tar, make_zip
from record_checks import check_records

from recipes.errors import UserError
from shards.raw.archives import archive_records, is_archive
from shards.sources import archives

LONG = "images/" + "d" * 120 + "/" + "n" * 110 + ".jpg"


def tree(folder):
    """Everything below a folder, with its bytes."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_all_layouts(tmp_path, layout):
    files = FILES if layout == tarfile.USTAR_FORMAT else FILES | {LONG: b"long", "images/é.jpg": b"accent"}
    path = make_tar(tmp_path / "a.tar", files | {"images/1.json": b"{}", "read.me": b"-"}, layout)
    assert contents(path) == expected("a", files)
    short = contents(path, keys="basename")
    assert short == {Path(name).stem: data for name, data in files.items()}


def special(name, kind, link="", size=0):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size
    return member


def test_links_and_devices_in_a_tar_are_passed_over(tmp_path):
    kinds = [
        special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.jpg", tarfile.LNKTYPE, "images/0/00000000.jpg"),
        special("device.jpg", tarfile.CHRTYPE),
        special("block.jpg", tarfile.BLKTYPE),
        special("pipe.jpg", tarfile.FIFOTYPE),
        special("folder.jpg", tarfile.DIRTYPE),
    ]
    make_tar(tmp_path / "a.tar", extra=kinds)
    before = tree(tmp_path)
    assert contents(tmp_path / "a.tar") == expected("a")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["../../x.jpg", "/escaped-x.jpg", "a/../../x.jpg", "..\\x.jpg", "C:/x.jpg", "./../x.jpg", "x/../y.jpg"]
)
@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_names_that_point_outside_are_refused(tmp_path, name, make):
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in" / f"a.{'tar' if make is make_tar else 'zip'}", {name: b"x"})
    before = tree(tmp_path)
    with pytest.raises(UserError, match="points outside of the folder"):
        list(archive_records(path, "unlabeled", (".jpg",), basename=True))
    assert tree(tmp_path) == before
    assert not Path("/escaped-x.jpg").exists()


def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path):
    whole = make_tar(tmp_path / "a.tar", {"1.jpg": b"x" * 700, "2.jpg": b"y" * 512}).read_bytes()
    end = len(whole.rstrip(b"\0"))  # the last byte of the last image
    assert end == 512 + 1024 + 512 + 512
    for size in [*range(1, end, 97), 512, 1536, 2048, end]:
        path = tmp_path / f"{size}.tar"
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"{size}\.tar"):
            contents(path)


def test_a_tar_with_a_damaged_header_in_the_middle(tmp_path):
    data = bytearray(make_tar(tmp_path / "a.tar").read_bytes())
    place = data.index(b"images/2/00000005.jpg")
    data[place : place + 4] = b"XXXX"
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar is cut short at byte"):
        contents(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [-512, -1024, -10_000, 2**40, 2**63])
def test_sizes_that_lie_end_in_a_sentence(tmp_path, kind, size):
    member = tarfile.TarInfo("1.jpg")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = kind
    header[124:136] = (size % 2**88).to_bytes(12, "big")
    header[124] = 0xFF if size < 0 else 0x80
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(member.tobuf() * 3 + bytes(header) + bytes(10_240))
    with pytest.raises(UserError, match=r"a\.tar"):
        contents(tmp_path / "a.tar")


def test_sparse_members_are_refused(tmp_path):
    member = special("1.jpg", tarfile.GNUTYPE_SPARSE)
    make_tar(tmp_path / "a.tar", extra=[member])
    with pytest.raises(UserError, match="stored with holes"):
        contents(tmp_path / "a.tar")


def test_other_formats_are_named(tmp_path):
    (tmp_path / "a.7z.001").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    with pytest.raises(UserError, match=r"is a 7z archive; unpack it \(7z x"):
        contents(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.tar").write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(UserError, match="is not a whole tar"):
        contents(tmp_path / "b")


def test_a_folder_of_archives(tmp_path):
    (tmp_path / "deep").mkdir()
    make_tar(tmp_path / "deep" / "x.y.tar", {"1.jpg": b"tar"})
    make_zip(tmp_path / "deep" / "z.zip", {"1.jpg": b"zip"})
    (tmp_path / "list.txt").write_text("notes")
    assert contents(tmp_path) == {"deep/x_y/1": b"tar", "deep/z/1": b"zip"}
    (tmp_path / "stray.jpg").touch()
    with pytest.raises(UserError, match=r"holds archives and images \(.*stray\.jpg\)"):
        contents(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        contents(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no tars or zips"):
        contents(tmp_path)
    make_tar(tmp_path / "a.tar", {"1.txt": b""})
    with pytest.raises(UserError, match=r"hold no images"):
        contents(tmp_path)


def test_records_are_small_and_travel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sets/luperson").mkdir(parents=True)
    make_tar(Path("sets/luperson/LUP.tar"), {"LUP/images/34_01_0341_00001865.jpg": b"1"})
    make_zip(Path("sets/luperson/more.zip"), {"LUP/images/34_01_0341_00001866.jpg": b"2"})
    records = list(archives.records(archives.Config(path="sets/luperson", split="train")))
    assert [record.split for record in check_records(records)] == ["train", "train"]


def test_names_of_archives():
    yes = [
        "a.tar",
        "a.zip",
        "a.tar.001",
        "a.zip.00",
        "a.TAR",
        "a.tar.gz",
        "a.tgz",
        "a.7z.001",
        "a.rar",
        "a.z01",
        "LUP.001",
    ]
    assert [name for name in yes if not is_archive(name)] == []
    no = ["a.jpg", "a.txt", "keys.pkl", "data.mdb", "34_01_0341_00001865.jpg", "tar", "README", "a.01"]
    assert [name for name in no if is_archive(name)] == []
