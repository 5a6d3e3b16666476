"""A baseline without learning: colour histograms of horizontal stripes.

What clothing colour alone finds; a learned feature that does not beat it has learned nothing about people.
"""

from collections.abc import Iterable

import numpy as np
from PIL import Image
from pydantic import Field

from recipes.load import Section


class HistogramConfig(Section):
    """Resolution of the histogram."""

    stripes: int = Field(8, ge=1, le=64)  # horizontal bands from head to feet
    hue: int = Field(8, ge=1, le=256)  # bins
    saturation: int = Field(4, ge=1, le=256)  # bins
    value: int = Field(4, ge=1, le=256)  # bins


STRIPE_HEIGHT, WIDTH = 8, 32  # pixels that each stripe is reduced to before counting


def histogram_feature(image: Image.Image, config: HistogramConfig) -> np.ndarray:
    """Joint hue-saturation-value histogram of each stripe, float32 [stripes * hue * saturation * value].

    Square roots of frequencies (Hellinger), divided so that the whole has length 1: the inner product of two features
    is the mean Bhattacharyya coefficient of their stripes, in 0..1.
    """
    small = image.convert("RGB").resize((WIDTH, STRIPE_HEIGHT * config.stripes), Image.Resampling.BOX)
    bins = np.array([config.hue, config.saturation, config.value])
    hue, saturation, value = np.moveaxis(np.asarray(small.convert("HSV")).astype(np.int64) * bins // 256, 2, 0)
    if config.saturation > 1:
        hue = np.where(saturation == 0, 0, hue)  # the hue of grey is noise
    code = (hue * config.saturation + saturation) * config.value + value  # [H, W], bin of each pixel
    size = int(bins.prod())
    stripe = np.repeat(np.arange(config.stripes), STRIPE_HEIGHT)[:, None]
    counts = np.bincount((stripe * size + code).ravel(), minlength=config.stripes * size)
    return np.sqrt(counts / code.size).astype(np.float32)


def histogram_features(images: Iterable[Image.Image], config: HistogramConfig | None = None) -> np.ndarray:
    """Features of decoded images of any size and mode, float32 [N, D], each of length 1."""
    config = config or HistogramConfig()
    rows = [histogram_feature(image, config) for image in images]
    width = config.stripes * config.hue * config.saturation * config.value
    return np.stack(rows) if rows else np.empty((0, width), np.float32)
