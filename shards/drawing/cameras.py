"""What a camera does to a picture: viewpoint, colour cast, light, blur, noise and JPEG."""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from shards.seeds import generator

_BANK = 1 << 20  # random numbers kept for noise; drawing them for every image would cost more than the body


@dataclass(frozen=True)
class Camera:
    """A camera; the values of strength 0 are the same for all of them."""

    elevation: float  # rad, looks down
    perspective: float  # how much larger the near (upper) end of the body is
    fill: float  # body height as a share of the image height
    gains: tuple[float, float, float]  # white balance, multiplies red, green, blue
    gain: float  # exposure
    gamma: float
    contrast: float
    slope: float  # light from one side, -1 to 1
    light: float  # side of the shading of bodies, -1 left or 1 right
    depth: float  # contrast of that shading
    blur: float  # sigma as a share of the image height
    noise: float  # sigma, in bytes
    quality: int  # JPEG, 1 to 95
    facing: float  # rad, the way most people walk
    habit: float  # share of the people who walk that way


@lru_cache(maxsize=512)
def camera(seed: int, camid: int, strength: float) -> Camera:
    """The camera camid. strength: 0 all cameras are alike, 1 they differ much."""
    g = generator(seed, "figures camera", camid)
    n = g.normal(0.0, 1.0, 12) * strength
    u = g.uniform(0.0, 1.0, 6) * strength
    sides = g.random(2)
    gains = np.exp(0.08 * (n[:3] - n[:3].mean()))
    return Camera(
        elevation=0.1 + 0.4 * float(u[0]),
        perspective=0.06 + 0.3 * float(u[1]),
        fill=0.9 - 0.1 * float(u[2]),
        gains=tuple(float(v) for v in gains),
        gain=float(np.exp(0.2 * np.clip(n[3], -1.6, 1.6))),
        gamma=float(np.exp(0.2 * np.clip(n[4], -1.6, 1.6))),
        contrast=float(1.0 + 0.18 * np.clip(n[5], -1.6, 1.6)),
        slope=float(0.3 * np.clip(n[6], -1.6, 1.6)),
        light=1.0 if strength and sides[0] < 0.5 else -1.0,
        depth=0.75 + 0.25 * float(np.clip(n[7], -1.6, 1.0)),
        blur=0.0008 + 0.006 * float(u[3]) ** 2,
        noise=2.0 + 8.0 * float(u[4]) ** 2,
        quality=round(92 - 45 * float(u[5])),
        facing=float(sides[1] * 2 * np.pi),
        habit=0.4 * strength,
    )


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    return generator(0, "figures noise").standard_normal(_BANK, dtype=np.float32)


def expose(picture: np.ndarray, cam: Camera, variation: float, g: np.random.Generator) -> Image.Image:
    """Take the picture float32 [h, w, 3] in [0, 255] with a camera.

    variation: how much light, cast and sharpness change from image to image, 0 not at all, 1 strongly.
    """
    h, w = picture.shape[:2]
    n = np.clip(g.normal(0.0, 1.0, 10), -2.0, 2.0) * variation
    gains = np.array(cam.gains) * np.exp(0.05 * (n[:3] - n[:3].mean())) * cam.gain * np.exp(0.18 * n[3] - 0.06)
    gamma = cam.gamma * np.exp(0.16 * n[4])
    contrast = max(0.4, cam.contrast * (1.0 + 0.14 * n[5]))
    across = 1.0 + (cam.slope + 0.16 * n[6]) * np.linspace(-1, 1, w, dtype=np.float32)
    down = 1.0 + 0.16 * n[7] * np.linspace(-1, 1, h, dtype=np.float32)
    grey = picture @ np.array([0.3, 0.59, 0.11], dtype=np.float32)
    colourful = np.float32(np.clip(1.0 + 0.18 * n[8], 0.5, 1.5))
    picture = grey[..., None] + (picture - grey[..., None]) * colourful
    picture *= (across[None, :] * down[:, None])[..., None].astype(np.float32)
    start = int(g.integers(_BANK - picture.size))
    sigma = cam.noise * float(g.uniform(0.6, 1.4))
    picture += sigma * _noise()[start : start + picture.size].reshape(picture.shape)
    np.clip(picture, 0, 255, out=picture)
    level = np.arange(256) / 255.0
    curve = np.clip(gains[:, None] * level[None, :], 0, 1) ** gamma
    table = np.clip(((curve - 0.45) * contrast + 0.45) * 255.0, 0, 255).astype(np.uint8)
    image = Image.fromarray(picture.astype(np.uint8)).point(table.ravel().tolist())
    blur = float(h * (cam.blur + 0.003 * abs(n[9])))
    return image.filter(ImageFilter.GaussianBlur(blur)) if blur > 0.25 else image


def encode(image: Image.Image, quality: int) -> bytes:
    """JPEG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
