"""R17: tars, zips, LMDBs and images that want to write elsewhere, to unpack to gigabytes, or to end the process."""

import contextlib
import io
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import lmdb
import numpy as np
import pytest
from archive_files import make_tar
from hostile import hole, png, put, survey, trapped, zip_bomb
from PIL import Image

from recipes.errors import UserError
from shards import decoding, images, index
from shards.images import ImagesConfig
from shards.in_place import index_in_place
from shards.raw import lmdb_files, split_files, walking
from shards.reader import ShardReader
from shards.sources import archives

pytestmark = pytest.mark.row("R17")


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def odd_members() -> dict[str, tarfile.TarInfo]:
    return {
        "out of the folder": member("../../x.jpg", size=5),
        "an absolute name": member("/tmp/x.jpg", size=5),
        "a symbolic link": member("x.jpg", tarfile.SYMTYPE, link="/etc/passwd"),
        "a hard link": member("x.jpg", tarfile.LNKTYPE, link="/etc/passwd"),
        "a character device": member("x.jpg", tarfile.CHRTYPE),
        "a block device": member("x.jpg", tarfile.BLKTYPE),
        "a pipe": member("x.jpg", tarfile.FIFOTYPE),
        "a folder": member("x.jpg", tarfile.DIRTYPE),
        "a sparse file": member("x.jpg", tarfile.GNUTYPE_SPARSE, size=5),
        "a name of a megabyte": member("x" * 10**6 + ".jpg", size=5),
        "a name with zeros and colours": member("\x1b[31mx\n\u202e.jpg", size=5),
    }


def raw_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header that tarfile would not write."""
    block = bytearray(
        name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"0" * 11 + b"\0"
    )
    block += b" " * 8 + kind + bytes(100) + b"ustar\x0000" + bytes(247)
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block[:512])


def raw_tars() -> dict[str, bytes]:
    end, digits = bytes(1024), b"5020 size=" + b"9" * 5009 + b"\n"
    pax = raw_header(b"p", b"%011o" % len(digits), b"x") + digits.ljust(-(-len(digits) // 512) * 512, b"\0")
    return {
        "a size of 5,000 digits": pax + raw_header(b"a.jpg", b"00000000000") + end,
        "a size of 2^90": raw_header(b"a.jpg", b"\x80" + b"\xff" * 11) + end,
        "a size below 0": raw_header(b"a.jpg", b"\xff" * 12) + end,
        "a size of 8 GB": raw_header(b"a.jpg", b"77777777777") + end,
        "a long name of 8 GB": raw_header(b"a", b"77777777777", b"L") + end,
        "10,000 headers of the next": raw_header(b"p", b"00000000000", b"x") * 10_000 + end,
        "10,000 long names": raw_header(b"p", b"00000000000", b"L") * 10_000 + end,
        "sparse maps without end": (raw_header(b"a.jpg", b"0", b"S")[:482] + b"\1" * 30 + b"\1" * 512 * 1000) + end,
    }


def read_archive(path: Path) -> None:
    """As packing does."""
    split_files.find_parts.cache_clear()
    for record in archives.records(archives.Config(path=path)):
        images.check(record.read(), record.key, ImagesConfig())


def test_tars(small_set, tmp_path, figures):
    cases = {}

    def scan(path: Path) -> None:
        for row in index.inspect_tar(path, whole=True).rows:
            assert 0 <= row["offset"] + row["length"] <= path.stat().st_size

    def in_place(path: Path) -> None:
        out = path.with_suffix(".set")
        try:
            index_in_place([str(path)], out, "train", workers=0, on_bad="skip")
            reader = ShardReader([out], "train")
            for row in range(len(reader)):
                decoding.pixels(reader[row].image)
        finally:
            shutil.rmtree(out, ignore_errors=True)

    paths = {
        name: make_tar(tmp_path / f"{n}.tar", {}, extra=[odd]) for n, (name, odd) in enumerate(odd_members().items())
    }
    paths |= {name: put(tmp_path / f"raw{n}.tar", data) for n, (name, data) in enumerate(raw_tars().items())}
    for name, path in paths.items():
        cases[f"{name}, scanned"] = "read", lambda path=path: scan(path)
        cases[f"{name}, packed"] = "refused", lambda path=path: read_archive(path)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert survey(cases) == []
    assert sorted(path for path in tmp_path.rglob("*")) == before
    for path in paths.values():  # indexing writes, into its own folder
        with contextlib.suppress(UserError):
            in_place(path)
    assert sorted(path for path in tmp_path.rglob("*")) == before, "nothing is left, nothing was unpacked"
    figures("R17", injected="tars", times=len(cases) + len(paths), lost=0, wrong=0)


def zips() -> dict[str, bytes]:
    bomb = zip_bomb("a.jpg", 2 << 30)
    small = bomb.replace(struct.pack("<L", 2 << 30), struct.pack("<L", 1000))  # lies about its size
    entry = zip_bomb("x.jpg", 1 << 20)
    return {
        "2 GB of zeros": bomb,
        "2 GB that claim 1,000 bytes": small,
        "out of the folder": entry.replace(b"x.jpg", b"../.j").replace(b"../.j", b"../xx") + b"",
        "out of the folder, image": zip_bomb("../../x.jpg", 1 << 20),
        "an absolute name": zip_bomb("/tmp/x.jpg", 1 << 20),
        "a drive": zip_bomb("C:\\x.jpg", 1 << 20),
        "cut": bomb[:-30],
        "no directory": b"PK\3\4" + bytes(100),
        "a directory of 4 GB": entry[:-22] + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 2**32 - 2, 5, 0),
    }


def test_zips_and_lmdbs(tmp_path, figures):
    cases = {}
    for number, (name, data) in enumerate(zips().items()):
        path = put(tmp_path / f"{number}.zip", data)
        cases[name] = "refused", lambda path=path: read_archive(path)
    sign = tmp_path / "sign"
    with (
        lmdb.open(str(tmp_path / "a.mdb"), subdir=False, map_size=1 << 30) as store,
        store.begin(write=True) as transaction,
    ):
        transaction.put(b"pickle", trapped(sign))
        transaction.put(b"large", bytes((1 << 27) + 1))
    for key in ("pickle", "large", "none", "../../x"):

        def read(key: str = key) -> None:
            images.check(lmdb_files.read_value(str(tmp_path / "a.mdb"), key), key, ImagesConfig())

        cases[f"LMDB, {key}"] = "refused", read
    cut = put(tmp_path / "cut.mdb", (tmp_path / "a.mdb").read_bytes()[:20_000])
    cases["LMDB, cut"] = "refused", lambda: list(lmdb_files.walk_keys(str(cut)))
    cases["an image file of 1 TB"] = "refused", lambda: walking.read_file(str(hole_))
    hole_ = hole(tmp_path / "large.jpg", 1 << 40)
    assert survey(cases) == []
    assert not sign.exists()
    figures("R17", injected="zips, LMDBs, files", times=len(cases), lost=0, wrong=0)


def jpeg(width: int, height: int, fill: bytes = b"", between: bytes = b"") -> bytes:
    """A small JPEG whose header claims another size. fill: bytes in front of the marker of the frame."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    at = data.index(b"\xff\xc0")
    return data[:at] + between + fill + data[at : at + 5] + struct.pack(">2H", height, width) + data[at + 9 :]


