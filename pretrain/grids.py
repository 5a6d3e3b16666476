"""Pictures of many tiles with labels, as PNG files."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipes.errors import naming

GAP, LINE = 8, 15  # pixels: between tiles; height of a line of text
FONT = 12
LEAST = 420  # pixels, width of a picture, for the text
INK, GREY, EMPTY = (20, 20, 20), (130, 130, 130), (235, 235, 235)
HEAT = 0.75  # how much of a heat map covers the image below it


def encoded(image: Image.Image) -> bytes:
    """As a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=4)  # a third of the time of 6, a tenth more bytes
    return buffer.getvalue()


def write_file(path: Path, data: bytes) -> None:
    """Write a file that a reader sees whole or not at all; OSError, which names it, where the disk refuses."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(data)
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)  # only there when the lines above failed


def resized(pixels: np.ndarray, tile: tuple[int, int], nearest: bool = False) -> np.ndarray:
    """uint8 or float [H, W, ...] -> [height, width, ...]. tile: width, height. nearest: patches keep their edges."""
    shrinks = tile[1] < pixels.shape[0]
    smooth = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(pixels, tile, interpolation=cv2.INTER_NEAREST if nearest else smooth)


def gray(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] without its colours."""
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def heated(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """An image in gray below a heat map: black 0, yellow the highest value. pixels uint8 [H, W, 3]; values float
    [gh, gw], >= 0, one a patch."""
    top = float(values.max())
    scaled = np.round(values / top * 255 if top > 0 else np.zeros_like(values)).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    height, width = pixels.shape[:2]
    return cv2.addWeighted(resized(colours, (width, height), nearest=True), HEAT, gray(pixels), 1 - HEAT, 0)


def kept(pixels: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """An image as it is where `patches` (bool [gh, gw]) is True, pale and without colours elsewhere."""
    height, width = pixels.shape[:2]
    stays = resized(patches.astype(np.uint8), (width, height), nearest=True).astype(bool)
    pale = cv2.addWeighted(gray(pixels), 0.3, np.full_like(pixels, 255), 0.7, 0)
    return np.where(stays[..., None], pixels, pale)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of words, none wider than `width` pixels unless a single word is."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


class Sheet:
    """Rows and columns of tiles of one size, a text above, a name over each column, a caption below each tile. Blocks
    are such tables beside each other."""

    def __init__(
        self,
        columns: int,
        rows: int,
        tile: tuple[int, int],
        text: str,
        names: Sequence[str] = (),
        captions: int = 0,
        blocks: int = 1,
    ):
        """tile: width, height in pixels. captions: lines below each tile."""
        self.tile, self.captions = tile, captions
        self.font = ImageFont.load_default(FONT)
        self.pitch = tile[0] + GAP, tile[1] + GAP + captions * LINE
        self.block = columns * self.pitch[0] + 2 * GAP
        width = max(blocks * self.block - GAP, LEAST)
        lines = wrapped(text, self.font, width - 2 * GAP)
        self.top = GAP + len(lines) * LINE + GAP + (LINE + 2 if names else 0)
        self.image = Image.new("RGB", (width, self.top + rows * self.pitch[1]), "white")
        self.draw = ImageDraw.Draw(self.image)
        for number, line in enumerate(lines):
            self.draw.text((GAP, GAP + number * LINE), line, fill=INK, font=self.font)
        for block in range(blocks):
            for column, name in enumerate(names):
                x = GAP + block * self.block + column * self.pitch[0]
                self.draw.text((x, self.top - LINE - 2), name, fill=INK, font=self.font)

    def put(self, row: int, column: int, pixels: np.ndarray, captions: Sequence[str] = (), block: int = 0) -> None:
        """Place uint8 [height, width, 3]."""
        assert pixels.shape[1::-1] == self.tile, (pixels.shape, self.tile)
        assert len(captions) <= self.captions
        x, y = GAP + block * self.block + column * self.pitch[0], self.top + row * self.pitch[1]
        self.image.paste(Image.fromarray(pixels), (x, y))
        for number, line in enumerate(captions):
            self.draw.text((x, y + self.tile[1] + 1 + number * LINE), line, fill=INK, font=self.font)
