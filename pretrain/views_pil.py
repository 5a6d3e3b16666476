"""The reference of the pixels of a view (`views.backend: pil`): torchvision's operations on Pillow images, one by one.

Same boxes and same random numbers as the fast way in views.py and photometric.py, for runs that must be comparable
with published code, and for the tests that hold the fast way to it. About ten times slower.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as TF

from pretrain.photometric import Changes
from pretrain.views import Size

OPERATIONS = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
}


def crop(image: np.ndarray, box: Sequence[int], size: Size) -> np.ndarray:
    """As views.crop."""
    left, top, width, height, flip = box
    # resize(box=...) would let pixels outside the box into the border
    part = Image.fromarray(image).crop((left, top, left + width, top + height))
    part = part.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(ImageOps.mirror(part) if flip else part)


def apply(pixels: np.ndarray, changes: Changes) -> np.ndarray:
    """As photometric.apply."""
    image = Image.fromarray(pixels)
    for name in changes.order:
        factor = getattr(changes, name)
        if factor != (0 if name == "hue" else 1):  # torchvision leaves out an operation of width 0
            image = OPERATIONS[name](image, factor)
    if changes.gray:
        image = TF.rgb_to_grayscale(image, 3)
    if changes.sigma > 0:
        image = image.filter(ImageFilter.GaussianBlur(changes.sigma))
    if changes.solarize:
        image = ImageOps.solarize(image, 128)
    return np.asarray(image)
