"""Random patches: a piece of another person laid over an image, as somebody who stands in front (Zhou et al. 2019,
arXiv 1905.00953, random patch; MDPR, arXiv 2401.06430).

Published is a pool of up to 1,000 pieces of images that a loading process has seen: what it holds depends on how many
such processes there are and on what they did before. Here the piece comes from an image of the training set that the
sample's own random numbers choose, which is the same law with a pool of all images, from the first sample on, and the
same picture after a kill and with any number of processes.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from recipes.load import Section

TRIES = 100  # rectangles drawn until one fits
Donor = Callable[[np.random.Generator], Image.Image]  # another training image


class RandomPatchConfig(Section):
    """The published values."""

    probability: float = Field(0.5, ge=0, le=1)  # of a patch on an image
    flip: float = Field(0.5, ge=0, le=1)  # probability that the patch is mirrored
    area: tuple[float, float] = (0.01, 0.5)  # of the image, in 0..1
    aspect: tuple[float, float] = (0.1, 10.0)  # height / width, > 0, log-uniform

    @model_validator(mode="after")
    def _ranges(self) -> "RandomPatchConfig":
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area must be 0 < low <= high <= 1, not {self.area}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect must be 0 < low <= high, not {self.aspect}")
        return self


def rectangle(
    height: int, width: int, config: RandomPatchConfig, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Top, left, height and width of a piece that is smaller than an image of that size both ways; None: none fits."""
    low, high = (math.log(value) for value in config.aspect)
    for _ in range(TRIES):
        area = rng.uniform(*config.area) * height * width
        ratio = math.exp(rng.uniform(low, high))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return None


def piece(image: Image.Image, at: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Part of an image resized to `size` (height, width), uint8 [h, w, 3]; only that part is resized.

    at: top, left, height, width in pixels of the resized image.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")
    (top, left, height, width), (rows, columns) = at, size
    down, right = image.height / rows, image.width / columns
    box = (left * right, top * down, min((left + width) * right, image.width), min((top + height) * down, image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


class RandomPatch:
    """Picklable and without state: all randomness comes with the call."""

    def __init__(self, config: RandomPatchConfig, size: tuple[int, int]):
        """size: height, width of the images, pixels."""
        self.config, self.size = config, size

    def draw(self, donor: Donor, rng: np.random.Generator) -> tuple[slice, slice, np.ndarray] | None:
        """Rows and columns to cover and the pixels for them, uint8 [h, w, 3]; None where there shall be no patch."""
        if rng.random() >= self.config.probability:
            return None
        found = rectangle(*self.size, self.config, rng)
        if found is None:
            return None
        pixels = piece(donor(rng), found, self.size)
        if rng.random() < self.config.flip:
            pixels = pixels[:, ::-1]
        height, width = pixels.shape[:2]
        top = int(rng.integers(self.size[0] - height + 1))
        left = int(rng.integers(self.size[1] - width + 1))
        return slice(top, top + height), slice(left, left + width), pixels
