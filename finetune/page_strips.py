"""Ranked lists in a page: the queries that are found best, middling and worst, and what is found for them.

Each image is an element of the page with its own description, so lists wrap on a phone and can be read out. Right
answers have a solid frame and a tick, wrong ones a dashed frame and a cross, as in strips.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from finetune.metrics import Protocol
from finetune.page_charts import Entry
from finetune.page_pictures import Album, Picture, described
from finetune.page_run import Searched
from finetune.page_tables import alike, precisions
from finetune.reporting import distance
from finetune.strips import Hit, ranked
from recipes.errors import UserError
from shards.embeddings import EmbeddingTable
from shards.images import decode
from shards.reader import ShardReader
from shards.remote import is_remote
from shards.schema import UNKNOWN

TOP = 10  # answers of a list
EACH = 3  # queries of a kind: best, middling, worst
TILE = 96, 144  # pixels, width and height of an image at most
MARKS = {True: ("right", "✓"), False: ("wrong", "✗"), None: ("unknown", "?")}


class Tile(NamedTuple):
    """An image of a list."""

    uri: str | None  # None: it cannot be shown
    alt: str
    mark: str  # class of the style sheet: query, right, wrong, unknown
    sign: str
    captions: list[str]


class Strip(NamedTuple):
    """The answers of one model to a query."""

    letter: str
    style: int
    run: str
    precision: str
    tiles: list[Tile]


class Asked(NamedTuple):
    """A query and what was found for it."""

    name: str
    query: Tile
    strips: list[Strip]


class Kind(NamedTuple):
    """Queries below one heading."""

    title: str
    note: str
    asked: list[Asked]


class Lists(NamedTuple):
    """The lists of one set; or why there are none, and the picture that is shown in their place."""

    data: str
    kinds: list[Kind]
    reason: str = ""
    picture: Picture | None = None


@dataclass(frozen=True)
class Tables:
    """The features of a search, and its images."""

    query: EmbeddingTable
    gallery: EmbeddingTable
    readers: tuple[ShardReader, ShardReader]
    protocol: Protocol


def _tables(searched: Searched) -> Tables:
    """What was searched; UserError where something of it is not at hand, or is another version."""
    result, folder = searched.result, searched.folder / "embeddings"
    if not folder.is_dir():
        raise UserError(f"{folder} is not there")
    query, gallery = (EmbeddingTable.load(folder / split, mapped=True) for split in ("query", "gallery"))
    if is_remote(result.shards):
        raise UserError(f"the images are those of {result.shards}, and nothing is fetched for a page")
    readers = tuple(ShardReader([result.shards], split) for split in ("query", "gallery"))
    version = "+".join(part["plan"][:12] for part in readers[0].identity["sets"])
    if version != result.version:
        raise UserError(f"{result.shards} has version {version} now, and {result.version} was searched")
    sizes = [len(part) for part in (query, readers[0], gallery, readers[1])]
    if sizes[0] != sizes[1] or sizes[2] != sizes[3] or sizes[0] != len(result.average_precision):
        raise UserError(f"the tables in {folder} are not those of {result.shards} or of results.json")
    if query.features.shape[1] != gallery.features.shape[1]:
        raise UserError(f"query and gallery table in {folder} differ in dimensions")
    if result.protocol.same_camera not in ("drop", "keep"):
        raise UserError(f"results.json tells of the unknown protocol {result.protocol.same_camera!r:.40}")
    return Tables(query, gallery, readers, Protocol(same_camera=result.protocol.same_camera))


def _spaced(order: np.ndarray, pids: np.ndarray, count: int) -> list[int]:
    """The first `count` queries in that order, each of another person as long as there are others."""
    first, seen = [], set()
    for row in order.tolist():
        if int(pids[row]) not in seen:
            seen.add(int(pids[row]))
            first.append(row)
        if len(first) == count:
            return first
    return [*first, *(row for row in order.tolist() if row not in first)][:count]


def chosen(ap: np.ndarray, pids: np.ndarray, each: int = EACH) -> list[tuple[str, str, list[int]]]:
    """Which queries to show: title, note and rows of each kind; no query twice. A pure function.

    ap: float64 [runs, M], average precision of each query, NaN for skipped ones. pids: int64 [M].
    """
    valid = np.flatnonzero(np.isfinite(ap).all(axis=0))
    mean, spread = ap[:, valid].mean(axis=0), np.ptp(ap[:, valid], axis=0)
    down = valid[np.argsort(-mean, kind="stable")]
    middle = valid[np.argsort(np.abs(mean - np.median(mean)), kind="stable")] if len(valid) else valid
    one = len(ap) == 1
    kinds = [("Best queries", "Those with the highest average precision.", down),
             ("Median queries", "Half of all queries are found better, half worse.", middle),
             ("Worst queries", "Those with the lowest average precision.", down[::-1])]  # fmt: skip
    if not one:
        kinds = [(title, f"By the mean of all runs. {note}", order) for title, note, order in kinds]
        apart = valid[np.argsort(-spread, kind="stable")]
        apart = apart[np.sort(-spread, kind="stable") < 0]
        kinds.insert(0, ("Where they differ most", "Queries with the largest difference in average precision.", apart))
    taken, found = set(), []
    for title, note, order in kinds:
        order = np.array([row for row in order.tolist() if row not in taken], np.int64)
        rows = _spaced(order, pids, each)
        taken |= set(rows)
        found += [(title, note, rows)] if rows else []
    return found


def _camera(camid: int) -> str:
    return "camera unknown" if camid == UNKNOWN else f"camera {camid}"


def _uri(read: Callable[[int], bytes], row: int, album: Album) -> str | None:
    """The image of a row, small; None where it cannot be shown."""
    try:
        image = decode(read(row))
    except UserError:
        return None
    image.thumbnail(TILE, Image.Resampling.LANCZOS)
    return album.uri(image)


def _reader(reader: ShardReader, table: EmbeddingTable) -> Callable[[int], bytes]:
    """The encoded image of a row of the table; UserError where the set holds another one there."""

    def read(row: int) -> bytes:
        sample = reader[row]
        if sample.key != table.keys[row]:
            raise UserError(f"row {row} is {table.keys[row]!r} in the table and {sample.key!r} in the set")
        return sample.image

    return read


def _answer(tables: Tables, place: int, hit: Hit, album: Album) -> Tile:
    mark, sign = MARKS[hit.right]
    camera, apart = _camera(int(tables.gallery.camids[hit.row])), distance(hit.score)
    uri = _uri(_reader(tables.readers[1], tables.gallery), hit.row, album)
    return Tile(uri, f"Answer {place}: {mark}, {camera}, distance {apart}.", mark, sign, [str(place), apart, camera])


def _asked(row: int, panels: Sequence[tuple[Entry, Searched, Tables]], album: Album) -> Asked:
    """A query, and the list of each run below each other."""
    first = panels[0][2]
    name, camera = first.query.keys[row], _camera(int(first.query.camids[row]))
    uri = _uri(_reader(first.readers[0], first.query), row, album)
    strips = []
    for (run, style, letter), searched, tables in panels:
        hits, _ = ranked(tables.query, tables.gallery, row, TOP, tables.protocol)
        precision = searched.result.average_precision[row]
        tiles = [_answer(tables, place, hit, album) for place, hit in enumerate(hits, start=1)]
        told = f"average precision {precision:.3f}" if precision is not None else "no match"
        strips.append(Strip(letter, style, run.name, told, tiles))
    shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return Asked(shown, Tile(uri, f"Query {shown}, {camera}.", "query", "", ["query", camera]), strips)


def lists(panels: Sequence[tuple[Entry, Searched]], album: Album) -> Lists:
    """The lists of one set. panels: the runs that searched it, with equal queries."""
    data = panels[0][1].result.name
    try:
        opened = [(entry, searched, _tables(searched)) for entry, searched in panels]
        keys = opened[0][2].query.keys
        if any(tables.query.keys != keys for _, _, tables in opened[1:]):
            raise UserError("the runs searched with different queries")
        ap = np.stack([precisions(searched) for _, searched in panels])
        found = []
        for title, note, rows in chosen(ap, opened[0][2].query.pids, EACH if len(panels) <= 4 else EACH - 1):
            found.append(Kind(title, note, [_asked(row, opened, album) for row in rows]))
        return Lists(data, found)
    except UserError as error:
        reason = f"The lists cannot be drawn anew: {error}."
    picture = None
    if len(panels) == 1:
        folder = panels[0][1].folder
        alt = described(folder, "strips.png", "Ranked lists of some queries, right and wrong answers marked.")
        picture = album.add(folder / "strips.png", "Ranked lists", alt, alt)
    return Lists(data, [], reason, picture)


def all_lists(entries: Sequence[Entry], album: Album) -> list[Lists]:
    """For one run the lists of every set; for several those of the sets that they searched alike."""
    if len(entries) == 1:
        return [lists([(entries[0], searched)], album) for searched in entries[0][0].searched]
    return [lists(group, album) for group in alike(entries)]
