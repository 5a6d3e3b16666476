"""Thousands of damaged tars, zips, images, labels and embedding tables: each gives a value or one sentence."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from archive_files import make_tar, make_zip
from fuzzing import Reader, as_json, changed_bytes, changed_trees, filed, fuzz_all, npy_claiming, passed_over
from hypothesis import strategies as st
from PIL import Image

from shards import decoding, images, index
from shards.embeddings import EmbeddingTable, Keys
from shards.images import ImagesConfig
from shards.raw import split_files
from shards.sources import archives

Inputs = list[tuple[st.SearchStrategy, Reader]]
FORMATS = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)


def tars(tmp_path: Path) -> Inputs:
    """Scanned as a shard, and packed as an archive of crops."""
    long = {"a.jpg": b"{}", "a.json": b'{"pid": 1}', "l" * 90 + "/" + "m" * 90 + ".jpg": b"x"}
    shards = [make_tar(tmp_path / "a.tar", long, layout).read_bytes() for layout in FORMATS]
    crops = [make_tar(tmp_path / "a.tar", layout=layout).read_bytes() for layout in FORMATS]
    return [
        (changed_bytes(crops), filed(tmp_path / "b.tar", read_archive)),
        (changed_bytes(shards), filed(tmp_path / "c.tar", lambda path: index.scan_tar(path))),
    ]


def read_archive(path: Path) -> None:
    split_files.find_parts.cache_clear()  # the file has become another one
    split_files._open.cache_clear()
    for record in archives.records(archives.Config(path=path)):
        passed_over(record.read)


def zips(tmp_path: Path) -> Inputs:
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    whole = [make_zip(tmp_path / "a.zip", method=method).read_bytes() for method in methods]
    return [(changed_bytes(whole), filed(tmp_path / "b.zip", read_archive))]


def pictures(tmp_path: Path) -> Inputs:
    noise = np.random.default_rng(0).integers(0, 256, (40, 20, 3), dtype=np.uint8)
    ways = [("RGB", "JPEG", {}), ("L", "JPEG", {}), ("CMYK", "JPEG", {}), ("RGB", "JPEG", {"progressive": True})]
    ways += [(mode, "PNG", {}) for mode in ("RGB", "P", "L", "LA", "RGBA", "1")] + [
        ("RGB", "BMP", {}),
        ("RGB", "GIF", {}),
    ]
    ways += [("RGB", "WEBP", {}), ("RGBA", "WEBP", {"lossless": True})]
    files = []
    for mode, kind, options in ways:
        buffer = io.BytesIO()
        Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
        files.append(buffer.getvalue())
    small = ImagesConfig(max_height=10)
    return [
        (changed_bytes(files), lambda data: decoding.pixels(data)),
        (changed_bytes(files), lambda data: images.check(data, "x", ImagesConfig())),
        (changed_bytes(files), lambda data: images.check(data, "x", small)),
    ]


def labels(tmp_path: Path) -> Inputs:
    tree = {"pid": 3, "camid": 1, "captions": ["a", "b"], "caption": "x"}
    return [(changed_bytes([as_json(tree)]), index.read_meta), (changed_trees(tree).map(as_json), index.read_meta)]


def tables(tmp_path: Path) -> Inputs:
    folder = tmp_path / "table"
    table = EmbeddingTable(np.ones((4, 3), np.float32), np.arange(4), np.arange(4), Keys("abcd"), {"made": 1})
    table.save(folder)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def replaced(name: str) -> Reader:
        def read(data: bytes) -> None:
            for each, content in (whole | {name: data}).items():
                (folder / each).write_bytes(content)
            EmbeddingTable.load(folder, mapped=True).features.sum()
            EmbeddingTable.load(folder)

        return read

    shapes = st.sampled_from([(10**12, 3), (10**9, 3), (4, 3), (-1, 3), (), None, (10**30, 3), (2**62, 4)])
    kinds = st.sampled_from(["<f4", "|O", "|S9999999999", "|V1", 5, None, "<i8", [("a", "<f4")]])
    claims = st.builds(npy_claiming, kinds, shapes, st.just(bytes(48)), st.booleans())
    return [
        *((changed_bytes([data]), replaced(name)) for name, data in sorted(whole.items())),
        (changed_trees(json.loads(whole["table.json"])).map(as_json), replaced("table.json")),
        (claims, replaced("features.npy")),
    ]


@pytest.mark.row("R17")
@pytest.mark.parametrize("times", [50, pytest.param(5_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("inputs", [tars, zips, pictures, labels, tables])
def test_files(inputs, times, tmp_path, figures):
    fuzz_all(inputs.__name__, inputs(tmp_path), times, figures)
