"""Walking through the headers of a tar finds what tarfile finds, and comes to no harm by what should not be there."""

import contextlib
import io
import resource
import tarfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import index
from shards.members import Tar

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=8)
FOLDERS = st.lists(NAMES, max_size=2).map(lambda parts: "".join(f"{part}/" for part in parts))
LONG = st.sampled_from(["", "long/" * 21, "very-long-" * 30 + "/"])  # ustar's prefix and beyond it
PLAIN = st.tuples(LONG, FOLDERS, NAMES, st.sampled_from([".jpg", ".json", ".txt", ".PNG", "", ".seg.png"]))
MEMBERS = st.lists(
    st.tuples(
        PLAIN.map("".join),
        st.sampled_from([tarfile.REGTYPE] * 4 + [tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE])
        | st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]),
        st.binary(max_size=1200),
    ),
    max_size=8,
)


@given(members=MEMBERS, form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_members_are_those_of_tarfile(members, form, tmp_path_factory):
    path = tmp_path_factory.mktemp("tars") / "x.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, kind, data in members:
            member = tarfile.TarInfo(name)
            if kind == tarfile.AREGTYPE and len(name.encode()) > 99:
                kind = tarfile.REGTYPE  # tarfile may take it for a folder: it looks at the cut name
            member.type, member.linkname = kind, "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            member.size = len(data) if member.isreg() else 0
            member.mtime = 0.5 if form == tarfile.PAX_FORMAT else 0  # a header of its own in pax
            with contextlib.suppress(ValueError):  # too long for ustar
                tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
    with tarfile.open(path, errors="surrogateescape") as tar:
        expected = [
            (m.name.encode("utf-8", "surrogateescape"), m.offset_data, m.size, zlib.crc32(tar.extractfile(m).read()))
            for m in tar
            if m.isreg()
        ]
    with Tar(path, whole=True) as ours:
        found = [(m.name, m.offset, m.size, ours.crc32(m.offset, m.size)) for m in ours.members()]
        assert (found, ours.faults) == (expected, [])
        assert ours.finish() == zlib.crc32(path.read_bytes())


def test_sizes_in_base_256_and_old_checksums(tmp_path):
    block = bytearray(tarfile.TarInfo("ä.jpg").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\x80" + (700).to_bytes(11, "big")
    block[148:156] = b" " * 8
    for total in (sum(block), sum(byte - 256 * (byte > 127) for byte in block)):  # unsigned and signed bytes
        block[148:156] = b"%06o\0 " % total
        path = tmp_path / "x.tar"
        path.write_bytes(block + b"d" * 700 + bytes(324) + bytes(1024))
        [row] = index.scan_tar(path)
        assert (row["offset"], row["length"], row["crc"]) == (512, 700, zlib.crc32(b"d" * 700))
        block[148:156] = b" " * 8


def test_members_larger_than_the_window(tmp_path):
    large = np.random.default_rng(0).bytes(3 * 2**20 + 77)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("0.mp4", large), ("0.jpg", large), ("1.jpg", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    scan = index.inspect_tar(path, whole=True)
    assert scan.rows["crc"].tolist() == [zlib.crc32(large), zlib.crc32(b"x")]
    assert scan.crc32 == zlib.crc32(path.read_bytes())
    assert scan.size == path.stat().st_size


def test_what_is_no_regular_file_is_passed_over(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.jpg")
            member.type, member.linkname = kind, str(tmp_path / "secret.jpg")
            tar.addfile(member)
    assert len(index.scan_tar(path)) == 0


def header(name, size, kind=b"0"):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "content,kind",
    [
        (header("0.jpg", 2**40), "truncated"),
        (header("0.jpg", 0, b"x") + header("0.jpg", 0), "half sample"),  # an image of 0 bytes
        (header("x", 2**40, b"x"), "truncated"),
        (header("x", 512, b"x") + b"9" * 512, "damaged header"),
        (header("x", 512, b"x") + b"15 size=-1234\n\0".ljust(512, b"\0") + header("0.jpg", 1), "damaged header"),
        (header("0.json", 2**20 + 512) + b"[" * (2**20 + 512), "bad meta"),
        (header("0.json", 2**19) + b"[" * 2**19 + header("0.jpg", 1) + bytes(512), None),  # deeper than json may nest
        (header("0.jpg", 512, b"S") + bytes(512), "sparse file"),
        (b"\xff" * 2048, "damaged header"),
    ],
)
def test_malicious_tars(tmp_path, content, kind):
    path = tmp_path / "x.tar"
    path.write_bytes(content + bytes(1024))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert [fault.kind for fault in index.inspect_tar(path).faults][:1] == [kind] * (kind is not None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB
