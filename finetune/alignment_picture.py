"""Which stripe of one person was compared with which stripe of another: lines between two images, as a PNG."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from finetune.aligned_distance import elements, path
from finetune.metrics import JUNK, GalleryLabels, Protocol, own_rows
from finetune.strips import BLACK, GREEN, RED, Reader, picture
from shards.embeddings import EmbeddingTable

NAME = "alignment.png"
TILE = 96, 192  # pixels, width and height of an image
GAP, BETWEEN, TEXT = 24, 84, 34  # between two pairs, between the images of a pair, below a pair
COLUMNS = 4  # pairs side by side
FAINT, STRONG = (205, 205, 205), (30, 80, 160)  # of a line between stripes at distance tanh(1) or more, and at 0


def first(order: np.ndarray, query: EmbeddingTable, gallery: EmbeddingTable, row: int, protocol: Protocol) -> int:
    """The first answer to a query that its protocol does not hide. order: all gallery rows, best first."""
    labels = GalleryLabels(gallery.pids, gallery.camids, protocol)
    own = own_rows(query, gallery)[row] if labels.keep else -1
    kept = gallery.pids != JUNK
    kept[labels.split(int(query.pids[row]), int(query.camids[row]), int(own))[1]] = False
    return int(order[kept[order]][0])


def _lines(draw: ImageDraw.ImageDraw, at: tuple[int, int], a: np.ndarray, b: np.ndarray) -> None:
    """The cells of the cheapest path between stripes a and b [H, c], the nearest pairs darkest. at: left, top."""
    apart = elements(torch.from_numpy(a).float(), torch.from_numpy(b).float())
    left, right = at[0] + TILE[0], at[0] + TILE[0] + BETWEEN
    step = TILE[1] / len(a)
    for i, j in sorted(path(apart), key=lambda cell: -apart[cell].item()):
        share = min(1.0, apart[i, j].item() / float(np.tanh(1.0)))
        colour = tuple(round(strong + share * (faint - strong)) for faint, strong in zip(FAINT, STRONG, strict=True))
        ends = (left, at[1] + (i + 0.5) * step), (right, at[1] + (j + 0.5) * step)
        draw.line(ends, fill=colour, width=3 if share < 0.5 else 2)
    for x, rows in ((left, len(a)), (right, len(b))):
        for row in range(rows):
            y = at[1] + (row + 0.5) * TILE[1] / rows
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=STRONG)


def draw(
    out: Path, readers: tuple[Reader, Reader], tables: tuple[EmbeddingTable, EmbeddingTable],
    local: tuple[np.ndarray, np.ndarray], pairs: list[tuple[int, int]],
) -> str:  # fmt: skip
    """Write the pairs (row of the query table, row of the gallery table) side by side; returns what is to be seen.

    local: features [q, H, c] and [g, H, c].
    """
    query, gallery = tables
    width, height = 2 * TILE[0] + BETWEEN + GAP, TILE[1] + TEXT + GAP
    rows = -(-len(pairs) // COLUMNS)
    sheet = Image.new("RGB", (min(COLUMNS, len(pairs)) * width + GAP, rows * height + GAP), "white")
    pen, font, right = ImageDraw.Draw(sheet), ImageFont.load_default(12), 0
    for number, (one, other) in enumerate(pairs):
        x, y = GAP + number % COLUMNS * width, GAP + number // COLUMNS * height
        sheet.paste(picture(readers[0], query, one, TILE), (x, y))
        sheet.paste(picture(readers[1], gallery, other, TILE), (x + TILE[0] + BETWEEN, y))
        _lines(pen, (x, y), local[0][one], local[1][other])
        same = query.pids[one] == gallery.pids[other] and query.pids[one] > 0
        right += int(same)
        word, colour = ("right", GREEN) if same else ("wrong", RED)
        pen.text((x, y + TILE[1] + 4), f"query {query.keys[one]}"[:44], fill=BLACK, font=font)
        pen.text((x, y + TILE[1] + 18), f"its first answer is {word}", fill=colour, font=font)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    sheet.save(temporary, format="PNG")
    os.replace(temporary, out)
    return (
        f"Which stripe is compared with which: {len(pairs)} queries from the best to the worst, each beside its first "
        f"answer, {right} of them right. Dark lines join stripes that look alike."
    )
