"""Images to network input for fine-tuning: the weak augmentation of person re-identification, and the plain test view.

Train: resize bicubic -> flip -> pad with black, random crop -> normalise -> random erasing with noise (Zhong et al.
2017, arXiv 1708.04896, in timm's form: one rectangle, unit normal noise for each value) -> a random patch, if asked
for. No colour change: clothing colour is the cue. Test: resize *bilinear* -> normalise. The two kernels differ as in
the published code.
"""

import math
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from finetune.random_patch import Donor, RandomPatch, RandomPatchConfig
from recipes.load import Section

ERASE_TRIES = 10  # rectangles drawn until one fits; timm's number


class AugmentConfig(Section):
    """Geometry and values of the views."""

    height: int = Field(256, ge=8)  # pixels
    width: int = Field(128, ge=8)  # pixels
    flip: float = Field(0.5, ge=0, le=1)  # probability
    pad: int = Field(10, ge=0)  # black pixels on each side before the random crop; the largest shift
    test_kernel: Literal["bilinear", "bicubic"] = "bilinear"  # of resizing test images; bilinear as published
    erase: float = Field(0.5, ge=0, le=1)  # probability
    erase_area: tuple[float, float] = (0.02, 1 / 3)  # of the image, in 0..1
    erase_aspect: tuple[float, float] = (0.3, 1 / 0.3)  # height / width of the rectangle, > 0, log-uniform
    erase_with: Literal["noise", "mean"] = "noise"  # "mean": the grey that is 0 after normalisation, as fast-reid does
    random_patch: RandomPatchConfig | None = None  # {} switches it on, after the erasing; see random_patch.py
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of R, G, B in 0..1
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # > 0

    @model_validator(mode="after")
    def _ranges(self) -> "AugmentConfig":
        if not 0 < self.erase_area[0] <= self.erase_area[1] <= 1:
            raise ValueError(f"erase_area must be 0 < low <= high <= 1, not {self.erase_area}")
        if not 0 < self.erase_aspect[0] <= self.erase_aspect[1]:
            raise ValueError(f"erase_aspect must be 0 < low <= high, not {self.erase_aspect}")
        if self.pad >= min(self.height, self.width):
            raise ValueError(f"pad = {self.pad} must be below height and width, {self.height} x {self.width}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be > 0, not {self.std}")
        return self

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input, pixels."""
        return self.height, self.width


def shifted(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """The image [H, W, 3] moved by (down, right) pixels, either sign, black where it came from.

    The same as padding with zeros and cropping, without the larger copy.
    """
    height, width = pixels.shape[:2]
    moved = np.zeros_like(pixels)
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = pixels[
        max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return moved


def erase_rectangle(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> tuple[slice, slice] | None:
    """Rows and columns of the rectangle to erase, smaller than the image both ways; None when no draw fits."""
    for _ in range(ERASE_TRIES):
        size = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(size * ratio)), round(math.sqrt(size / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return slice(top, top + h), slice(left, left + w)
    return None


class Augment:
    """The two views. Picklable and without state: all randomness comes with the call."""

    def __init__(self, config: AugmentConfig):
        self.height, self.width = config.height, config.width
        self.flip, self.pad, self.erase = config.flip, config.pad, config.erase
        self.area, self.aspect, self.noise = config.erase_area, config.erase_aspect, config.erase_with == "noise"
        self.patch = RandomPatch(config.random_patch, config.size) if config.random_patch else None
        self.test_kernel = Image.Resampling[config.test_kernel.upper()]
        mean, std = np.float32(config.mean), np.float32(config.std)
        self.scale, self.offset = (1 / (255 * std))[:, None, None], (mean / std)[:, None, None]

    def _resized(self, image: Image.Image, kernel: Image.Resampling) -> np.ndarray:
        image = image if image.mode == "RGB" else image.convert("RGB")
        return np.asarray(image.resize((self.width, self.height), kernel))  # uint8 [H, W, 3]

    def _normalised(self, pixels: np.ndarray) -> np.ndarray:
        return pixels.transpose(2, 0, 1) * self.scale - self.offset  # float32 [3, H, W]

    def train_view(self, image: Image.Image, rng: np.random.Generator, donor: Donor | None = None) -> np.ndarray:
        """One random view of an image of any size, float32 [3, H, W]; the same rng state gives the same view.

        donor: gives other training images, where a random patch is asked for.
        """
        pixels = self._resized(image, Image.Resampling.BICUBIC)
        if rng.random() < self.flip:
            pixels = pixels[:, ::-1]
        if self.pad:
            down, right = rng.integers(-self.pad, self.pad + 1, size=2)
            pixels = shifted(pixels, int(down), int(right))
        view = np.ascontiguousarray(self._normalised(pixels))
        if rng.random() < self.erase:
            rectangle = erase_rectangle(self.height, self.width, self.area, self.aspect, rng)
            if rectangle:
                hole = view[:, *rectangle]
                hole[...] = rng.standard_normal(hole.shape, dtype=np.float32) if self.noise else 0
        if self.patch is not None:
            assert donor is not None
            covered = self.patch.draw(donor, rng)
            if covered:
                rows, columns, pixels = covered
                view[:, rows, columns] = self._normalised(pixels)
        return view

    def test_view(self, image: Image.Image) -> np.ndarray:
        """The view that is searched with, float32 [3, H, W]."""
        return np.ascontiguousarray(self._normalised(self._resized(image, self.test_kernel)))
