"""What the search page asks of a gallery and its model, without a page: queries, filters, matches, examples."""

import sys
import threading
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from finetune import app_attention
from finetune.app_candidates import CANDIDATES, nearest, reranked, vectors
from finetune.app_originals import Missing, Originals, small
from finetune.app_uploads import Upload
from finetune.extractor import Extractor
from finetune.gallery import Answer, Gallery
from finetune.gallery_files import read_gallery
from recipes.errors import UserError
from shards.schema import UNKNOWN

LONGEST = 500  # characters of a sentence
KEPT = 1_000_000  # bytes of an upload that stays in memory, to search another gallery with it


class Settings(NamedTuple):
    """What the controls of the page say."""

    top: int = 12  # matches, at most
    cameras: tuple[int, ...] = ()  # only images of these; () = of all
    other_cameras: bool = False  # not the query's own, where that is known
    rerank: bool = False
    attention: bool = False


@dataclass(frozen=True, eq=False)
class Query:
    """What is searched with: a picture or a sentence."""

    name: str  # of the picture, or the sentence
    feature: np.ndarray  # float32 [D], of length 1
    pixels: np.ndarray | None = None  # uint8 [H, W, 3], small; None: cannot be shown
    missing: str = ""  # why it cannot
    camid: int = UNKNOWN
    pid: int = UNKNOWN
    id: int | None = None  # of an image of the gallery, which is then left out of the answers
    attention: np.ndarray | None = None  # float32 [gh, gw]
    notes: tuple[str, ...] = ()
    encoded: bytes | None = field(default=None, repr=False)  # of an upload of at most KEPT bytes
    sentence: bool = False  # its cosines are lower than those of two pictures: no threshold of theirs counts


class Hit(NamedTuple):
    """One match."""

    answer: Answer
    label: str  # how the page calls it
    right: bool | None  # whether both are labelled as one person; None: a label is not known
    same: bool | None  # whether the cosine reaches the threshold; None: there is none
    probability: float | None  # of one person
    distance: float | None  # after re-ranking, 0..1; None: in the order of the cosines
    pixels: np.ndarray | None = None
    missing: str = ""
    attention: np.ndarray | None = None  # float32 [gh, gw]


class Found(NamedTuple):
    """The matches of a query, best first, and what should be known about them."""

    hits: list[Hit]
    notes: list[str]


class Loaded:
    """A generation of a gallery in memory, and what is made of it once."""

    def __init__(self, gallery: Gallery):
        self.gallery, self.originals = gallery, Originals(gallery)
        self.generation = gallery.facts["generation"]
        self.cameras = np.unique(gallery.columns.camids).tolist()  # UNKNOWN among them where some have none

    @cached_property
    def names(self) -> np.ndarray:
        """The keys in small letters (ASCII ones), bytes [N]."""
        return np.char.lower(self.gallery.columns.keys.names)

    def row(self, number: int) -> int:
        """Of an image by its id; UserError where it is not there."""
        ids = self.gallery.columns.ids
        row = int(np.searchsorted(ids, number))
        if row == len(ids) or ids[row] != number:
            raise UserError("This image is not in the gallery any more; choose another one.")
        return row


