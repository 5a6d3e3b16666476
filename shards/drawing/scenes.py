"""What is behind and in front of a person: plain gradients, street scenes and occluders."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from shards.drawing.canvas import OVER
from shards.drawing.people import Colour
from shards.seeds import generator

_WALLS: tuple[Colour, ...] = (
    (168, 152, 134),
    (140, 86, 66),
    (190, 186, 176),
    (120, 126, 130),
    (206, 190, 150),
    (96, 104, 98),
)
_FLOORS: tuple[Colour, ...] = ((126, 124, 120), (92, 92, 96), (162, 154, 142), (140, 116, 96), (176, 176, 174))


def plain(width: int, height: int, difference: float, g: np.random.Generator) -> np.ndarray:
    """A smooth gradient with a faint floor: float32 [height, width, 3] in [0, 255].

    difference: how much it changes from image to image, 0 (one even grey) to 1.
    """
    base = g.uniform(45, 190) + g.normal(0, 8, 3)
    corners = base + g.normal(0, 22, (3, 2, 1)) + g.normal(0, 6, (3, 2, 3))
    corners[2] += g.normal(0, 26)  # the floor
    corners = 120 + difference * (corners - 120)
    small = Image.fromarray(np.clip(corners, 0, 255).astype(np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)


def scenic(seed: int, camid: int, width: int, height: int, g: np.random.Generator) -> np.ndarray:
    """A crop at a random place of the street scene of a camera: float32 [height, width, 3] in [0, 255]."""
    scene = _street(seed, camid, height)
    left = int(g.integers(max(1, scene.shape[1] - width + 1)))
    top = int(g.integers(max(1, scene.shape[0] - height + 1)))
    return scene[top : top + height, left : left + width].astype(np.float32)


def _shift(colour: Colour, g: np.random.Generator, spread: float = 12.0) -> Colour:
    shift = g.normal(0, spread, 3) + g.normal(0, spread)
    return tuple(int(min(255, max(0, c + s))) for c, s in zip(colour, shift, strict=True))


@lru_cache(maxsize=64)
def _street(seed: int, camid: int, height: int) -> np.ndarray:
    """The scene before a camera: uint8 [1.2 height, 2.6 height, 3]."""
    g = generator(seed, "figures scene", camid)
    h, w = round(1.2 * height), round(2.6 * height)
    line = round(h * g.uniform(0.5, 0.68))  # where the floor begins
    wall = _shift(_WALLS[int(g.integers(len(_WALLS)))], g)
    floor = _shift(_FLOORS[int(g.integers(len(_FLOORS)))], g)
    image = Image.new("RGB", (w, h), wall)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, line, w, h), fill=floor)
    _facade(draw, w, line, wall, int(g.integers(3)), g)
    _paving(draw, w, h, line, floor, g)
    for _ in range(int(g.integers(2, 6))):
        _foliage(draw, w, line, h, g)
    for _ in range(int(g.integers(2, 5))):
        x, half = int(g.integers(w)), max(1, round(h * g.uniform(0.006, 0.02)))
        draw.rectangle((x - half, 0, x + half, line + h * g.uniform(0.02, 0.15)), fill=_shift((88, 90, 92), g))
    for _ in range(int(g.integers(0, 3))):
        _car(draw, w, line, h, g)
    coarse = g.normal(0, 9, (h // 8 + 1, w // 8 + 1)).astype(np.float32)
    cloud = np.asarray(Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC))
    grain = g.normal(0, 6, (h, w)).astype(np.float32)
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(h / 400)), dtype=np.float32)
    return np.clip(blurred + (cloud + grain)[..., None], 0, 255).astype(np.uint8)


def _facade(draw: ImageDraw.ImageDraw, w: int, line: int, wall: Colour, kind: int, g: np.random.Generator) -> None:
    """Bricks, windows or panels on the wall."""
    if kind == 0:
        step = max(3, line // 16)
        for row, y in enumerate(range(0, line, step)):
            for x in range(-(row % 2) * step, w, 2 * step):
                draw.rectangle((x, y, x + 2 * step - 2, min(line, y + step - 2)), fill=_shift(wall, g, 6))
    elif kind == 1:
        wide = max(8, round(line * g.uniform(0.3, 0.6)))
        glass = _shift((70, 84, 98), g)
        for x in range(0, w, round(wide * 1.5)):
            for y in range(round(line * 0.08), round(line * 0.85), max(4, round(line * 0.42))):
                draw.rectangle((x, y, x + wide, y + line * 0.32), fill=_shift(glass, g), outline=(40, 40, 42))
                draw.line((x + wide // 2, y, x + wide // 2, y + line * 0.32), fill=(40, 40, 42))
    else:
        wide = max(6, round(line * g.uniform(0.35, 0.9)))
        for x in range(0, w, wide):
            draw.rectangle((x, 0, x + wide - 2, line), fill=_shift(wall, g, 9))
        draw.rectangle((0, line * 0.3, w, line * 0.38), fill=_shift(wall, g, 30))
    draw.rectangle((0, line - max(1, line // 30), w, line), fill=_shift((70, 68, 66), g))


def _paving(draw: ImageDraw.ImageDraw, w: int, h: int, line: int, floor: Colour, g: np.random.Generator) -> None:
    """Joints of the floor in perspective, or the white line of a road."""
    joint = tuple(max(0, c - 22) for c in floor)
    if g.random() < 0.7:
        t = line + 2.0
        while t < h:
            draw.line((0, t, w, t), fill=joint)
            t += (t - line) * 0.4 + 1.5
        for x in range(-w, 2 * w, max(6, w // 14)):
            draw.line((w / 2 + (x - w / 2) * 0.4, line, x, h), fill=joint)
    else:
        y = line + (h - line) * g.uniform(0.2, 0.8)
        slope = g.normal(0, 0.1) * h
        draw.line((0, y, w, y + slope), fill=(214, 212, 204), width=max(1, h // 50))


def _foliage(draw: ImageDraw.ImageDraw, w: int, line: int, h: int, g: np.random.Generator) -> None:
    """A bush or the crown of a tree."""
    x, size = g.uniform(0, w), h * g.uniform(0.08, 0.24)
    y = line - size * 0.3 if g.random() < 0.6 else g.uniform(0, line * 0.4)
    _leaves(draw, x, y, size, size, g)


def _leaves(draw: ImageDraw.ImageDraw, x: float, y: float, wide: float, high: float, g: np.random.Generator) -> None:
    """Leaves in an ellipse with half axes wide and high, darker below and inside."""
    leaf = _shift((66, 92, 46), g)
    angles, radii = g.uniform(0, 2 * np.pi, 150), np.sqrt(g.random(150))
    for angle, out, r in zip(angles, radii, g.uniform(0.06, 0.16, 150), strict=True):
        dx, dy = out * np.cos(angle), out * np.sin(angle)
        light = 0.95 - 0.4 * dy + g.normal(0, 0.16)
        colour = tuple(int(min(255, max(0, c * light))) for c in leaf)
        a, b = r * wide, r * high * 0.8
        draw.ellipse((x + dx * wide - a, y + dy * high - b, x + dx * wide + a, y + dy * high + b), fill=colour)


def _car(draw: ImageDraw.ImageDraw, w: int, line: int, h: int, g: np.random.Generator) -> None:
    """A parked car at the edge of the floor."""
    x, long, y = g.uniform(0, w), h * g.uniform(0.5, 0.8), line + h * g.uniform(0.0, 0.06)
    high = long * 0.3
    paint = _shift(((160, 30, 32), (200, 200, 204), (40, 44, 52), (50, 74, 120))[int(g.integers(4))], g)
    cabin = (x + long * 0.2, y - high, x + long * 0.8, y - high * 0.4)
    draw.rounded_rectangle(cabin, radius=high * 0.2, fill=(54, 64, 74))
    draw.rounded_rectangle((x, y - high * 0.6, x + long, y), radius=high * 0.15, fill=paint)
    for wheel in (0.2, 0.8):
        cx, r = x + long * wheel, high * 0.22
        draw.ellipse((cx - r, y - r, cx + r, y + r), fill=(26, 26, 28))


def occluder(kind: str, width: int, height: int, g: np.random.Generator) -> Image.Image:
    """A pole, a car bonnet or a bush that stands before the person: RGBA, OVER times the image."""
    w, h = width * OVER, height * OVER
    layer = Image.new("RGBA", (w, h))
    draw = ImageDraw.Draw(layer)
    if kind == "pole":
        x, half = w * g.uniform(0.15, 0.85), w * g.uniform(0.03, 0.1)
        colour = _shift((96, 98, 100), g, 18)
        for k, light in enumerate((0.7, 1.0, 1.15, 0.95, 0.6)):
            tone = tuple(min(255, int(c * light)) for c in colour)
            draw.rectangle((x + half * (0.4 * k - 1), 0, x + half * (0.4 * k - 0.6), h), fill=(*tone, 255))
    elif kind == "car":
        y, tilt = h * g.uniform(0.64, 0.84), h * g.normal(0, 0.03)
        paint = _shift(((150, 28, 30), (196, 198, 200), (36, 38, 44), (44, 66, 110))[int(g.integers(4))], g)
        top = [(w * k / 8, y + tilt * (k / 4 - 1) + h * 0.05 * (k / 4 - 1) ** 2) for k in range(-1, 10)]
        draw.polygon([*top, (w * 1.2, h), (-w * 0.2, h)], fill=(*paint, 255))
        shine = [(x, v + h * 0.035) for x, v in top]
        draw.line(shine, fill=(*(min(255, c + 50) for c in paint), 255), width=max(1, h // 60))
        draw.rectangle((0, h * 0.93, w, h), fill=(*(int(c * 0.5) for c in paint), 255))
    else:
        side, size = g.integers(2) * w, w * g.uniform(0.3, 0.5)
        y = h * g.uniform(0.6, 0.95)
        _leaves(draw, side, y, size, 1.4 * size, g)
    return layer


def ground_shadow(width: int, height: int, x: float, y: float, scale: float, lean: float) -> np.ndarray:
    """Darkening of the floor below a person who stands at pixel (x, y): float32 [height, width] in (0, 1].

    scale: pixels for a body height. lean: direction and length of the cast shadow, -1 to 1.
    """
    rows = (np.arange(height, dtype=np.float32) - y) / (0.028 * scale)
    columns = (np.arange(width, dtype=np.float32) - x - 0.09 * lean * scale) / (scale * (0.12 + 0.08 * abs(lean)))
    return 1.0 - 0.5 * np.exp(-(rows[:, None] ** 2) - columns[None, :] ** 2)


def over(layer: Image.Image, shade: Image.Image, depth: float) -> tuple[np.ndarray, np.ndarray]:
    """Reduce the layers of a canvas to the image: shaded colours times cover [h, w, 3] and cover [h, w, 1], float32.

    depth: contrast of the shading, 0 none, 1 full.
    """
    small = np.asarray(layer.reduce(OVER), dtype=np.float32)
    soft = shade.reduce(OVER).filter(ImageFilter.GaussianBlur(max(0.4, shade.size[1] / OVER / 200)))
    light = 1.0 + (np.asarray(soft, dtype=np.float32) / 128.0 - 1.0) * depth
    cover = small[..., 3:] * (1.0 / 255.0)
    return small[..., :3] * light[..., None] * cover, cover
