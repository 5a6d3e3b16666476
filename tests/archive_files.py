"""Small tars and zips, and what the source `archives` gives of them."""

import io
import random
import tarfile
import zipfile
from pathlib import Path

from shards.sources import archives

FILES = {f"images/{i % 3}/{i:08d}.jpg": random.Random(i).randbytes(300 * i) for i in range(12)}


def make_tar(path, files=FILES, layout=tarfile.GNU_FORMAT, extra=()):
    with tarfile.open(path, "w", format=layout) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for member in extra:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def make_zip(path, files=FILES, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def cut(path, size, suffixes):
    """Cut a file into parts and remove it."""
    data = path.read_bytes()
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert len(pieces) > 2
    for piece, suffix in zip(pieces, suffixes, strict=False):
        Path(f"{path}.{suffix}").write_bytes(piece)
    path.unlink()
    return len(pieces)


def contents(path, **keys):
    """Key -> bytes, as the source `archives` gives them."""
    records = list(archives.records(archives.Config(path=path, **keys)))
    return {record.key: record.read() for record in records}


def expected(stem, files=FILES):
    return {f"{stem}/{name.removesuffix('.jpg')}": data for name, data in files.items()}