def two_sizes() -> bytes:
    """What a reader takes for a comment of 57,346 bytes, libjpeg takes for FF FF E0: another frame lies in there."""
    hidden = b"\xff\xff\xe0\x00\x10" + bytes(14)
    large = jpeg(40_000, 40_000)
    small = jpeg(16, 16)
    body = hidden + large[2:-2]
    return b"\xff\xd8" + body.ljust(0xE000 + 2, b"\0") + small[small.index(b"\xff\xc0") :]


def image_files() -> dict[str, bytes]:
    zeros = zlib.compress(bytes(100 << 20), 1)
    text = zlib.compress(bytes(1 << 20), 9)
    profile, note = (b"iCCP", b"x\0\0" + zeros), (b"zTXt", b"x\0\0" + zeros)
    webp = io.BytesIO()
    Image.new("RGB", (8000, 4000)).save(webp, "WEBP", lossless=True, method=0)
    tiff, gif = io.BytesIO(), io.BytesIO()
    Image.new("L", (9, 9)).save(tiff, "TIFF")
    Image.new("L", (9, 9)).save(gif, "GIF")
    whole = jpeg(16, 16)
    return {
        "PNG of 20,000 x 20,000": png(20_000, 20_000),
        "PNG of 2^31 x 2^31": png(4, 4).replace(struct.pack(">2L", 4, 4), struct.pack(">2L", 2**31 - 1, 2**31 - 1)),
        "PNG of 25.1 megapixels": png(5010, 5010, bits=8, kind=6),
        "PNG with a profile of 100 MB": png(9, 9, [profile]),
        "PNG with a text of 100 MB": png(9, 9, [note]),
        "PNG with 100 texts of 1 MB": png(9, 9, [(b"zTXt", b"x\0\0" + text)] * 100),
        "JPEG of 65,500 x 65,500": jpeg(65_500, 65_500),
        "JPEG of 0 x 0": jpeg(0, 0),
        "JPEG cut": whole[:-200],
        "WebP of 32 megapixels": webp.getvalue(),
        "BMP of 2^31 x 2^31": b"BM"
        + struct.pack("<3L", 60, 0, 54)
        + struct.pack("<L2l2H6L", 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6),
        "TIFF": tiff.getvalue(),
        "GIF": gif.getvalue(),
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch x) run\n",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "a pickle": trapped(Path("/nowhere")),
        "nothing": b"",
    }


WAYS = {
    "decoded": decoding.pixels,
    "packed": lambda data: images.check(data, "x", ImagesConfig()),
    "shrunk": lambda data: images.check(data, "x", ImagesConfig(max_height=8)),
}


@pytest.mark.parametrize(
    "way", ["decoded", *(pytest.param(way, marks=pytest.mark.soak) for way in ("packed", "shrunk"))]
)
def test_images(way, figures):
    read, large = WAYS[way], png(4999, 5001, bits=8, kind=6)
    fine = {
        "a JPEG with FF in front of its markers": jpeg(16, 16, fill=b"\xff\xff"),
        "a JPEG of two sizes": two_sizes(),
        "10,000 comments": jpeg(16, 16, between=b"\xff\xfe\x00\x04ab" * 10_000),
    }
    cases = {name: ("refused", lambda data=data: read(data)) for name, data in image_files().items()}
    cases |= {name: ("refused or read", lambda data=data: read(data)) for name, data in fine.items()}
    cases["25 megapixels"] = "read", lambda: read(large)
    assert survey(cases) == []
    figures("R17", injected=f"images, {way}", times=len(cases), lost=0, wrong=0)
