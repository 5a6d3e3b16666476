"""What a search found, for people and for programs: a table, JSON, a picture."""

import io
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from finetune.extractor import Extractor
from finetune.gallery import Answer, Gallery, Told
from finetune.gallery_sources import Pictures, Source, fault, open_source, read_image, shown
from finetune.strips import draw_strips
from recipes.errors import UserError
from recipes.record import write_text
from shards.embeddings import EmbeddingTable
from shards.schema import UNKNOWN

Reading = Callable[[], bytes]  # gives the encoded image
Query = tuple[str, list[Answer]]  # name of the query, what was found, best first
Named = tuple[str, Reading]  # an image, and how to read it
WRITTEN, WIDTH = (96, 192), 15  # of a sentence as a picture: pixels, characters of a line
TILES = 20  # answers in a row of the picture, at most


def queries(extractor: Extractor, sources: Sequence[Source], told: Told) -> tuple[list[Named], np.ndarray]:
    """The images to search with that can be read, and their features float32 [M, D]; the others are named."""
    named = [(source, row) for source in sources for row in range(len(source.keys))]
    pictures = (partial(source.picture, row) for source, row in named)
    cameras = [int(source.camids[row]) for source, row in named]
    good, features = [], []
    for places, part in extractor.stream(pictures, cameras, lambda _, error: told(f"left out: {fault(error)}")):
        good += [named[place] for place in places]
        features.append(part)
    if not good:
        raise UserError("none of the images to search with can be read")
    return [(source.name(row), partial(source.read, row)) for source, row in good], np.concatenate(features)


def sentences(extractor: Extractor, texts: Sequence[str], told: Told) -> tuple[list[Named], np.ndarray]:
    """Sentences to search with, and their features float32 [S, D]; words that the model does not know are named."""
    features, unknown = extractor.sentences(texts)
    if unknown:
        told(extractor.model.vocabulary.unknown_sentence(unknown))
    return [(text, partial(_written, text)) for text in texts], features


def _written(text: str) -> bytes:
    """A sentence as a picture, for the place of the query in a ranked list."""
    image = Image.new("RGB", WRITTEN, "white")
    lines = textwrap.wrap(text, WIDTH)
    ImageDraw.Draw(image).text((6, 6), "\n".join(lines), fill="black", font=ImageFont.load_default(11), spacing=3)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def recall_told(gallery: Gallery) -> list[str]:
    """How many of the nearest images an index that looks into parts finds; [] of one that looks at all."""
    measured = gallery.facts["recall"]
    if not measured:
        return []
    cells = f" with nprobe = {measured['nprobe']}" if measured["nprobe"] else ""
    return [f"{gallery.facts['factory']}{cells} finds {measured['recall']:.1%} of the {measured['at']} nearest images"]


def merged(images: Sequence[Named]) -> list[Named]:
    """Several images of one person as one query, which the first one stands for."""
    name, read = images[0]
    return [(f"{name} and {len(images) - 1} more" if len(images) > 1 else name, read)]


def _as_told(answer: Answer, gallery: Gallery) -> dict[str, Any]:
    """One answer; what nobody knows is null."""
    calibration = gallery.calibration
    return {
        "id": answer.id,
        "score": round(answer.score, 6),
        "same": None if calibration is None else bool(answer.score >= calibration.threshold),
        "probability": None if calibration is None else round(float(calibration.probability(answer.score)), 6),
        "image": answer.name,
        "camera": None if answer.camid == UNKNOWN else answer.camid,
        "identity": None if answer.pid == UNKNOWN else answer.pid,
    }


def as_json(found: Sequence[Query], gallery: Gallery) -> dict[str, Any]:
    """All answers with what they depend on; scores are cosines."""
    calibration = gallery.calibration
    return {
        "gallery": str(gallery.folder),
        "model": gallery.facts["model"]["ckpt"],
        "fingerprint": gallery.facts["model"]["fingerprint"],
        "images": len(gallery),
        "threshold": None if calibration is None else calibration.threshold,
        "queries": [
            {"query": name, "answers": [_as_told(answer, gallery) for answer in answers]} for name, answers in found
        ],
    }


