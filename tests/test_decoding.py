"""Bytes to pixels: the same pixels as from Pillow, whatever the decoder, and no half image."""

import io

import numpy as np
import pytest
from PIL import Image

from shards import decoding
from shards.decoding import pixels
from shards.images import BadImage, decode


def encoded(mode: str = "RGB", size: tuple[int, int] = (37, 91), kind: str = "JPEG", **given) -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, kind, **given)
    return buffer.getvalue()


ROTATED = Image.Exif()
ROTATED[0x0112] = 6

FAST = [
    encoded(),
    encoded(quality=40, subsampling=0),
    encoded(quality=95, subsampling=1),
    encoded(progressive=True),
    encoded(optimize=True),
    encoded("L"),
    encoded(exif=ROTATED),
    encoded(size=(1, 1)),
    encoded(size=(128, 256), restart_marker_rows=1),
]
SLOW = [encoded("CMYK"), encoded(kind="PNG"), encoded("P", kind="PNG"), encoded(kind="WEBP"), encoded() + b"\0more"]


@pytest.mark.parametrize("data", FAST + SLOW)
def test_pixels_are_those_of_pillow(data):
    found = pixels(data)
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(decode(data)))


def test_whole_jpegs_take_the_fast_way(monkeypatch):
    monkeypatch.setattr(decoding, "decode", None)
    assert all(pixels(data).ndim == 3 for data in FAST)
    for data in SLOW:
        with pytest.raises(TypeError):
            pixels(data)


@pytest.mark.parametrize("data", [encoded(), encoded(progressive=True), encoded(exif=ROTATED)])
def test_a_missing_end_is_always_found(data):
    for length in [*range(0, 60), *range(60, len(data) - 8, 7)]:  # the last pixels may be whole already
        with pytest.raises(BadImage, match=r"^sample 'x' is"):
            pixels(data[:length], "sample 'x'")


def test_damaged_bytes_give_an_image_or_a_bad_image():
    rng, data = np.random.default_rng(0), encoded()
    refused = 0
    for _ in range(400):
        broken = bytearray(data)
        at = int(rng.integers(len(data) - 8))
        broken[at : at + 8] = rng.bytes(8)
        try:
            assert pixels(bytes(broken)).ndim == 3
        except BadImage:
            refused += 1
    assert 20 < refused < 400


def test_a_header_of_a_huge_image_is_refused():
    data = bytearray(encoded())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\x00\xff\x00"
    with pytest.raises(BadImage, match="pixels"):
        pixels(bytes(data))
