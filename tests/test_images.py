"""One image: what passes, what is shrunk, what is refused and with which sentence."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from shards import images
from shards.images import BadImage, ImagesConfig, check, decode


def encoded(kind: str = "JPEG", height: int = 48, width: int = 24, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind,extension,mode",
    [
        ("JPEG", "jpg", "RGB"),
        ("JPEG", "jpg", "L"),
        ("JPEG", "jpg", "CMYK"),
        ("PNG", "png", "RGBA"),
        ("PNG", "png", "P"),
        ("WEBP", "webp", "RGB"),
        ("BMP", "bmp", "RGB"),
    ],
)
def test_bytes_pass_untouched_and_decode_to_rgb(kind, extension, mode):
    data = encoded(kind, mode=mode)
    assert check(data, "x", ImagesConfig()) == (data, extension)
    assert check(data, "x", ImagesConfig(max_height=48)) == (data, extension)  # equal height is not higher
    image = decode(data)
    assert (image.mode, image.size) == ("RGB", (24, 48))


def test_higher_images_are_shrunk_and_never_enlarged():
    data, extension = check(encoded("PNG", 100, 50), "x", ImagesConfig(max_height=32))
    assert (extension, decode(data).size) == ("jpg", (16, 32))
    data, _ = check(encoded("PNG", 400, 1), "x", ImagesConfig(max_height=32))
    assert decode(data).size == (1, 32)
    small = encoded("PNG", 31, 60)
    assert check(small, "x", ImagesConfig(max_height=32)) == (small, "png")


def test_quality_is_used():
    big = encoded("PNG", 128, 64)
    sizes = [len(check(big, "x", ImagesConfig(max_height=64, quality=q))[0]) for q in (20, 90)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(kind, share):
    data = encoded(kind)
    with pytest.raises(BadImage, match=r"a/b\.jpg is .*(truncated|not a JPEG).*images\.on_bad=skip"):
        check(data[: int(len(data) * share)], "a/b.jpg", ImagesConfig())


def test_no_image():
    with pytest.raises(BadImage, match=r"notes\.jpg is not a JPEG, PNG, WebP or BMP image; .*images\.on_bad=skip"):
        check(b"pid,cam\n1,2\n" * 20, "notes.jpg", ImagesConfig())
    with pytest.raises(BadImage, match="is empty"):
        check(b"", "notes.jpg", ImagesConfig())
    gif = encoded("GIF", mode="P")
    with pytest.raises(BadImage, match="is not a JPEG"):
        check(gif, "x.gif", ImagesConfig())


def test_damage_in_the_middle_never_escapes_as_another_error():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):
        whole = encoded(kind)
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(0, min(len(data), 200), 4):
                data[place] = rng.integers(256)
            with contextlib.suppress(BadImage):
                check(bytes(data), "x", ImagesConfig())


@pytest.mark.parametrize("progressive", [False, True])
def test_verifying_finds_what_decoding_finds(progressive):
    """`check` decodes at an eighth of the size when the bytes pass through: it must refuse exactly the same files."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (30, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((72, 180)).save(buffer, "JPEG", progressive=progressive)
    refused = 0
    for number in range(400):
        data = bytearray(buffer.getvalue())
        if number % 2:
            del data[int(rng.integers(1, len(data))) :]
        for place in rng.integers(0, len(data), size=number % 3):
            data[place] ^= 1 << int(rng.integers(8))
        found = []
        for config in (ImagesConfig(), ImagesConfig(max_height=1000)):
            with contextlib.suppress(BadImage):
                check(bytes(data), "x", config)
                found.append(config)
        assert len(found) != 1, number
        refused += not found
    assert 100 < refused < 400


def test_pixel_limit_is_an_error(monkeypatch):
    monkeypatch.setattr(images, "PIXEL_LIMIT", 24 * 48 - 1)
    with pytest.raises(BadImage, match="24 x 48 pixels, more than the limit"):
        check(encoded(), "x", ImagesConfig())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own error at twice its limit
    with pytest.raises(BadImage, match="far more pixels"):
        check(encoded(), "x", ImagesConfig())


@pytest.mark.parametrize("key,value", [("quality", 0), ("quality", 101), ("max_height", 0), ("on_bad", "ignore")])
def test_ranges(key, value):
    with pytest.raises(ValidationError):
        ImagesConfig(**{key: value})
