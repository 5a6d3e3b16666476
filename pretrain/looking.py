"""What a backbone sees in some images: pictures, their numbers, and a sentence each.

Nothing here draws a random number from a global generator, or changes the backbone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain import components as principal_components
from pretrain import drawings, views
from pretrain.attention import look, strongest
from pretrain.backbone import Backbone
from pretrain.photometric import normalize
from recipes.errors import UserError
from recipes.progress import Meter

BATCH = 16  # images of one forward pass
MASS = 0.6  # of the attention that the third column of attention.png holds


class Eye(NamedTuple):
    """A backbone in eval mode and what its images must be like."""

    backbone: Backbone
    mean: Sequence[float]  # in 0..1
    std: Sequence[float]
    size: tuple[int, int]  # height, width in pixels

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch = self.backbone.arguments["patch_size"]
        return self.size[0] // patch, self.size[1] // patch

    def fit(self, pixels: np.ndarray) -> np.ndarray:
        """A whole image uint8 [H, W, 3], squeezed to the size."""
        return views.crop(pixels, (0, 0, pixels.shape[1], pixels.shape[0], 0), self.size)

    def see(self, images: np.ndarray, meter: Meter | None = None) -> tuple[Tensor, Tensor]:
        """Patch tokens float32 [B, N, D] after the final norm, and the attention of CLS, float32 [B, heads, gh, gw], on
        the host. images: uint8 [B, H, W, 3] of the size. meter: counts them."""
        device = next(self.backbone.parameters()).device
        tokens, maps = [], []
        for at in range(0, len(images), BATCH):
            batch = torch.from_numpy(images[at : at + BATCH]).to(device)
            seen, attention = look(self.backbone, normalize(batch, self.mean, self.std))
            tokens.append(seen.patches.float().cpu())
            maps.append(attention.cpu())
            if meter is not None:
                meter.advance(len(batch))
        found = torch.cat(tokens), torch.cat(maps)
        if not all(bool(torch.isfinite(part).all()) for part in found):
            raise UserError("the features of this backbone are not finite: nothing can be drawn; take another one")
        return found

    def look_at(self, images: dict[int, np.ndarray]) -> "Looked":
        """Whole images, by row."""
        pixels = np.stack([self.fit(image) for image in images.values()])
        return Looked(images, pixels, *self.see(pixels))


class Looked(NamedTuple):
    """Some images and what is seen in them."""

    images: dict[int, np.ndarray]  # by row, as they came, uint8 [H, W, 3]
    pixels: np.ndarray  # uint8 [B, H, W, 3], squeezed to the size
    tokens: Tensor  # of `Eye.see`
    maps: Tensor

    @property
    def rows(self) -> list[int]:
        """Of the images."""
        return list(self.images)


class Seen(NamedTuple):
    """One picture."""

    image: Image.Image
    numbers: dict[str, Any]  # JSON-able
    sentence: str  # what it shows and its most telling number; also a text for those who cannot see it


def attention(looked: Looked, heads: Sequence[int] | None = None) -> Seen:
    """Maps of CLS. heads: which are drawn, counted from 0; None: all."""
    images, maps = looked.pixels, looked.maps
    mean = maps.mean(1)
    chosen = strongest(mean, MASS)
    share = float(chosen.double().mean())
    shown = range(maps.shape[1]) if heads is None else heads
    image = drawings.attention_picture(images, maps.numpy(), chosen.numpy(), shown, MASS)
    flat = maps.double().flatten(2)
    inside = flat / flat.sum(-1, keepdim=True).clamp(min=1e-12)
    used = torch.exp(-torch.xlogy(inside, inside).sum(-1))  # exp of the entropy: as if spread over so many patches
    numbers = {
        "heads": maps.shape[1],
        "mass": MASS,
        "patches_with_mass": share,  # share of the patches; mass itself would be an even spread
        "patches_used_by_head": (used / flat.shape[-1]).mean(0).tolist(),  # in 1 / N..1
        "on_patches_by_head": flat.sum(-1).mean(0).tolist(),  # the rest is on CLS and registers
    }
    told = (
        f"attention of CLS in {len(images)} images, {maps.shape[1]} heads: {MASS:.0%} of their mean lies on "
        f"{share:.0%} of the patches"
    )
    return Seen(image, numbers, told)


def components(looked: Looked) -> Seen:
    """Principal components of the patch tokens of all the images; D >= 3."""
    images = looked.pixels
    found = principal_components.principal(looked.tokens)
    colours = principal_components.colours(found.values).unflatten(1, looked.maps.shape[2:]).numpy()
    shares = found.shares.tolist()
    numbers = {"variance_shares": shares, "variance_between_images": found.between}
    told = (
        f"the first three principal components of the patch tokens of {len(images)} images hold {sum(shares):.0%} of "
        f"their variance; {found.between:.0%} of it is between the images"
    )
    return Seen(drawings.components_picture(images, colours, shares), numbers, told)
