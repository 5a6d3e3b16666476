"""Multi-crop geometry for upright people, on the CPU: where to crop, resize, flip.

Two global and L local crops (DINO, arXiv 2104.14294); for person crops the aspect ratio is centred on 2:1 and the scale
ranges of global and local crops overlap (PersonViT, arXiv 2408.05398).
"""

import math
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from recipes.load import Section

Size = tuple[int, int]  # height, width in pixels
Range = tuple[float, float]
Box = tuple[int, int, int, int]  # left, top, width, height in pixels of the source image
TRIES = 10  # boxes drawn until one fits
# places of a view in the sample's table of random numbers: areas, ratios, left, top, flip; then photometric.py
LEFT, TOP, FLIP = range(2 * TRIES, 2 * TRIES + 3)
NUMBERS = 2 * TRIES + 3


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
    backend: Literal["fast", "pil"] = "fast"  # who makes the pixels; pil: the reference, ten times slower, for parity

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


def crop_box(u: Sequence[float], width: int, height: int, scale: Range, ratio: Range) -> Box:
    """left, top, width, height of a random crop. u: NUMBERS numbers, uniform in [0, 1).

    Area uniform in `scale`, aspect log-uniform in `ratio`; ten tries to fit, then the largest centred crop of a legal
    ratio (the algorithm known as RandomResizedCrop; Szegedy et al. 2014).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for turn in range(TRIES):
        area = (scale[0] + u[turn] * (scale[1] - scale[0])) * width * height
        aspect = math.exp(low + u[TRIES + turn] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[LEFT] * (width - w + 1)), int(u[TOP] * (height - h + 1)), w, h
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, round(w / ratio[0]))
    elif width / height > ratio[1]:
        w = min(width, round(h * ratio[1]))
    return (width - w) // 2, (height - h) // 2, w, h


def draw_box(u: Sequence[float], image: np.ndarray, local: bool, config: ViewsConfig) -> tuple[int, int, int, int, int]:
    """Box and flip (0 or 1) of one view of an image uint8 [H, W, 3]."""
    height, width = image.shape[:2]
    if local:
        box = crop_box(u, width, height, config.local_scale, config.local_ratio or config.ratio)
    else:
        box = crop_box(u, width, height, config.global_scale, config.ratio)
    return *box, int(u[FLIP] < config.flip)


def crop(image: np.ndarray, box: Sequence[int], size: Size) -> np.ndarray:
    """Cut out, resize, flip: uint8 [H, W, 3] -> uint8 [height, width, 3]. box: left, top, width, height, flip.

    Bicubic and without aliasing when it shrinks: Pillow's algorithm, which torch has with vector instructions.
    """
    left, top, w, h, flip = box
    part = image[None, top : top + h, left : left + w].copy()  # so that the image ends at the box
    resized = F.interpolate(torch.from_numpy(part).permute(0, 3, 1, 2), size, mode="bicubic", antialias=True)
    pixels = resized.permute(0, 2, 3, 1).numpy()[0]
    return cv2.flip(pixels, 1) if flip else pixels
