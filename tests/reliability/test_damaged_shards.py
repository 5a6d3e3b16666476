"""R7: tars of a packed set are cut everywhere and flipped bit by bit: all is noticed, what is lost is told exactly."""

import functools
import io
import shutil
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from recipes.errors import UserError
from shards import index
from shards.images import ImagesConfig
from shards.packing import PackingConfig
from shards.reader import ShardReader
from shards.schema import BadSample, Record, Sample
from shards.verification import SetReport, verify_set
from shards.writer import pack

SAMPLES = 9
TAR = "train-000001.tar"  # the one that is damaged, of three


class Truth(NamedTuple):
    """A whole tar."""

    raw: bytes
    data: dict[str, list[slice]]  # of each sample: its image and its labels
    headers: dict[str, list[slice]]
    rows: dict[bytes, np.void]


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 8 + number, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A set of three tars of three samples."""
    folder = tmp_path_factory.mktemp("sets") / "small"
    records = [
        Record(f"a/{i}", "train", functools.partial(picture, i), i, i % 2, (f"person {i}",)) for i in range(SAMPLES)
    ]
    pack(records, folder, PackingConfig(shard_samples=3, workers=0), ImagesConfig(), [{"name": "made"}])
    return folder


@pytest.fixture(scope="module")
def truth(packed) -> Truth:
    """Where everything lies in the tar, as tarfile sees it."""
    path = packed / TAR
    data, headers = {}, {}
    with tarfile.open(path) as tar:
        for member in tar:
            key = member.name.partition(".")[0]
            data.setdefault(key, []).append(slice(member.offset_data, member.offset_data + member.size))
            headers.setdefault(key, []).append(slice(member.offset, member.offset_data))
    assert len(data) == 3
    return Truth(path.read_bytes(), data, headers, {bytes(row["key"]): row for row in index.scan_tar(path)})


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    return shutil.copytree(packed, tmp_path / "copy")


def changed(truth: Truth, places: dict[str, list[slice]], damaged: bytes) -> set[str]:
    """Samples of which something at these places is not as it was."""
    return {key for key, parts in places.items() if any(truth.raw[part] != damaged[part] for part in parts)}


def report_of(copy: Path, truth: Truth, damaged: bytes) -> SetReport:
    """Verify the set with this tar in place of the whole one; what holds for every damage is asserted."""
    path = copy / TAR
    path.write_bytes(damaged)
    report = verify_set(str(copy), workers=0, silent=True)
    ours = next(tar for tar in report.tars if tar.name == TAR)
    assert not report.fine
    assert not ours.fine
    assert all(tar.fine for tar in report.tars if tar.name != TAR)
    assert report.faults == []
    assert len(ours.lost) == len(set(ours.lost)) == report.lost
    assert set(ours.lost) == changed(truth, truth.data, damaged)
    assert set(ours.hidden) <= set(truth.data) - set(ours.lost)
    assert ours.surplus == ()
    # whoever walks through the headers finds whole samples only, and learns that there was more
    scan = index.inspect_tar(path)
    for row in scan.rows:
        whole = truth.rows[bytes(row["key"])]
        assert [row[name] for name in ("offset", "length", "meta_offset", "meta_length")] == [
            whole[name] for name in ("offset", "length", "meta_offset", "meta_length")
        ]
    if len(scan.rows) < len(truth.rows):
        assert scan.faults
        with pytest.raises(UserError, match=TAR):
            index.scan_tar(path)
    return report


def cut(copy: Path, truth: Truth, size: int) -> None:
    report = report_of(copy, truth, truth.raw[:size])
    ours = next(tar for tar in report.tars if tar.name == TAR)
    assert ours.hidden == (), "what is in front of the cut is not touched"
    assert any(f"has {size} bytes, the manifest says {len(truth.raw)}" in sentence for sentence in ours.faults)


def flip(copy: Path, truth: Truth, bits: np.ndarray) -> None:
    """Turn these bits over, each once."""
    damaged = np.frombuffer(truth.raw, np.uint8).copy()
    np.bitwise_xor.at(damaged, bits // 8, (1 << bits % 8).astype(np.uint8))
    report = report_of(copy, truth, damaged.tobytes())
    ours = next(tar for tar in report.tars if tar.name == TAR)
    hidden = changed(truth, truth.headers, damaged.tobytes())
    assert set(ours.hidden) <= hidden
    places = [int(bits[0]) // 8 - part.start for parts in truth.headers.values() for part in parts]
    if len(bits) == 1 and not any(148 <= place < 156 for place in places):  # spaces of the checksum may be anything
        assert set(ours.hidden) == hidden


def boundaries(truth: Truth) -> list[int]:
    """First and last byte of every header and every content, and the bytes around the end-of-archive mark."""
    parts = [part for places in (truth.data, truth.headers) for each in places.values() for part in each]
    last = max(part.stop for part in parts)
    blocks = [-(-last // 512) * 512 + 512 * number for number in range(3)]
    edges = {
        edge + by for edge in blocks + [edge for part in parts for edge in (part.start, part.stop)] for by in (-1, 0, 1)
    }
    return sorted(edge for edge in edges if 0 <= edge < len(truth.raw))


@pytest.mark.row("R7")
def test_cut_at_every_boundary(copy, truth, figures):
    sizes = boundaries(truth)
    for size in sizes:
        cut(copy, truth, size)
    figures("R7", injected="a tar cut at every boundary", times=len(sizes), lost=0, wrong=0)


def test_cut_anywhere(copy, truth):
    for size in np.random.default_rng(0).integers(0, len(truth.raw), 100):
        cut(copy, truth, int(size))


@pytest.mark.row("R7")
def test_bits_flipped_at_every_boundary(copy, truth, figures):
    rng, places = np.random.default_rng(1), boundaries(truth)
    for byte in places:
        flip(copy, truth, np.array([8 * byte + rng.integers(8)]))
    figures("R7", injected="a bit at every boundary", times=len(places), lost=0, wrong=0)


def test_bits_flipped_anywhere(copy, truth):
    rng = np.random.default_rng(2)
    for _ in range(200):
        flip(copy, truth, rng.choice(8 * len(truth.raw), rng.choice([1, 1, 2, 3, 40]), replace=False))


@pytest.mark.row("R7")
def test_blocks_lost_or_zeroed(copy, truth):
    """What a file system leaves after a crash: blocks of zeros, and blocks that are another file's."""
    rng = np.random.default_rng(3)
    for start in range(0, len(truth.raw) - 1024, 512):
        for content in (bytes(1024), rng.bytes(1024)):
            damaged = truth.raw[:start] + content + truth.raw[start + 1024 :]
            if damaged != truth.raw:
                report_of(copy, truth, damaged)