class Searcher:
    """A gallery with its model. Several threads may ask at once."""

    def __init__(self, gallery: Gallery, extractor: Extractor):
        """UserError where the gallery was built with another model."""
        gallery.check(extractor)
        self.extractor, self._loaded, self._lock = extractor, Loaded(gallery), threading.Lock()
        self.folder = gallery.folder.resolve()
        self.no_attention = app_attention.obstacle(extractor)

    def loaded(self) -> Loaded:
        """The gallery as it is on disk now: what was removed from it must not be found any more."""
        with self._lock:
            try:
                if read_gallery(self.folder)["generation"] != self._loaded.generation:
                    fresh = Gallery.load(self.folder)
                    fresh.check(self.extractor)
                    self._loaded = Loaded(fresh)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                raise UserError("This gallery cannot be read any more; the terminal of the server says why.") from error
            return self._loaded

    @property
    def has_cameras(self) -> bool:
        """Whether the images can be told apart by camera."""
        return len(self._loaded.cameras) > 1

    @property
    def reads_sentences(self) -> bool:
        """Whether the model was trained with sentences."""
        return hasattr(self.extractor.model, "embed_sentences")

    def sentence(self, text: str) -> Query:
        """A query from what somebody looks like; UserError where the model cannot read it."""
        if not self.reads_sentences:
            raise UserError("The model of this gallery was not trained with sentences; search it with a picture.")
        text = " ".join(text.split())[:LONGEST] if isinstance(text, str) else ""
        if not text:
            raise UserError("Say whom you look for, for example: a woman in a red coat with a white bag.")
        (feature,), unknown = self.extractor.sentences([text])
        notes = (f"Words {self.extractor.model.vocabulary.unknown_sentence(unknown)}.",) if unknown else ()
        return Query(text, feature, notes=notes, sentence=True)

    def upload(self, picture: Upload) -> Query:
        """A query from an uploaded picture."""
        pixels = small(picture.image)
        attention = None if self.no_attention else app_attention.one(self.extractor, pixels)
        kept = picture.data if len(picture.data) <= KEPT else None
        (feature,) = self.extractor([picture.image])
        return Query(picture.name, feature, pixels, attention=attention, notes=picture.notes, encoded=kept)

    def member(self, number: int) -> Query:
        """A query from an image of the gallery, with the vector that the gallery holds. number: its id; UserError."""
        loaded = self.loaded()
        row, columns = loaded.row(number), loaded.gallery.columns
        pixels, missing = self._pixels(loaded, row)
        camid, attention = int(columns.camids[row]), None
        if pixels is not None and not self.no_attention:
            attention = app_attention.one(self.extractor, pixels, camid)
        (feature,) = vectors(loaded.gallery.index, columns.ids[row : row + 1])
        told = loaded.originals.label(row), feature, pixels, missing, camid, int(columns.pids[row]), number, attention
        return Query(*told)

    def original(self, query: Query) -> bytes:
        """The encoded picture of a query, to search another gallery with it; UserError where it is not at hand."""
        if query.encoded is not None:
            return query.encoded
        if query.id is None:
            raise UserError("The picture is not at hand any more; choose it once more.")
        loaded = self.loaded()
        return loaded.originals.read(loaded.row(query.id))

    def _pixels(self, loaded: Loaded, row: int) -> tuple[np.ndarray | None, str]:
        try:
            return loaded.originals.pixels(row), ""
        except Missing as error:
            return None, str(error)

    def search(self, query: Query, settings: Settings) -> Found:
        """The nearest images."""
        loaded = self.loaded()
        gallery = loaded.gallery
        allowed, notes = self._allowed(loaded, query, settings), []
        if settings.other_cameras and query.camid == UNKNOWN:
            notes.append("The camera of the query is not known, so none is left out.")
        count = max(settings.top, CANDIDATES) if settings.rerank else settings.top
        scores, ids, complete = nearest(gallery.index, query.feature, count, allowed)
        distances = [None] * len(ids)
        if settings.rerank and len(ids):
            order, new, used = reranked(query.feature, vectors(gallery.index, ids))
            scores, ids, distances = scores[order], ids[order], new.tolist()
            notes.append(
                f"Re-ranked: the {len(ids):,} nearest images stand in the order of the neighbours that they share with "
                f"the query (k-reciprocal, k1 {used.k1}, k2 {used.k2}, λ {used.lam:g}, among these images only)."
            )
        if not complete:
            notes.append(
                f"The index ({gallery.facts['factory']}) looks into a part of the gallery: there may be more images "
                "that pass the filter."
            )
        top = slice(settings.top)
        return Found(self._hits(loaded, query, scores[top], ids[top], distances, settings.attention), notes)

    def _allowed(self, loaded: Loaded, query: Query, settings: Settings) -> np.ndarray:
        """Which images may be answers, bool [N]."""
        columns = loaded.gallery.columns
        allowed = np.isin(columns.camids, settings.cameras) if settings.cameras else np.ones(len(columns.ids), bool)
        if settings.other_cameras and query.camid != UNKNOWN:
            allowed &= columns.camids != query.camid
        return allowed if query.id is None else allowed & (columns.ids != query.id)

    def _hits(
        self, loaded: Loaded, query: Query, scores: np.ndarray, ids: np.ndarray, distances: list, attention: bool
    ) -> list[Hit]:
        gallery, hits = loaded.gallery, []
        for score, number, distance in zip(scores.tolist(), ids.tolist(), distances, strict=False):
            row, known = loaded.row(number), None if query.sentence else gallery.calibration
            pid, camid = int(gallery.columns.pids[row]), int(gallery.columns.camids[row])
            label, score = loaded.originals.label(row), min(score, 1.0)
            answer = Answer(number, score, gallery.columns.keys[row], label, pid, camid)
            right = pid == query.pid if query.pid > 0 and pid >= 0 else None
            same = None if known is None else bool(known.same(score))
            probability = None if known is None else float(known.probability(score))
            hits.append(Hit(answer, label, right, same, probability, distance, *self._pixels(loaded, row)))
        if not attention or self.no_attention:
            return hits
        seen = [place for place, hit in enumerate(hits) if hit.pixels is not None]
        maps = app_attention.maps(
            self.extractor, [hits[place].pixels for place in seen], [hits[place].answer.camid for place in seen]
        )
        for place, own in zip(seen, maps, strict=True):
            hits[place] = hits[place]._replace(attention=own)
        return hits

    def examples(self, text: str, page: int, count: int) -> tuple[list[Hit], int]:
        """Images of the gallery to begin with, without scores, and how many there are: those whose key contains `text`
        in their order, or spread over the gallery where it is empty. page: 0, 1, ...; other images each time."""
        loaded = self.loaded()
        columns = loaded.gallery.columns
        if text:
            rows = np.flatnonzero(np.char.find(loaded.names, text.lower().encode("utf-8", "replace")) >= 0)
            chosen = rows[(page * count) % max(1, len(rows)) :][:count]
        else:
            rows = np.arange(len(columns.ids))
            spread = np.linspace(0, len(rows), count, endpoint=False).astype(np.int64) if len(rows) > count else rows
            chosen = np.unique((spread + page) % max(1, len(rows)))
        hits = []
        for row in chosen.tolist():
            label, unknown = loaded.originals.label(row), (None, None, None, None)
            answer = Answer(int(columns.ids[row]), 0.0, columns.keys[row], label, int(columns.pids[row]),
                            int(columns.camids[row]))  # fmt: skip
            hits.append(Hit(answer, label, *unknown, *self._pixels(loaded, row)))
        return hits, len(rows)
