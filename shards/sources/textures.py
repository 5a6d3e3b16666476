"""Pictures without a person, drawn on the spot: what a careless detector cuts out beside the people.

Stripes, noise of several scales, gradients, brick walls, leaves, and empty crops of the streets in which the figures
stand. Made to be mixed with `figures`, to see whether a selection of data finds the people. Every image is a pure
function of (seed, number).
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field

from recipes.load import Section
from shards.drawing.cameras import encode
from shards.drawing.scenes import occluder, plain, scenic
from shards.schema import Record
from shards.seeds import generator

QUALITY = 88  # JPEG
KINDS = ("stripes", "noise", "gradient", "bricks", "leaves", "street")


class Config(Section):
    """What is drawn."""

    seed: int = Field(0, ge=0)  # another seed gives other pictures
    count: int = Field(1000, ge=1)  # images
    first: int = Field(0, ge=0)  # number of the first image; sets with other numbers share nothing
    height: int = Field(256, ge=16, le=2048)  # pixels
    width: int = Field(128, ge=8, le=2048)  # pixels
    kinds: list[Literal["stripes", "noise", "gradient", "bricks", "leaves", "street"]] = Field(
        list(KINDS), min_length=1
    )
    streets: int = Field(200, ge=1)  # different streets


def records(config: Config) -> Iterator[Record]:
    """The images of the set, without labels; each is drawn when it is read."""
    for number in range(config.first, config.first + config.count):
        read = partial(render_bytes, config, number)
        yield Record(f"texture-{number:06d}", "unlabeled", read, origin=f"drawn texture {number}")


def _colours(g: np.random.Generator, count: int) -> np.ndarray:
    """float32 [count, 3]: a base colour and shades around it, one in three quite another colour."""
    base = g.uniform(40, 200) + g.normal(0, 25, 3)
    shades = base + g.normal(0, 45, (count, 1)) + g.normal(0, 12, (count, 3))
    other = g.random(count) < 0.3
    shades[other] = g.uniform(20, 235, (int(other.sum()), 3))
    return np.clip(shades, 0, 255).astype(np.float32)


def _smooth(g: np.random.Generator, height: int, width: int, cells: float) -> np.ndarray:
    """Noise of mean 0 and deviation about 1 in cells of `cells` pixels: float32 [height, width]."""
    shape = (max(2, math.ceil(height / cells) + 1), max(2, math.ceil(width / cells) + 1))
    coarse = Image.fromarray(g.normal(0, 1, shape).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _stripes(g: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Straight or wavy stripes in any direction."""
    angle, period = g.uniform(0, math.pi), w * g.uniform(0.06, 0.5)
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    bend = g.choice((0.0, 1.0)) * period * g.uniform(0.2, 0.8) * np.sin(across / (w * g.uniform(0.1, 0.4)))
    colours = _colours(g, int(g.integers(2, 5)))
    return colours[(np.floor((along + bend) / period + g.uniform(0, 9)).astype(int)) % len(colours)]


def _noise(g: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Clouds to grain: the sum of noise of several scales between two colours."""
    low, high = _colours(g, 2)
    scales = w * 2.0 ** -np.arange(0, 6)
    weights = scales ** g.uniform(0, 1.2)
    field = sum(k * _smooth(g, h, w, max(1.0, s)) for k, s in zip(weights, scales, strict=True))
    share = 1 / (1 + np.exp(-2 * (field - field.mean()) / (field.std() + 1e-6)))
    return low + (high - low) * share[..., None].astype(np.float32)


def _gradient(g: np.random.Generator, h: int, w: int) -> np.ndarray:
    """An empty wall or sky."""
    return plain(w, h, float(g.uniform(0.5, 2)), g)


def _bricks(g: np.random.Generator, h: int, w: int) -> np.ndarray:
    """A wall of bricks, tiles or planks."""
    base, joint = _colours(g, 2)
    high = max(2, round(h * g.uniform(0.03, 0.12)))
    wide = max(3, round(high * g.uniform(0.8, 4)))
    image = Image.new("RGB", (w, h), tuple(int(c) for c in joint))
    draw, gap = ImageDraw.Draw(image), max(1, round(high * 0.12))
    start = int(g.integers(wide))
    for line, top in enumerate(range(-int(g.integers(high)), h, high)):
        for left in range(-start - line % 2 * wide // 2 - wide, w, wide):
            tone = np.clip(base + g.normal(0, 10), 0, 255)
            box = (left, top, left + wide - gap - 1, top + high - gap - 1)
            draw.rectangle(box, fill=tuple(int(c) for c in tone))
    return np.asarray(image, dtype=np.float32)


def _leaves(g: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Bushes before a plain ground, some of them all over the picture."""
    back = plain(w, h, 1.0, g)
    for _ in range(int(g.integers(2, 6))):
        layer = np.asarray(occluder("bush", w, h, g).resize((w, h)), dtype=np.float32)
        if g.random() < 0.5:
            layer = layer[::-1]
        cover = layer[..., 3:] / 255
        back = back * (1 - cover) + layer[..., :3] * cover
    return back


def render(config: Config, number: int) -> Image.Image:
    """Draw an image: RGB, height x width of the config, before JPEG."""
    g = generator(config.seed, "textures", number)
    kind, h, w = config.kinds[int(g.integers(len(config.kinds)))], config.height, config.width
    if kind == "street":
        high = max(h, math.ceil(w / 2.5))  # a street is 2.6 times as wide as a picture is high
        picture = scenic(config.seed, int(g.integers(config.streets)), w, high, g)[:h]
    else:
        draw = {"stripes": _stripes, "noise": _noise, "gradient": _gradient, "bricks": _bricks, "leaves": _leaves}[kind]
        picture = draw(g, h, w)
    light = np.exp(0.15 * g.normal(0, 1, 3) * 0.4 + 0.2 * g.normal())
    picture = picture * light + g.normal(0, g.uniform(1, 6), picture.shape)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def render_bytes(config: Config, number: int) -> bytes:
    """Draw an image and encode it as JPEG."""
    return encode(render(config, number), QUALITY)
