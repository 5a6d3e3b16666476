"""What comes from the browser: a picture, and numbers. Everything is checked here, because anybody can send anything.

A picture comes inside the message of its event, base64, and is decoded in memory: nothing that is uploaded is ever a
file on this machine.
"""

import base64
import binascii
import io
import re
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from recipes.errors import UserError
from shards.images import decode
from shards.schema import BadSample

MB = 1_000_000
TYPES = "JPEG, PNG, WebP or BMP"
ENDINGS = ".jpg,.jpeg,.png,.webp,.bmp"  # for the browser's file chooser
NAME = 80  # characters of a file's name that are shown
TURNED = range(2, 9)  # values of the orientation tag that are not upright


class Upload(NamedTuple):
    """A picture that somebody sent."""

    name: str  # of the file, shortened, without its folders
    data: bytes  # encoded
    image: Image.Image  # RGB
    notes: tuple[str, ...]  # what should be known about it


def size_told(size: float) -> str:
    """Bytes for people: 12 kB, 3.4 MB."""
    return f"{size / MB:.3g} MB" if size >= MB else f"{max(size, 0) / 1000:.3g} kB"


def shown_name(name: Any) -> str:
    """A file's name as it is shown: one line, no folders, not endless."""
    text = re.sub(r"[\s\x00-\x1f\x7f]+", " ", name if isinstance(name, str) else "").strip()
    text = PurePosixPath(text.replace("\\", "/")).name or "your image"
    return text if len(text) <= NAME else f"{text[: NAME - 10]}…{text[-9:]}"


def field(data: Any, name: str) -> Any:
    """A field of an event's data; None where it has none, or is no mapping at all."""
    return data.get(name) if isinstance(data, dict) else None


def whole(value: Any, name: str) -> int:
    """An integer of at least 0 that fits into 63 bits; UserError."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise UserError(f"{name} must be a number of at least 0; reload the page")
    return value


def read(data: Any, limit: int) -> Upload:
    """The picture in an event's data; UserError, a sentence for the page, where it is none that can be searched with.

    data: {"name": str, "picture": base64} or, of a file that the browser found too large, {"name", "size"}. limit:
    bytes of the encoded file.
    """
    name, text = shown_name(field(data, "name")), field(data, "picture")
    size = field(data, "size")
    if isinstance(text, str):
        size = len(text) * 3 // 4 - text[-2:].count("=")
    if isinstance(size, int) and size > limit:
        raise UserError(f"{name} has {size_told(size)}; at most {size_told(limit)} are taken. Cut out the person first")
    if not isinstance(text, str):
        raise UserError(f"nothing of {name} arrived; choose a file ({TYPES})")
    try:
        encoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name} did not arrive whole; try again") from error
    return opened(name, encoded)


def opened(name: str, encoded: bytes) -> Upload:
    """A picture from its encoded bytes; UserError as `read`."""
    try:
        image = decode(encoded, name)
    except BadSample as error:
        # the part after the semicolon is for those who pack a set
        raise UserError(f"{str(error).partition(';')[0]}; choose another file") from error
    return Upload(name, encoded, image, notes(encoded, image))


def notes(encoded: bytes, image: Image.Image) -> tuple[str, ...]:
    """What makes a search with this picture worse than it could be."""
    told = []
    if _orientation(encoded) in TURNED:
        told.append("The file says that it is to be turned. That is not done, as in the training: save it upright.")
    if image.width > image.height:
        told.append("It is wider than high; the model expects a crop of one upright person.")
    return tuple(told)


def _orientation(encoded: bytes) -> int:
    """The orientation tag; 1 where there is none that can be read."""
    try:
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP", "BMP")) as image:
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, IndexError):  # damaged metadata does not matter
        return 1
    return found if isinstance(found, int) else 1
