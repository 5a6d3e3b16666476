"""Ranked lists as one picture: the query and the first gallery entries, right and wrong ones marked.

What the protocol hides from a query is left out, as in the metrics. Right answers have a solid green frame and a tick,
wrong ones a dashed red frame and a cross, so the picture reads without colour too; entries whose identity is not known
have a grey frame and no mark. Below an answer stand its distance d = 1 - cosine, its place and its camera.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.metrics import JUNK, GalleryLabels, Protocol, own_rows, rank_matches
from recipes.errors import UserError
from shards.embeddings import EmbeddingTable
from shards.schema import UNKNOWN, Sample

GREEN, RED, GREY, BLACK = (0, 130, 60), (200, 30, 30), (130, 130, 130), (20, 20, 20)
GAP, FRAME, CAPTION, LABEL = 8, 4, 30, 16  # pixels: between tiles, frame, two lines below a tile, line above a row
DASH = 7  # pixels


class Reader(Interface):
    """Rows of a split as encoded images, in the order of its embedding table."""

    def __getitem__(self, row: int) -> Sample: ...


Panel = tuple[str, EmbeddingTable, EmbeddingTable]  # name of a model, its query table, its gallery table


@dataclass(frozen=True)
class Hit:
    """One answer of a ranked list."""

    row: int  # in the gallery
    score: float  # inner product of the features
    right: bool | None  # None: the query's or the entry's identity is not known


def ranked(
    query: EmbeddingTable, gallery: EmbeddingTable, row: int, top: int, protocol: Protocol | None = None
) -> tuple[list[Hit], float]:
    """The first `top` kept answers to the query in `row`, and its average precision (NaN without a match).

    Order as in metrics: higher score first, then lower gallery row. protocol: that of Market-1501 by default.
    """
    labels, one = GalleryLabels(gallery.pids, gallery.camids, protocol), slice(row, row + 1)
    own = np.full(1, -1)
    if labels.keep:
        same_key = EmbeddingTable(query.features[one], query.pids[one], query.camids[one], query.keys[one])
        own = own_rows(same_key, gallery)
    pid, camid = int(query.pids[row]), int(query.camids[row])
    scores = query.features[one] @ gallery.features.T
    matches = rank_matches(scores, query.pids[one], query.camids[one], labels, own)[0]
    precision = float(np.mean(np.arange(1, len(matches) + 1) / matches)) if len(matches) else float("nan")
    kept = gallery.pids != JUNK
    kept[labels.split(pid, camid, int(own[0]))[1]] = False
    rows = np.flatnonzero(kept)
    best = rows[np.argsort(-scores[0, rows], kind="stable")[:top]]
    known = pid > 0
    hits = [
        Hit(int(i), float(scores[0, i]), bool(gallery.pids[i] == pid) if known and gallery.pids[i] >= 0 else None)
        for i in best
    ]
    return hits, precision


def picture(reader: Reader, table: EmbeddingTable, row: int, size: tuple[int, int]) -> Image.Image:
    """The image of a row, resized to (width, height)."""
    sample = reader[row]
    if sample.key != table.keys[row]:
        raise UserError(
            f"row {row} of the embedding table is {table.keys[row]!r}, but the shards hold {sample.key!r} there; "
            "the table was made from another set: embed this one again"
        )
    try:
        return Image.open(io.BytesIO(sample.image)).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    except OSError as error:
        raise UserError(f"the image of {sample.key!r} cannot be decoded: {error}") from error


def _camera(camid: int) -> str:
    return "cam ?" if camid == UNKNOWN else f"cam {camid}"


def _distance(score: float) -> str:
    """d = 1 - cosine; with more digits where all are near to each other."""
    apart = max(0.0, 1 - score)
    return f"d {apart:.3f}" if apart >= 0.01 else f"d {apart:.5f}"


def _dashed(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> None:
    """A dashed rectangle, FRAME wide, inside `box` (left, top, right, bottom; right and bottom excluded)."""
    left, top, right, bottom = box
    for x in range(left, right, 2 * DASH):
        end = min(x + DASH, right) - 1
        draw.rectangle((x, top, end, top + FRAME - 1), fill=colour)
        draw.rectangle((x, bottom - FRAME, end, bottom - 1), fill=colour)
    for y in range(top, bottom, 2 * DASH):
        end = min(y + DASH, bottom) - 1
        draw.rectangle((left, y, left + FRAME - 1, end), fill=colour)
        draw.rectangle((right - FRAME, y, right - 1, end), fill=colour)


def _frame(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], right: bool | None, query: bool = False) -> None:
    """Frame around a tile and the mark in its upper right corner."""
    left, top, end, bottom = box
    outline = (left, top, end - 1, bottom - 1)
    if query or right is None:
        draw.rectangle(outline, outline=BLACK if query else GREY, width=FRAME)
        return
    if right:
        draw.rectangle(outline, outline=GREEN, width=FRAME)
    else:
        _dashed(draw, box, RED)
    x, y, side = end - FRAME - 14, top + FRAME, 14  # the mark's white field
    draw.rectangle((x, y, x + side - 1, y + side - 1), fill="white")
    if right:
        draw.line([(x + 2, y + 7), (x + 5, y + 11), (x + 11, y + 2)], fill=GREEN, width=2)
    else:
        draw.line([(x + 2, y + 2), (x + 11, y + 11)], fill=RED, width=2)
        draw.line([(x + 2, y + 11), (x + 11, y + 2)], fill=RED, width=2)


class _Sheet:
    """The picture while it is drawn: rows of tiles with captions."""

    def __init__(self, rows: int, tiles: int, tile: tuple[int, int]):
        self.width, self.height = tile
        self.font = ImageFont.load_default(11)
        self.pitch = self.height + LABEL + CAPTION + GAP
        size = (tiles * (self.width + GAP) + 2 * GAP, rows * self.pitch + GAP)
        self.image = Image.new("RGB", size, "white")
        self.draw = ImageDraw.Draw(self.image)

    def label(self, line: int, text: str) -> None:
        self.draw.text((GAP, GAP + line * self.pitch), text, fill=BLACK, font=self.font)

    def tile(self, line: int, place: int, picture: Image.Image, right: bool | None, captions: Sequence[str]) -> None:
        """Place 0 is the query, set apart by a wider gap."""
        x = GAP + place * (self.width + GAP) + (GAP if place else 0)
        y = GAP + line * self.pitch + LABEL
        self.image.paste(picture, (x, y))
        _frame(self.draw, (x, y, x + self.width, y + self.height), right, query=place == 0)
        for number, text in enumerate(captions):
            self.draw.text((x, y + self.height + 1 + 13 * number), text, fill=BLACK, font=self.font)


def _check(panels: Sequence[Panel], rows: Sequence[int], top: int) -> None:
    if not panels or not len(rows):
        raise UserError("a picture of ranked lists needs at least one model and one query row")
    if top < 1:
        raise UserError(f"top = {top}, but a ranked list shows at least one answer")
    first = panels[0][1]
    for label, query, gallery in panels:
        if query.features.shape[1] != gallery.features.shape[1]:
            raise UserError(f"query and gallery table of {label!r} differ in dimensions; embed both with one model")
        for row in rows:
            if not 0 <= row < len(query):
                raise UserError(f"query row {row} does not exist; the query table of {label!r} has {len(query)} rows")
            if query.keys[row] != first.keys[row]:
                raise UserError(
                    f"query row {row} is {query.keys[row]!r} for {label!r} and {first.keys[row]!r} for "
                    f"{panels[0][0]!r}; the tables were made from different sets"
                )


def draw_strips(
    path: Path | str,
    query_reader: Reader,
    gallery_reader: Reader,
    panels: Sequence[Panel],
    rows: Sequence[int],
    top: int = 10,
    tile: tuple[int, int] = (64, 128),
    protocol: Protocol | None = None,
) -> None:
    """Write the ranked lists of some queries as a PNG.

    query_reader, gallery_reader: the images of the tables' rows. panels: one a model, all of the same images; a query
    gives one strip a model, below each other. rows: query rows to draw. tile: width and height of an image in pixels.
    protocol: what a query may see; that of Market-1501 by default.
    """
    _check(panels, rows, top)
    sheet = _Sheet(len(rows) * len(panels), top + 1, tile)
    line = 0
    for row in rows:
        for label, query, gallery in panels:
            hits, precision = ranked(query, gallery, row, top, protocol)
            mark = "no match in the gallery" if np.isnan(precision) else f"AP {precision:.3f}"
            mark = mark if query.pids[row] > 0 else ""  # a search of one's own gallery knows no right answers
            sheet.label(line, f"{label}   query {query.keys[row]}   {mark}")
            captions = ("query", _camera(int(query.camids[row])))
            sheet.tile(line, 0, picture(query_reader, query, row, tile), None, captions)
            for place, hit in enumerate(hits, start=1):
                captions = (_distance(hit.score), f"{place}: {_camera(int(gallery.camids[hit.row]))}")
                sheet.tile(line, place, picture(gallery_reader, gallery, hit.row, tile), hit.right, captions)
            line += 1
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    sheet.image.save(temporary, format="PNG")
    os.replace(temporary, path)
