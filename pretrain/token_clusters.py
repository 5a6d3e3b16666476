"""What the prototypes stand for: the patches that choose the same one, over many images (figure 4 of PersonViT).

Each patch token goes to the one of K prototypes with its highest patch logit, as in iBOT (arXiv 2111.07832). Nobody
has told the network of parts of a body; a mosaic that shows one part is what it found by itself.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.heads import Head, HeadsConfig, logits
from recipes.errors import UserError

DARK = 40  # mean V (the largest of R, G, B; 0..255) of a patch up to which it counts as black and is left out


def head_from(tensors: Mapping[str, Tensor], where: str) -> Head:
    """The projection head of these tensors, by the names of heads.Head (see `exporting.head_of`); UserError otherwise.

    where: for the error.
    """
    widths = sorted(
        (int(name.split(".")[1]), tensor)
        for name, tensor in tensors.items()
        if name.startswith("mlp.") and name.endswith(".weight") and name.split(".")[1].isdigit()
    )
    last = tensors.get("last_layer.weight_v")
    try:
        if not widths or last is None:
            raise KeyError("mlp.0.weight or last_layer.weight_v is missing")
        (out_dim, bottleneck), (hidden, dim) = last.shape, widths[0][1].shape
        config = HeadsConfig(
            **{"out_dim": out_dim, "bottleneck_dim": bottleneck, "layers": len(widths)},
            **{"hidden_dim": hidden, "shared": "last_layer2.weight_v" not in tensors},
        )
        with torch.device("meta"):  # the fresh weights would be thrown away
            head = Head(dim, config)
        head.load_state_dict(dict(tensors), assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"the projection head of {where} is not one of DINO or iBOT ({told})") from error
    return head.requires_grad_(False).eval()


@torch.no_grad()
def assign(head: Head, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Prototype with the highest logit of each patch token [..., N, D]: int64 [..., N] in 0..K-1, and that logit,
    float32 in [-1, 1] times the prototype's length."""
    best = logits(head.bottleneck(patches), head.prototypes()[1]).max(dim=-1)
    return best.indices, best.values


def brightness(images: Tensor, patch: int) -> Tensor:
    """Mean V of HSV of each patch, float32 [B, N] in 0..255. images: uint8 [B, H, W, 3], sides multiples of `patch`."""
    values = images.amax(-1).float()
    blocks = values.unflatten(1, (-1, patch)).unflatten(3, (-1, patch))  # [B, gh, patch, gw, patch]
    return blocks.mean((2, 4)).flatten(1)


class Cluster(NamedTuple):
    """One prototype and its best patches."""

    prototype: int
    patches: int  # of all images that chose it, black ones left out
    images: int  # that hold one of these
    best: list[tuple[int, int, float]]  # image, patch, logit; highest logit first, at most one patch an image


def clusters(chosen: Tensor, values: Tensor, bright: Tensor, count: int, members: int) -> list[Cluster]:
    """The `count` prototypes with the most patches, the fullest first; of each up to `members` patches.

    chosen, values: of `assign`, [M, N] of M images. bright: of `brightness`, [M, N]; patches up to DARK are left out.
    Of equal counts the lower prototype comes first, of equal logits the earlier image and patch.
    """
    image_of = torch.arange(len(chosen))[:, None].expand_as(chosen)
    patch_of = torch.arange(chosen.shape[1]).expand_as(chosen)
    kept = bright > DARK
    chosen, values, image_of, patch_of = (part[kept] for part in (chosen, values, image_of, patch_of))
    counts = torch.bincount(chosen) if len(chosen) else torch.zeros(0, dtype=torch.int64)
    found = []
    for prototype in counts.sort(descending=True, stable=True).indices[:count].tolist():
        if not counts[prototype]:
            break
        own = (chosen == prototype).nonzero().flatten()
        own = own[values[own].sort(descending=True, stable=True).indices]
        best: dict[int, tuple[int, int, float]] = {}
        for place in own.tolist():
            image = int(image_of[place])
            best.setdefault(image, (image, int(patch_of[place]), float(values[place])))
        found.append(Cluster(prototype, len(own), len(best), list(best.values())[:members]))
    return found
