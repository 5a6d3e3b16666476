"""The four pictures of what a teacher sees, from what was computed; docs/pictures.md tells how to read them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from pretrain.grids import EMPTY, GAP, GREY, Sheet, heated, kept, resized
from pretrain.token_clusters import Cluster

WIDE = 1500  # pixels, of a picture; more where one image has many columns
TALL = 192  # pixels, height of an image in a picture
GREEN, RED = (0, 130, 60), (200, 30, 30)
# lines that stand for no judgement; told apart also without colours, by where they go
PALETTE = (
    *((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0)),
    *((150, 120, 0), (120, 80, 200), (0, 90, 60), (160, 0, 80), (90, 90, 90), (0, 60, 140)),
)
BETWEEN = 36  # pixels between the two images of a pair
SIDE = 6  # a mosaic has SIDE x SIDE windows
WINDOW = 5  # patches, a side of a window
MOSAICS = 4  # beside each other


def tile_of(size: tuple[int, int], tall: int = TALL) -> tuple[int, int]:
    """Width and height of a tile for images of that height and width."""
    return max(1, round(tall * size[1] / size[0])), tall


def table(tiles: Sequence[Sequence[np.ndarray]], text: str, names: Sequence[str]) -> Image.Image:
    """One line an image, its columns named; several images beside each other where there is room."""
    height, width = tiles[0][0].shape[:2]
    blocks = max(1, min(len(tiles), WIDE // (len(names) * (width + GAP))))
    sheet = Sheet(len(names), -(-len(tiles) // blocks), (width, height), text, names, blocks=blocks)
    for number, line in enumerate(tiles):
        row, block = divmod(number, blocks)
        for column, tile in enumerate(line):
            sheet.put(row, column, tile, block=block)
    return sheet.image


def attention_picture(
    images: np.ndarray, maps: np.ndarray, chosen: np.ndarray, heads: Sequence[int], mass: float
) -> Image.Image:
    """One row an image. images uint8 [B, H, W, 3]; maps float [B, heads, gh, gw]; chosen bool [B, gh, gw], the set of
    patches that holds `mass` of the mean map; heads: which are drawn, counted from 0."""
    tile = tile_of(images.shape[1:3])
    names = ["image", "mean", f"{mass:.0%} of it", *(f"head {head + 1}" for head in heads)]
    text = (
        "Attention of the CLS token in the last block: black none, yellow the most in that tile. "
        f"Third column: the fewest patches that hold {mass:.0%} of the mean over all {maps.shape[1]} heads."
    )
    tiles = []
    for pixels, own, held in zip(images, maps, chosen, strict=True):
        image = resized(pixels, tile)
        tiles.append([image, heated(image, own.mean(0)), kept(image, held)])
        tiles[-1] += [heated(image, own[head]) for head in heads]
    return table(tiles, text, names)


def components_picture(images: np.ndarray, colours: np.ndarray, shares: Sequence[float]) -> Image.Image:
    """One row an image. images uint8 [B, H, W, 3]; colours uint8 [B, gh, gw, 3]; shares: of the variance, in 0..1."""
    tile = tile_of(images.shape[1:3])
    names = ["image", "1, 2, 3", *(f"{number}: {share:.0%}" for number, share in enumerate(shares, start=1))]
    text = (
        "The first three principal components of the patch tokens of all these images together: as red, green and "
        "blue, then each alone with its share of the variance. Equal colours: similar tokens. Which end is bright "
        "means nothing."
    )
    tiles = []
    for pixels, own in zip(images, colours, strict=True):
        single = [np.repeat(own[..., number : number + 1], 3, axis=2) for number in range(3)]
        tiles.append([resized(pixels, tile), *(resized(each, tile, nearest=True) for each in (own, *single))])
    return table(tiles, text, names)


class Line(NamedTuple):
    """One match. Places are patches in reading order."""

    start: int  # in the first image
    end: int  # in the second
    right: bool | None  # None: nobody knows, or the true place is not in the second image


class Pair(NamedTuple):
    """Two images and their matches."""

    first: np.ndarray  # uint8 [H, W, 3]
    second: np.ndarray
    lines: list[Line]
    caption: Sequence[str]  # two lines at most
    judged: bool  # whether the lines can be right or wrong


def pairs_picture(pairs: Sequence[Pair], grid: tuple[int, int], text: str, columns: int = 4) -> Image.Image:
    """Pairs beside and below each other; grid: rows and columns of patches of both images."""
    tile = tile_of(pairs[0].first.shape[:2], TALL + 64)
    columns = min(columns, len(pairs))
    sheet = Sheet(columns, -(-len(pairs) // columns), (2 * tile[0] + BETWEEN, tile[1]), text, captions=2)
    for number, pair in enumerate(pairs):
        sheet.put(*divmod(number, columns), _pair(pair, tile, grid), pair.caption)
    return sheet.image


def _pair(pair: Pair, tile: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Drawn at twice its size, because Pillow's lines have hard edges."""
    width, height = 2 * tile[0], 2 * tile[1]
    canvas = np.full((height, 2 * width + 2 * BETWEEN, 3), 255, np.uint8)
    canvas[:, :width] = resized(pair.first, (width, height))
    canvas[:, width + 2 * BETWEEN :] = resized(pair.second, (width, height))
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)

    def point(place: int, left: int) -> tuple[float, float]:
        row, column = divmod(place, grid[1])
        return left + (column + 0.5) * width / grid[1], (row + 0.5) * height / grid[0]

    for number, line in enumerate(pair.lines):
        start, end = point(line.start, 0), point(line.end, width + 2 * BETWEEN)
        colour = PALETTE[number % len(PALETTE)]
        if pair.judged:
            colour = GREY if line.right is None else GREEN if line.right else RED
        _line(draw, start, end, colour, dashed=pair.judged and not line.right)
        for x, y in (start, end):
            draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill=colour, outline="white", width=2)
        if pair.judged and line.right is False:
            x, y = end
            draw.line((x - 12, y - 12, x + 12, y + 12), fill=RED, width=4)
            draw.line((x - 12, y + 12, x + 12, y - 12), fill=RED, width=4)
    return np.asarray(image.reduce(2))


