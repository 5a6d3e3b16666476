"""Where a model that learned attention maps looks: heat maps laid over images, and the maps as numbers."""

import io
from pathlib import Path

import cv2
import numpy as np
import torch

from finetune.features import Embedder, TestViews
from pretrain.grids import Sheet, encoded, heated, write_file
from shards.images import decode
from shards.reader import ShardReader

NAME, NUMBERS = "attention.png", "attention.npz"
TILE = 64, 128  # pixels, width and height of an image


@torch.no_grad()
def maps(embed: Embedder, reader: ShardReader, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Attention float32 [n, K, h, w] in 0..1 of the images in `rows`, by the name of the level; {}: none was learned.

    rows: int64 [n], of the reader.
    """
    look = getattr(embed.model, "attention", None)
    if look is None:
        return {}
    embed.model.eval()
    views, device = TestViews(reader, embed.augment, rows), embed.accelerator.device
    with embed.accelerator.autocast():
        found = look(torch.stack([views[place][0] for place in range(len(views))]).to(device))
    return {name: level.float().cpu().numpy() for name, level in found.items()}


def draw(folder: Path, embed: Embedder, reader: ShardReader, rows: np.ndarray) -> str | None:
    """Write attention.png and attention.npz (`keys`, and the maps of each level) of the images in `rows`; returns what
    is to be seen, None where the model learned no attention."""
    found = maps(embed, reader, rows)
    if not found:
        return None
    names = ["image", *(f"{level}, {n + 1}" for level, each in found.items() for n in range(each.shape[1]))]
    shown = f"Where the model looks in {len(rows)} queries, by the maps that it learned: yellow is the most of a map."
    sheet = Sheet(len(names), len(rows), TILE, shown, [name.replace(" level", "") for name in names])
    for place, row in enumerate(rows):
        image = decode(reader[int(row)].image)
        pixels = cv2.resize(np.asarray(image.convert("RGB")), TILE, interpolation=cv2.INTER_AREA)
        sheet.put(place, 0, pixels)
        every = [level[place, n] for level in found.values() for n in range(level.shape[1])]
        for column, values in enumerate(every, start=1):
            sheet.put(place, column, heated(pixels, values))
    folder.mkdir(parents=True, exist_ok=True)
    numbers = io.BytesIO()
    named = {level.replace(" ", "_"): each.astype(np.float16) for level, each in found.items()}
    np.savez(numbers, keys=np.array([reader.keys[int(row)] for row in rows]), **named)
    write_file(folder / NUMBERS, numbers.getvalue())
    write_file(folder / NAME, encoded(sheet.image))
    return shown
