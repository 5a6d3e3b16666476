"""Verify, shrink and re-encode one image.

Every image is decoded once while packing, so that a training run never meets a broken one. Without `max_height` the
bytes that go into the shard are exactly the bytes that came in.
"""

import io
import struct
import warnings
import zlib
from typing import Literal

from PIL import Image
from pydantic import Field

from recipes.load import Section
from shards.schema import BadSample

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}  # Pillow's name -> ours
PIXEL_LIMIT = 25_000_000  # pixels; a photograph passes, and no decoder takes 500 MB. A crop has some ten thousand
# What Pillow's decoders raise on damaged bytes, beside OSError (its own truncated, unidentified and bomb errors).
DAMAGE = (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error)


class ImagesConfig(Section):
    """What is done to each image on its way into a shard."""

    max_height: int | None = Field(None, ge=1)  # pixels; higher images are shrunk to it, None leaves all bytes alone
    quality: int = Field(90, ge=1, le=100)  # JPEG quality of the shrunk ones
    on_bad: Literal["error", "skip"] = "error"  # an image that cannot be decoded: stop, or leave it out and count it


class BadImage(BadSample):
    """These bytes are no image that can be decoded completely."""


def _bad(origin: str, fault: str) -> BadImage:
    return BadImage(f"{origin} {fault}; mend or remove it, or leave such files out with images.on_bad=skip")


def _open(data: bytes, origin: str, verify: bool = False) -> Image.Image:
    """The decoded image in its own mode; BadImage if the bytes are not a complete JPEG, PNG, WebP or BMP.

    verify: a JPEG comes back in an eighth of its size. All its bytes are read and decoded, only most of the inverse
    transform is left out, so the same damage is found in three quarters of the time.
    """
    if not data:
        raise _bad(origin, "is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the limit below is an error, not a warning; odd metadata does not matter
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "BMP"))
    except Image.DecompressionBombError as error:
        raise _bad(origin, f"has far more pixels than the limit of {PIXEL_LIMIT:,}") from error
    except DAMAGE as error:
        raise _bad(origin, "is not a JPEG, PNG, WebP or BMP image") from error
    if image.width * image.height > PIXEL_LIMIT:
        raise _bad(origin, f"has {image.width} x {image.height} pixels, more than the limit of {PIXEL_LIMIT:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if verify:
                image.draft(None, (1, 1))
            image.load()
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise _bad(origin, f"is a damaged or truncated {image.format} image ({len(data)} bytes)") from error
    return image


def decode(data: bytes, origin: str = "an image") -> Image.Image:
    """Encoded bytes -> RGB image. An orientation tag is not applied, as in the published training code."""
    image = _open(data, origin)
    return image if image.mode == "RGB" else image.convert("RGB")


def check(data: bytes, origin: str, config: ImagesConfig) -> tuple[bytes, str]:
    """Decode the image fully and give (bytes for the shard, extension "jpg", "png", "webp" or "bmp").

    An image higher than `config.max_height` comes back as a JPEG of that height with the same aspect ratio, every
    other one untouched. origin: path or description that opens the sentence of BadImage.
    """
    image = _open(data, origin, verify=config.max_height is None)
    if config.max_height is None or image.height <= config.max_height:
        return data, EXTENSIONS[image.format or ""]
    width = max(1, round(image.width * config.max_height / image.height))
    buffer = io.BytesIO()
    small = image.convert("RGB").resize((width, config.max_height), Image.Resampling.BICUBIC)
    small.save(buffer, "JPEG", quality=config.quality)
    return buffer.getvalue(), "jpg"
