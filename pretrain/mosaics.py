"""Token clusters over many images, drawn as mosaics and counted."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from pretrain import drawings, token_clusters
from pretrain.chosen_crops import Crops, readable
from pretrain.heads import Head
from pretrain.looking import BATCH, Eye, Seen
from recipes.errors import UserError
from recipes.progress import Meter

SHOWN = 12  # clusters drawn
SIDE = 13 * drawings.WINDOW  # pixels of a window


def _assigned(eye: Eye, head: Head, crops: Crops, rows: Sequence[int]) -> tuple[list[int], list[torch.Tensor]]:
    """The rows that are sound, M of them; prototype, logit and brightness of their patches, [M, N] each."""
    device, patch = next(head.parameters()).device, eye.backbone.arguments["patch_size"]
    images, used, found = readable(crops, rows), [], []
    with Meter(len(rows), "clusters") as meter:
        while batch := dict(itertools.islice(images, BATCH)):
            used += batch
            pixels = np.stack([eye.fit(image) for image in batch.values()])
            chosen, values = token_clusters.assign(head, eye.see(pixels)[0].to(device))
            found.append((chosen.cpu(), values.cpu(), token_clusters.brightness(torch.from_numpy(pixels), patch)))
            meter.advance(len(batch))
    return used, [torch.cat(parts) for parts in zip(*found, strict=True)]


def clusters(eye: Eye, head: Head, crops: Crops, rows: Sequence[int]) -> Seen:
    """The SHOWN fullest token clusters over the images of these rows of `crops`; what cannot be read is left out."""
    used, (chosen, values, bright) = _assigned(eye, head, crops, rows)
    fullest = token_clusters.clusters(chosen, values, bright, SHOWN, drawings.SIDE**2)
    if not fullest:
        raise UserError(f"all patches of the {len(used)} images of {crops.told} are black; give others")
    patch = eye.backbone.arguments["patch_size"]
    windows = [
        [drawings.window(eye.fit(crops.read(used[image])), place, patch, SIDE) for image, place, _ in cluster.best]
        for cluster in fullest
    ]
    counted = chosen[bright > token_clusters.DARK]
    whole, prototypes, count = len(counted), len(counted.unique()), head.prototypes()[1].shape[0]
    held = sum(cluster.patches for cluster in fullest) / whole
    told = (
        f"the patches of {len(used)} images use {prototypes:,} of {count:,} prototypes; the {len(fullest)} fullest "
        f"hold {held:.0%} of them"
    )
    text = (
        f"The {len(fullest)} prototypes that most patches of {len(used)} images choose, and for each the patches with "
        "the highest logit, at most one an image, in the middle of a window of 5 x 5 patches."
    )
    numbers = {
        **{"images": len(used), "patches": whole, "black_patches": bright.numel() - whole},
        **{"prototypes": count, "prototypes_used": prototypes, "held_by_drawn": held},
        "drawn": [{"prototype": c.prototype, "patches": c.patches, "images": c.images} for c in fullest],
    }
    return Seen(drawings.clusters_picture(fullest, windows, SIDE, text), numbers, told)
