"""Encoded bytes to pixels, fast: whole JPEGs with OpenCV, everything else with Pillow.

The pixels are the same. OpenCV accepts a JPEG whose end is missing, so only what ends with the end marker goes to it;
what else is damaged inside a JPEG both decoders mostly let pass, and only the crc of a packed set finds it.
"""

import struct

import cv2
import numpy as np

from shards.images import PIXEL_LIMIT, decode

# the tag is ignored as in images.decode
FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
START, END = b"\xff\xd8", b"\xff\xd9"
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers that begin a frame header
# tables, restart intervals, application data, comments: what stands before it. Of any other marker, or one that begins
# with several FF, decoders differ in where the next begins, so another size than theirs could be read here
BEFORE = frozenset([0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)])


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether these bytes begin and end as a JPEG of 8 bits, one or three channels and a reasonable size."""
    if data[:2] != START or data[-2:] != END:
        return False
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        if data[at + 1] in FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            return bits == 8 and channels in (1, 3) and 0 < width * height <= PIXEL_LIMIT
        if data[at + 1] not in BEFORE:
            return False
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return False


def pixels(data: bytes, origin: str = "an image") -> np.ndarray:
    """Encoded bytes -> uint8 [H, W, 3], RGB. Raises images.BadImage, whose sentence begins with `origin`."""
    if _is_plain_jpeg(data):
        try:
            found = cv2.imdecode(np.frombuffer(data, np.uint8), FLAGS)
        except cv2.error:  # Pillow says what is wrong with it
            found = None
        if found is not None:
            return found
    return np.asarray(decode(data, origin))
