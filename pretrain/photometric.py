"""Colour, blur, solarise, normalise: drawn for each crop on the CPU, applied to the whole batch on the device.

Brightness, contrast, saturation and hue are affine in RGB once the mean of the crop is known, and without clipping in
between they commute, so all four and the grayscale are one 3x3 matrix and an offset. Against doing them one by one on
8-bit images this leaves out the rounding and clipping in between, and turns the hue in YIQ, not HSV.
"""

import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from recipes.load import Section

GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma
# places in the photometric numbers of a crop
BRIGHTNESS, CONTRAST, SATURATION, HUE, TO_GRAY, SIGMA, SOLARIZE = range(7)
NUMBERS = 7


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


def draw(rng: np.random.Generator, kind: int, config: PhotometricConfig) -> np.ndarray:
    """The photometric numbers of one crop, float32 [7]. kind: 0 global view 1, 1 global view 2, 2 local."""
    u = rng.random(9)
    numbers = np.array([1, 1, 1, 0, 0, 0, 0], dtype=np.float32)
    if u[0] < config.jitter:
        widths = (config.brightness, config.contrast, config.saturation, config.hue)
        numbers[:4] += (2 * u[1:5] - 1) * widths
    numbers[TO_GRAY] = u[5] < config.gray
    if u[6] < config.blur[kind]:
        numbers[SIGMA] = config.blur_sigma[0] + u[7] * (config.blur_sigma[1] - config.blur_sigma[0])
    numbers[SOLARIZE] = u[8] < config.solarize[kind]
    return numbers


def _hue_matrix(turn: Tensor) -> Tensor:
    """Rotation of the chrominance plane by `turn` [B] full turns, as a matrix on RGB [B, 3, 3]; > 0: red to yellow."""
    to_yiq = torch.tensor([GRAY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)], device=turn.device)
    cos, sin = torch.cos(2 * math.pi * turn), torch.sin(2 * math.pi * turn)
    zero, one = torch.zeros_like(turn), torch.ones_like(turn)
    rotation = torch.stack([one, zero, zero, zero, cos, sin, zero, -sin, cos], -1).view(-1, 3, 3)
    return torch.linalg.inv(to_yiq) @ rotation @ to_yiq


def colour_transform(numbers: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix [B, 3, 3] and offset [B, 3] of all colour operations of each crop.

    numbers: [B, 7]. mean: [B, 3] mean colour of each crop in [0, 1]; contrast pulls towards its luma.
    """
    luma = torch.tensor(GRAY, device=mean.device)
    eye = torch.eye(3, device=mean.device)
    to_gray = luma.expand(3, 3)
    scale = numbers[:, :3, None, None]
    saturation = scale[:, SATURATION] * eye + (1 - scale[:, SATURATION]) * to_gray
    matrix = scale[:, BRIGHTNESS] * scale[:, CONTRAST] * saturation @ _hue_matrix(numbers[:, HUE])
    # saturation and hue keep luma, so the mean luma that contrast pulls towards is that of the brightened crop
    offset = ((1 - numbers[:, CONTRAST]) * numbers[:, BRIGHTNESS] * (mean @ luma))[:, None].expand(-1, 3)
    return torch.where(numbers[:, TO_GRAY, None, None] > 0, to_gray @ matrix, matrix), offset


def _blur_matrix(size: int, sigma: Tensor) -> Tensor:
    """Gaussian blur along one axis as a matrix [B, size, size]; rows are renormalised at the border."""
    at = torch.arange(size, device=sigma.device)
    distance = (at[:, None] - at[None]).float() ** 2
    weights = torch.exp(-distance / (2 * sigma.clamp(min=1e-2)[:, None, None] ** 2))
    return weights / weights.sum(-1, keepdim=True)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of images [B, 3, H, W], each with its own sigma [B] in pixels (0 = untouched)."""
    rows, columns = _blur_matrix(images.shape[2], sigma), _blur_matrix(images.shape[3], sigma)
    return rows[:, None] @ images @ columns[:, None].transpose(-1, -2)


def apply(crops: Tensor, numbers: Tensor, config: PhotometricConfig) -> Tensor:
    """uint8 crops [B, H, W, 3] with their numbers [B, 7] -> normalised float32 images [B, 3, H, W]."""
    images = crops.permute(0, 3, 1, 2).float().div_(255)
    matrix, offset = colour_transform(numbers, images.mean(dim=(2, 3)))
    images = torch.baddbmm(offset[:, :, None], matrix, images.flatten(2)).clamp_(0, 1).view_as(images)
    if max(config.blur) > 0:
        if images.is_cuda:  # picking the blurred ones would make the host wait for the device
            images = blur(images, numbers[:, SIGMA])
        else:
            chosen = numbers[:, SIGMA].nonzero().squeeze(1)
            images[chosen] = blur(images[chosen], numbers[chosen, SIGMA])
    if max(config.solarize) > 0:
        invert = (numbers[:, SOLARIZE, None, None, None] > 0) & (images >= 128 / 255)
        images = torch.where(invert, 1 - images, images)
    return normalize(images, config.mean, config.std)


def normalize(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """(x - mean) / std by channel; images [B, 3, H, W] in [0, 1]."""
    shift = torch.tensor(mean, device=images.device).view(3, 1, 1)
    return (images - shift) / torch.tensor(std, device=images.device).view(3, 1, 1)