def write_json_answers(target: str, found: Sequence[Query], gallery: Gallery) -> None:
    """To the file `target`, or to standard output where it is "-"."""
    text = json.dumps(as_json(found, gallery), indent=1, ensure_ascii=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        write_text(Path(target), text)
    except OSError as error:
        raise UserError(f"--json {target} cannot be written: {error.strerror or error}") from error


def print_tables(found: Sequence[Query], gallery: Gallery) -> None:
    """One table a query."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for name, answers in found:
        table = Table(title=f"query {name}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        told = [_as_told(answer, gallery) for answer in answers]
        shown = {"camera": any(t["camera"] is not None for t in told), "identity": any(t["identity"] for t in told)}
        table.add_column("#", justify="right")
        table.add_column("cosine", justify="right")
        if gallery.calibration is not None:
            table.add_column("same person?")
        for column in (column for column, there in shown.items() if there):
            table.add_column(column, justify="right")
        table.add_column("image", overflow="fold")
        for place, one in enumerate(told, start=1):
            cells = [str(place), f"{one['score']:.3f}"]
            if gallery.calibration is not None:
                cells.append("yes" if one["same"] else "no")
            cells += ["?" if one[column] is None else str(one[column]) for column, there in shown.items() if there]
            table.add_row(*cells, one["image"])
        console.print(table, markup=False) if answers else console.print(f"query {name}: nothing found")
        console.print()
    if gallery.calibration is None:
        console.print("no `same person?`: the model has no threshold; finetune/eval.py --calibrate measures one")
    else:
        known = gallery.calibration
        console.print(
            f"same person: cosine of at least {known.threshold:.3f}; on {known.title} that accepted {known.tar:.1%} of "
            f"the pairs of one person and {known.far:.2%} of the others"
        )


def draw(path: Path, queries: Sequence[Named], found: Sequence[Query], gallery: Gallery) -> None:
    """The ranked lists as a picture. queries: of each its name and how to read the encoded image."""
    ids = sorted({answer.id for _, answers in found for answer in answers})
    place = {number: row for row, number in enumerate(ids)}
    answers = {answer.id: answer for _, some in found for answer in some}
    # draw_strips ranks by inner products, which are the scores with one-hot queries and the scores as the features
    scores = np.full((len(ids), len(found)), -2, np.float32)
    for number, (_, some) in enumerate(found):
        for answer in some:
            scores[place[answer.id], number] = answer.score
    top = min(TILES, *(len(some) for _, some in found))
    if not top:
        raise UserError("--strips has nothing to draw: a query has no answers; search more cells with --nprobe")
    unknown, nobody = np.full(len(found), UNKNOWN, np.int64), np.zeros(len(ids), np.int64)
    camids = np.array([answers[number].camid for number in ids], np.int64)
    names = [name for name, _ in queries]
    query = EmbeddingTable(np.eye(len(found), dtype=np.float32), unknown, unknown, names)
    table = EmbeddingTable(scores, nobody, camids, [answers[number].name for number in ids])
    readers = Pictures(queries), Pictures(_images(gallery, ids))
    draw_strips(path, *readers, [(gallery.folder.name, query, table)], range(len(found)), top)


def _images(gallery: Gallery, ids: Sequence[int]) -> list[Named]:
    """Name of each image and how to read it."""
    columns, opened, images = gallery.columns, {}, []
    for row in np.searchsorted(columns.ids, np.asarray(ids, np.int64)).tolist():
        number, key = int(columns.sources[row]), columns.keys[row]
        kind, path = (gallery.facts["sources"][number][what] for what in ("kind", "path"))
        name = shown(kind, path, key)
        if kind == "folder":
            images.append((name, partial(read_image, name)))
            continue
        if number not in opened:
            source = open_source(path)
            opened[number] = source, {each: place for place, each in enumerate(source.keys)}
        source, places = opened[number]
        if key not in places:
            raise UserError(f"{path} does not hold {key!r} any more; leave --strips away, or build the gallery again")
        images.append((name, partial(source.read, places[key])))
    return images