@pytest.mark.row("R7")
def test_the_reader_gives_whole_samples_or_none(copy, truth):
    def samples(reader: ShardReader) -> dict[str, Sample | None]:
        found: dict[str, Sample | None] = {}
        for row in range(len(reader)):
            try:
                found[reader.keys[row].decode()] = reader[row]
            except BadSample:
                found[reader.keys[row].decode()] = None
        return found

    whole = samples(ShardReader([copy], "train", captions=True))
    assert len(whole) == SAMPLES
    rng = np.random.default_rng(5)
    for turn in range(60):
        damaged = bytearray(truth.raw)
        if turn % 2:
            del damaged[int(rng.integers(len(damaged))) :]
        else:
            damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
        (copy / TAR).write_bytes(damaged)
        lost = changed(truth, truth.data, bytes(damaged))
        expected = {key: None if key in lost else sample for key, sample in whole.items()}
        assert samples(ShardReader([copy], "train", captions=True)) == expected


def test_a_tar_that_is_gone_or_another_one(copy, truth):
    (copy / TAR).unlink()
    report = verify_set(str(copy), workers=0, silent=True)
    assert report.lost == 3
    [ours] = [tar for tar in report.tars if not tar.fine]
    assert set(ours.lost) == set(truth.data)
    assert ours.faults == (f"tar {copy / TAR} does not exist",)
    shutil.copy(copy / "train-000000.tar", copy / TAR)
    report = verify_set(str(copy), workers=0, silent=True)
    [ours] = [tar for tar in report.tars if not tar.fine]
    assert set(ours.lost) == set(truth.data)
    assert len(ours.surplus) == 3


@pytest.mark.row("R7")
def test_every_bit_of_the_index_counts(copy):
    path = copy / "index-train.npy"
    raw = path.read_bytes()
    rng = np.random.default_rng(3)
    for byte in [*range(128), *rng.integers(128, len(raw), 100)]:
        damaged = bytearray(raw)
        damaged[byte] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert verify_set(str(copy), workers=0, silent=True).faults
    for size in range(0, len(raw), 37):
        path.write_bytes(raw[:size])
        assert verify_set(str(copy), workers=0, silent=True).faults
    path.write_bytes(raw)
    assert verify_set(str(copy), workers=0, silent=True).fine


@pytest.mark.soak
@pytest.mark.row("R7")
def test_many_damages(copy, truth, figures):
    for size in range(len(truth.raw)):
        cut(copy, truth, size)
    rng = np.random.default_rng(4)
    for bit in rng.permutation(8 * len(truth.raw))[:20_000]:
        flip(copy, truth, np.array([bit]))
    for _ in range(20_000):
        flip(copy, truth, rng.choice(8 * len(truth.raw), rng.integers(2, 500), replace=False))
    note = "all found; as many samples told as lose a byte, none given by half"
    times = len(truth.raw) + 40_000
    figures("R7", injected="a tar cut at every byte, bits flipped", times=times, lost=0, wrong=0, note=note)
