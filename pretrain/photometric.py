"""Colour, blur, solarise (DINO, iBOT) on the CPU with OpenCV; normalise on the device.

The reference is views_pil.py: torchvision on Pillow images, one operation after the other with 8 bits in between. Here
is the cheapest form whose pixels have the same distribution (tests/test_views_parity.py says how closely).
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import cv2
import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from recipes.load import Section

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
# places of a view in its random numbers
JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, BLUR, SIGMA, SOLARIZE = range(10)
NUMBERS = 10
ORDERS = tuple(itertools.permutations(("brightness", "contrast", "saturation", "hue")))
# turns rounding into rounding down, as Pillow's blending does; less than half, so that whole numbers stay
DOWN = -0.499


Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(gt=0)]


class PhotometricConfig(Section):
    """Photometric augmentation of DINO and iBOT; probabilities in [0, 1]."""

    jitter: float = Field(0.8, ge=0, le=1)  # probability of the colour jitter
    brightness: float = Field(0.4, ge=0, le=1)  # factor from U(1 - x, 1 + x)
    contrast: float = Field(0.4, ge=0, le=1)
    saturation: float = Field(0.2, ge=0, le=1)
    hue: float = Field(0.1, ge=0, le=0.5)  # share of a full turn, from U(-x, x)
    gray: float = Field(0.2, ge=0, le=1)
    blur: tuple[Share, Share, Share] = (1.0, 0.1, 0.5)  # probability for global view 1, global view 2, local views
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize: tuple[Share, Share, Share] = (0.0, 0.2, 0.0)  # global 1, global 2, local; threshold 128 of 255
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of ImageNet, in 0..1
    std: tuple[Spread, Spread, Spread] = (0.229, 0.224, 0.225)  # > 0


class Changes(NamedTuple):
    """What happens to one crop, in this order."""

    order: tuple[str, ...]  # of the four operations of the colour jitter; empty: no jitter
    brightness: float  # factors, 1 changes nothing
    contrast: float
    saturation: float
    hue: float  # share of a turn, 0 changes nothing
    gray: bool
    sigma: float  # of the blur, pixels; 0: none
    solarize: bool


def draw(u: Sequence[float], kind: int, config: PhotometricConfig) -> Changes:
    """The changes of one crop. u: NUMBERS numbers, uniform in [0, 1).

    kind: 0 global view 1, 1 global view 2, 2 local.
    """
    low, high = config.blur_sigma
    return Changes(
        order=ORDERS[int(u[ORDER] * len(ORDERS))] if u[JITTER] < config.jitter else (),
        brightness=1 + (2 * u[BRIGHTNESS] - 1) * config.brightness,
        contrast=1 + (2 * u[CONTRAST] - 1) * config.contrast,
        saturation=1 + (2 * u[SATURATION] - 1) * config.saturation,
        hue=(2 * u[HUE] - 1) * config.hue,
        gray=u[GRAY] < config.gray,
        sigma=low + u[SIGMA] * (high - low) if u[BLUR] < config.blur[kind] else 0.0,
        solarize=u[SOLARIZE] < config.solarize[kind],
    )


def mix(pixels: np.ndarray, brightness: float, saturation: float, hue: float) -> np.ndarray:
    """Brightness, saturation and hue in one matrix.

    The hue is turned about the axis of grays (> 0: from red to yellow). A least-squares fit of a matrix to the turn in
    HSV, which torchvision does, gives the same to the second digit. Strong colours differ: HSV keeps the largest of the
    three values, this their sum.
    """
    strength, gray = brightness * saturation / 3, brightness * (1 - saturation)
    cos, sin = strength * math.cos(2 * math.pi * hue), math.sqrt(3) * strength * math.sin(2 * math.pi * hue)
    same, after, before = strength + 2 * cos, strength - cos - sin, strength - cos + sin
    r, g, b = gray * LUMA[0], gray * LUMA[1], gray * LUMA[2]
    offset = DOWN * ((brightness != 1) + (saturation != 1))
    matrix = (
        (same + r, after + g, before + b, offset),
        (before + r, same + g, after + b, offset),
        (after + r, before + g, same + b, offset),
    )
    return cv2.transform(pixels, np.array(matrix))


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Away from (factor > 1) or towards the mean luma of the crop, rounded to a whole number."""
    r, g, b, _ = cv2.mean(pixels)
    middle = round(LUMA[0] * r + LUMA[1] * g + LUMA[2] * b)
    return cv2.addWeighted(pixels, factor, pixels, 0, (1 - factor) * middle + DOWN)


def jitter(pixels: np.ndarray, changes: Changes) -> np.ndarray:
    """The colour jitter, values clipped once on the way.

    Clipping after each of the four operations would not show: it matters between brightness and contrast, which both
    drive values out of 0..255.
    """
    if changes.order.index("contrast") < changes.order.index("brightness"):
        pixels = contrast(pixels, changes.contrast)
        return mix(pixels, changes.brightness, changes.saturation, changes.hue)
    pixels = mix(pixels, changes.brightness, changes.saturation, changes.hue)
    return contrast(pixels, changes.contrast)


@functools.lru_cache(maxsize=1024)
def blur_kernel(sigma: float) -> np.ndarray:
    """Pillow's Gaussian blur as one kernel float32 [n]: three box filters with fractional ends, of variance sigma^2.

    Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box Filtering, 2011.
    """
    variance = sigma * sigma / 3
    inner = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance) / (6 * (variance - (inner + 1) ** 2))
    box = np.array([end, *[1.0] * (2 * inner + 1), end]) / (2 * inner + 1 + 2 * end)
    kernel = np.convolve(box, np.convolve(box, box))
    kernel = kernel[kernel > 1 / 512]  # smaller ones cannot change an 8-bit value
    return (kernel / kernel.sum()).astype(np.float32)


def blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur; sigma in pixels, rounded to a hundredth, > 0."""
    kernel = blur_kernel(round(sigma, 2))
    return cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def apply(pixels: np.ndarray, changes: Changes) -> np.ndarray:
    """The changes of one crop uint8 [H, W, 3], RGB."""
    if changes.order:
        pixels = jitter(pixels, changes)
    if changes.gray:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    if changes.sigma > 0:
        pixels = blur(pixels, changes.sigma)
    if changes.solarize:  # values from 128 on are inverted: of a value and its inverse, it is always the smaller
        pixels = cv2.min(pixels, cv2.bitwise_not(pixels))
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB) if changes.gray else pixels


def normalize(crops: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """uint8 crops [B, H, W, 3] -> (x / 255 - mean) / std by channel, float32 [B, 3, H, W], channels last in memory."""
    width = crops.shape[2]
    shift, scale = (torch.tensor(values, device=crops.device).repeat(width) for values in (mean, std))
    # a row of pixels at a time: the colours alone, three values long, would leave the vector units idle
    images = crops.flatten(2).float().mul_(1 / (255 * scale)).sub_(shift / scale)
    return images.unflatten(2, (width, 3)).permute(0, 3, 1, 2)