def _line(
    draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], colour: tuple, dashed: bool
) -> None:
    """A line with a white edge, so that it is seen on dark and on bright clothes."""
    (x, y), (right, bottom) = start, end
    length = max(1.0, float(np.hypot(right - x, bottom - y)))
    pieces = int(length // 14) if dashed else 1
    for number in range(0, max(1, pieces), 2):
        ends = (number / max(1, pieces), (number + 1) / max(1, pieces))
        where = [(x + share * (right - x), y + share * (bottom - y)) for share in ends]
        draw.line(where, fill="white", width=9)
        draw.line(where, fill=colour, width=5)


def clusters_picture(
    found: Sequence[Cluster], windows: Sequence[Sequence[np.ndarray]], side: int, text: str
) -> Image.Image:
    """One mosaic a cluster. windows: of each cluster, uint8 [side, side, 3] as `window` cuts them."""
    mosaic = SIDE * (side + 2) - 2
    columns = min(MOSAICS, len(found))
    sheet = Sheet(columns, -(-len(found) // columns), (mosaic, mosaic), text, captions=2)
    for number, (cluster, tiles) in enumerate(zip(found, windows, strict=True)):
        canvas = np.full((mosaic, mosaic, 3), 255, np.uint8)
        for place in range(SIDE * SIDE):
            y, x = (each * (side + 2) for each in divmod(place, SIDE))
            canvas[y : y + side, x : x + side] = tiles[place] if place < len(tiles) else EMPTY
        told = f"prototype {cluster.prototype}: {cluster.patches:,} patches in {cluster.images:,} images"
        sheet.put(*divmod(number, columns), canvas, [told])
    return sheet.image


def window(pixels: np.ndarray, place: int, patch: int, side: int) -> np.ndarray:
    """WINDOW x WINDOW patches round the patch `place` (in reading order) of uint8 [H, W, 3], that patch in a frame and
    tinted; grey where the window leaves the image. uint8 [side, side, 3]."""
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    row, column = divmod(place, columns)
    assert row < rows, (place, rows, columns)
    margin = WINDOW // 2 * patch
    padded = np.full((rows * patch + 2 * margin, columns * patch + 2 * margin, 3), EMPTY, np.uint8)
    padded[margin:-margin, margin:-margin] = pixels[: rows * patch, : columns * patch]
    part = padded[row * patch : (row + WINDOW) * patch, column * patch : (column + WINDOW) * patch]
    part = resized(np.ascontiguousarray(part), (side, side))
    first, last = side * (WINDOW // 2) // WINDOW, side * (WINDOW // 2 + 1) // WINDOW
    middle = part[first:last, first:last].astype(np.float32)
    part[first:last, first:last] = (0.75 * middle + 0.25 * np.array([255, 60, 0])).astype(np.uint8)
    part[first, first:last] = part[last - 1, first:last] = (255, 60, 0)
    part[first:last, first] = part[first:last, last - 1] = (255, 60, 0)
    return part
