"""Where the model of the search page looks: the attention of its CLS token, laid over a picture."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from finetune.extractor import Extractor
from pretrain.attention import cls_attention
from pretrain.backbone import Backbone
from pretrain.grids import heated
from shards.schema import UNKNOWN

BATCH = 16  # pictures a forward pass: it stands between a click and its answer


def obstacle(extractor: Extractor) -> str | None:
    """Why there is no attention to show; None where there is."""
    backbone = extractor.model.backbone
    if isinstance(backbone, Backbone):
        return None
    name = backbone.arguments["model_name"]
    return f"Attention is shown for Vision Transformers; this model is {name}, which has no CLS token."


@torch.no_grad()
def maps(extractor: Extractor, pictures: Sequence[np.ndarray], cameras: Sequence[int]) -> np.ndarray:
    """Mean over the heads of the last block, float32 [n, gh, gw], each >= 0. pictures: uint8 [H, W, 3]; cameras: of
    each, UNKNOWN where nobody knows (few models look at them)."""
    sie, found = getattr(extractor.model, "sie", None), []
    for start in range(0, len(pictures), BATCH):
        part = slice(start, start + BATCH)
        views = np.stack([extractor.augment.test_view(Image.fromarray(picture)) for picture in pictures[part]])
        images = torch.from_numpy(views).to(extractor.device)
        known = torch.as_tensor(list(cameras[part]), dtype=torch.int64, device=extractor.device)
        added = None if sie is None else sie(known, len(images))
        with torch.autocast(extractor.device.type, torch.bfloat16, enabled=extractor.half):
            attention = cls_attention(extractor.model.backbone, images, added)
        found.append(attention.float().mean(1).cpu().numpy())
    return np.concatenate(found) if found else np.zeros((0, 1, 1), np.float32)


def one(extractor: Extractor, picture: np.ndarray, camera: int = UNKNOWN) -> np.ndarray:
    """As `maps`, of a single picture: float32 [gh, gw]."""
    return maps(extractor, [picture], [camera])[0]


def over(picture: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The picture in gray below the map: black none, yellow the most in this picture. uint8 [H, W, 3]."""
    return heated(picture, attention)
