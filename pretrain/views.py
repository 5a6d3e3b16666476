"""Multi-crop geometry for upright people, on the CPU: where to crop, resize, flip.

Two global and L local crops (DINO, arXiv 2104.14294); for person crops the aspect ratio is centred on 2:1 and the scale
ranges of global and local crops overlap (PersonViT, arXiv 2408.05398).
"""

import math

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from recipes.load import Section

Size = tuple[int, int]  # height, width in pixels
Range = tuple[float, float]


class ViewsConfig(Section):
    """Crops of one image."""

    global_size: Size = (256, 128)  # height, width, pixels; two such crops, for teacher and student
    local_size: Size = (96, 64)  # height, width, pixels; for the student only
    local_count: int = Field(6, ge=0, le=32)  # L
    global_scale: Range = (0.4, 1.0)  # area of a crop / area of the image
    local_scale: Range = (0.05, 0.8)
    ratio: Range = (0.375, 0.6667)  # width / height of a crop, before resizing
    local_ratio: Range | None = None  # None: as `ratio`
    flip: float = Field(0.5, ge=0, le=1)  # probability

    @model_validator(mode="after")
    def _ranges(self) -> "ViewsConfig":
        for name in ("global_scale", "local_scale", "ratio", "local_ratio"):
            low, high = getattr(self, name) or (1, 1)
            if not 0 < low <= high or (name.endswith("scale") and high > 1):
                top = " <= 1" if name.endswith("scale") else ""
                raise ValueError(f"{name} must be 0 < low <= high{top}, not {(low, high)}")
        if min(*self.global_size, *self.local_size) < 1:
            raise ValueError(f"sizes must be positive, not {self.global_size} and {self.local_size}")
        return self


def crop_box(
    rng: np.random.Generator, width: int, height: int, scale: Range, ratio: Range
) -> tuple[int, int, int, int]:
    """left, top, width, height of a random crop.

    Area uniform in `scale`, aspect log-uniform in `ratio`; ten tries to fit, then the largest centred crop of a legal
    ratio (the algorithm known as RandomResizedCrop; Szegedy et al. 2014).
    """
    areas = rng.uniform(*scale, size=10) * (width * height)
    ratios = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), size=10))
    for area, aspect in zip(areas, ratios, strict=True):
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, round(w / ratio[0]))
    elif width / height > ratio[1]:
        w = min(width, round(h * ratio[1]))
    return (width - w) // 2, (height - h) // 2, w, h


def crop(image: Image.Image, box: tuple[int, int, int, int], size: Size, flip: bool) -> np.ndarray:
    """Cut `box` out, resize bicubically, flip left-right: uint8 [height, width, 3]."""
    left, top, w, h = box
    # resize(box=...) would let pixels outside the box into the border
    part = image.crop((left, top, left + w, top + h))
    pixels = np.asarray(part.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if flip else pixels


def global_view(image: Image.Image, rng: np.random.Generator, config: ViewsConfig) -> tuple[np.ndarray, np.ndarray]:
    """One global crop uint8 [H, W, 3] and its box int64 [5] (left, top, width, height, flipped)."""
    return _view(image, rng, config.global_size, config.global_scale, config.ratio, config.flip)


def local_view(image: Image.Image, rng: np.random.Generator, config: ViewsConfig) -> tuple[np.ndarray, np.ndarray]:
    """One local crop uint8 [h, w, 3] and its box int64 [5]."""
    return _view(image, rng, config.local_size, config.local_scale, config.local_ratio or config.ratio, config.flip)


def _view(
    image: Image.Image, rng: np.random.Generator, size: Size, scale: Range, ratio: Range, flip: float
) -> tuple[np.ndarray, np.ndarray]:
    box = crop_box(rng, image.width, image.height, scale, ratio)
    flipped = bool(rng.random() < flip)
    return crop(image, box, size, flipped), np.array([*box, flipped], dtype=np.int64)
