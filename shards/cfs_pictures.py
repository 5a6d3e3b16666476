"""Pictures of the scores: their histogram, and the images with the best and the worst of them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipes.errors import UserError
from shards.images import decode
from shards.schema import Sample

BINS = 200
CUTS = (0.5, 0.6)  # fractions kept in the paper: for cost, for accuracy
COLUMNS, LINES = 12, 3  # of the best, and as many of the worst
TILE, LABEL, GAP = (72, 144), 14, 6  # pixels: width and height of an image, line above it, space between
WHITE, BLACK = (255, 255, 255), (20, 20, 20)


class Reader(Protocol):
    """Row -> sample."""

    def __getitem__(self, row: int) -> Sample: ...


def _place(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(data)
    beside.replace(path)


def histogram(path: Path, values: np.ndarray) -> None:
    """How many samples have which score, float64 [N]; and where the cuts of the paper lie."""
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-6:  # too little for bins
        low, high = low - 0.01, high + 0.01
    counts, edges = np.histogram(values, bins=BINS, range=(low, high))
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.stairs(counts, edges, fill=True, color="#4477aa")
    for fraction, style in zip(CUTS, ("-", "--"), strict=True):
        at = float(np.quantile(values, 1 - fraction))
        axes.axvline(at, color="#aa3377", linestyle=style, label=f"{fraction:.0%} are above {at:.3f}")
    axes.set(xlabel="catastrophic forgetting score", ylabel="samples", title=f"{len(values):,} samples")
    axes.legend(loc="upper left", frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    plt.close(figure)
    _place(path, drawn.getvalue())


def contact_sheet(path: Path, reader: Reader, values: np.ndarray, order: np.ndarray) -> None:
    """The best images and, below them, the worst, each with its score. order: rows from best to worst, int64 [N]."""
    each = min(COLUMNS * LINES, (len(order) + 1) // 2)
    blocks: list[tuple[str, Sequence[int]]] = [
        (f"best {each} of {len(order):,}: they moved least", order[:each].tolist()),
        (f"worst {len(order[each:][-each:])}: they moved most", order[each:][-each:][::-1].tolist()),
    ]
    width = GAP + COLUMNS * (TILE[0] + GAP)
    lines = -(-each // COLUMNS)
    height = len(blocks) * (2 * LABEL + lines * (TILE[1] + LABEL + GAP))
    sheet = Image.new("RGB", (width, height), WHITE)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    y = 0
    for title, rows in blocks:
        draw.text((GAP, y + LABEL // 2), title, BLACK, font)
        y += 2 * LABEL
        for number, row in enumerate(rows):
            left = GAP + number % COLUMNS * (TILE[0] + GAP)
            top = y + number // COLUMNS * (TILE[1] + LABEL + GAP)
            draw.text((left, top), f"{values[row]:.3f}", BLACK, font)
            sheet.paste(_picture(reader, row), (left, top + LABEL))
        y += lines * (TILE[1] + LABEL + GAP)
    drawn = io.BytesIO()
    sheet.save(drawn, "PNG")
    _place(path, drawn.getvalue())


def _picture(reader: Reader, row: int) -> Image.Image:
    try:
        sample = reader[int(row)]
        return decode(sample.image, sample.key).resize(TILE, Image.Resampling.BICUBIC)
    except UserError:
        crossed = Image.new("RGB", TILE, WHITE)  # a damaged image must not cost the sheet
        ImageDraw.Draw(crossed).line((0, 0, *TILE), BLACK)
        return crossed
