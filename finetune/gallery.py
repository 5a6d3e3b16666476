"""A gallery: images of people as an index that can be searched, added to and removed from.

An image keeps its id for ever; ids are not given twice. gallery_files.py tells what is on disk. A gallery belongs to
one model: its fingerprint and the preparation of its input are stored, another model is refused.
"""

import fnmatch
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finetune import gallery_files
from finetune.extractor import Extractor
from finetune.gallery_files import FACTS, LOCK, VECTORS, Columns, fresh, generation, mapped, read_gallery, writing
from finetune.gallery_sources import Source, fault, shown
from finetune.vector_index import VectorIndex, default_factory
from finetune.verification import Calibration
from recipes.errors import UserError
from recipes.progress import Meter
from shards.schema import BadSample

BLOCK = 65_536  # rows that are copied at a time
Told = Callable[[str], None]  # what happens to a sentence for the user


@dataclass(frozen=True)
class Answer:
    """One image that a search found."""

    id: int
    score: float  # cosine, -1..1
    key: str  # in a folder the path below it
    name: str  # the path of the image, or its key in a set
    pid: int
    camid: int


class Gallery:
    """A gallery in memory. facts: the content of gallery.json."""

    def __init__(self, folder: Path, facts: dict[str, Any], columns: Columns, index: VectorIndex):
        self.folder, self.facts, self.columns, self.index = folder, facts, columns, index
        stored = facts["calibration"]
        self.calibration = None if stored is None else Calibration(**stored)

    def __len__(self) -> int:
        return len(self.columns.ids)

    @classmethod
    def load(cls, folder: Path | str) -> "Gallery":
        """The gallery in `folder`; UserError where there is none, or it is damaged."""
        return cls(Path(folder), *gallery_files.load(Path(folder)))

    @classmethod
    def build(
        cls, folder: Path | str, extractor: Extractor, sources: Sequence[Source], factory: str | None = None,
        told: Told = print,
    ) -> "Gallery":  # fmt: skip
        """Embed all images of the sources and write the gallery; damaged images are named and left out.

        factory: string of faiss.index_factory; None: see default_factory. UserError where a gallery is there already.
        """
        folder = Path(folder)
        with writing(folder):
            left = {path.name for path in folder.iterdir()} - {LOCK}
            if (folder / FACTS).exists():
                raise UserError(f"{folder} is a gallery already: add to it, or choose another --out")
            if any(not name.startswith("generation-") for name in left):
                raise UserError(f"{folder} exists already and is no gallery; choose another --out")
            facts = {"generation": 0, "model": described(extractor),
                     "dim": extractor.dim, "next_id": 0, "sources": [], "skipped": 0, "removed": 0}  # fmt: skip
            facts["calibration"] = extractor.calibration and extractor.calibration.model_dump(mode="json")
            draft = fresh(folder, 1)
            columns, facts = _embedded(draft, Columns.empty(), facts, extractor, sources, told)
            if not len(columns.ids):
                raise UserError("none of the images can be read; nothing was built")
            vectors = mapped(draft / VECTORS, len(columns.ids), facts["dim"])
            factory = factory or default_factory(*vectors.shape)
            index = VectorIndex.build(factory, columns.ids, vectors)
            facts |= {"factory": factory, "recall": index.tune(vectors), "trained_on": len(columns.ids)}
            return cls(folder, gallery_files.commit(folder, facts, columns, index), columns, index)

    def add(self, extractor: Extractor, sources: Sequence[Source], told: Told = print) -> "Gallery":
        """With the images of the sources that are not in it yet; the model must be the same."""
        self.check(extractor)
        with writing(self.folder):
            self._unchanged()
            draft = fresh(self.folder, self.facts["generation"] + 1)
            old = len(self)
            if not self.index.exact:
                shutil.copyfile(generation(self.folder, self.facts["generation"]) / VECTORS, draft / VECTORS)
            columns, facts = _embedded(draft, self.columns, self.facts, extractor, sources, told)
            if len(columns.ids) == old:
                shutil.rmtree(draft)
                told("nothing was added: these images are in the gallery already, or cannot be read")
                return self
            rows = len(columns.ids) - (old if self.index.exact else 0)
            vectors = mapped(draft / VECTORS, rows, facts["dim"])
            self.index.add(columns.ids[old:], vectors[rows - (len(columns.ids) - old) :], vectors)
            if self.index.cells is not None and len(columns.ids) > 2 * facts["trained_on"]:
                told(
                    f"the cells are those of {facts['trained_on']:,} images; build the gallery anew to keep its recall"
                )
            return self._committed(facts, columns)

    def remove(self, gone: np.ndarray) -> "Gallery":
        """Without some images. gone: bool [N]."""
        with writing(self.folder):
            self._unchanged()
            draft, kept = fresh(self.folder, self.facts["generation"] + 1), ~gone
            vectors = None
            if not self.index.exact:
                with open(draft / VECTORS, "wb") as file:
                    for start in range(0, len(self), BLOCK):
                        part = slice(start, start + BLOCK)
                        file.write(self.index.vectors[part][kept[part]].tobytes())
                vectors = mapped(draft / VECTORS, int(kept.sum()), self.facts["dim"])
            self.index.remove(kept, vectors)
            facts = self.facts | {"removed": self.facts["removed"] + int(gone.sum())}
            return self._committed(facts, self.columns[np.flatnonzero(kept)])

    def _committed(self, facts: dict[str, Any], columns: Columns) -> "Gallery":
        return Gallery(self.folder, gallery_files.commit(self.folder, facts, columns, self.index), columns, self.index)

    def _unchanged(self) -> None:
        if read_gallery(self.folder)["generation"] != self.facts["generation"]:
            raise UserError(f"the gallery {self.folder} was changed meanwhile; run the command again")

    def check(self, extractor: Extractor) -> None:
        """UserError where the features of this model, or of this input, are not those of the gallery; its threshold for
        "same person" counts from now on if it has one."""
        mine, other = self.facts["model"], described(extractor)
        for what in ("fingerprint", "input"):
            if mine[what] != other[what]:
                told = f"{mine[what]}, not {other[what]}" if what == "input" else "other weights"
                raise UserError(
                    f"the gallery {self.folder} was built with {mine['ckpt']} ({what}: {told}), not with "
                    f"{extractor.ckpt}; give that model as --ckpt, or build the gallery again"
                )
        self.calibration = extractor.calibration or self.calibration

    def called(self, pattern: str) -> np.ndarray:
        """Which images a pattern means, bool [N]; UserError where it means none.

        pattern: the path of an image or a folder, a key in a set, or either with * and ? as in a shell.
        """
        here = os.path.abspath(pattern)
        kinds = [re.compile(fnmatch.translate(each)) for each in (pattern, here)]
        found = np.zeros(len(self), bool)
        for row, (source, key) in enumerate(zip(self.columns.sources.tolist(), self.columns.keys, strict=True)):
            name = shown(**self.facts["sources"][source], key=key)
            same = name in (pattern, here) or name.startswith(here + os.sep)  # names may hold brackets
            found[row] = same or any(kind.match(name) for kind in kinds)
        if not found.any():
            raise UserError(f"no image in {self.folder} is called {pattern!r}; nothing was removed")
        return found

    def search(self, features: np.ndarray, top: int = 10, nprobe: int | None = None) -> list[list[Answer]]:
        """The nearest images of each query, best first. features: float32 [M, D], rows of length 1."""
        scores, ids = self.index.search(features, top, nprobe)
        return [
            [self._answer(int(i), float(score)) for i, score in zip(*pair, strict=True) if i >= 0]
            for pair in zip(ids, scores, strict=True)
        ]

    def _answer(self, number: int, score: float) -> Answer:
        columns, row = self.columns, int(np.searchsorted(self.columns.ids, number))
        source, key = self.facts["sources"][columns.sources[row]], columns.keys[row]
        name = shown(source["kind"], source["path"], key)
        return Answer(number, min(score, 1.0), key, name, int(columns.pids[row]), int(columns.camids[row]))


def described(extractor: Extractor) -> dict[str, Any]:
    """Which model, as gallery.json tells it; a path here is absolute, so that the gallery can be used from anywhere."""
    ckpt = os.path.abspath(extractor.ckpt) if Path(extractor.ckpt).exists() else extractor.ckpt
    told = {name: list(value) if isinstance(value, tuple) else value for name, value in extractor.input.items()}
    return {"ckpt": ckpt, "fingerprint": extractor.fingerprint, "input": told}


def _of_this_model(source: Source, extractor: Extractor) -> None:
    """UserError where a table holds features of something else."""
    told, mine = source.table.facts, {name: value for name, value in extractor.input.items() if name != "flip"}
    mine = {name: list(value) if isinstance(value, tuple) else value for name, value in mine.items()}
    if told.get("model") != extractor.fingerprint or told.get("input") != mine or extractor.flip:
        raise UserError(
            f"the table {source.path} was not embedded with {extractor.ckpt} as it is; embed its images again"
        )


def _features(
    source: Source, rows: np.ndarray, extractor: Extractor, on_bad: Callable[[int, BadSample], None]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Places in `rows` and features, in this order, float32 [n, D]."""
    if source.table is None:
        pictures = (partial(source.picture, int(row)) for row in rows)
        yield from extractor.stream(pictures, source.camids[rows], on_bad)
        return
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        yield list(range(start, start + len(part))), np.asarray(source.table.features[part], np.float32)


def _new_rows(source: Source, place: int, columns: Columns, sources: list[dict[str, str]]) -> np.ndarray:
    """Rows of a source that are not in the gallery, int64. place: of the source among `sources`."""
    if source.kind != "folder":
        return np.flatnonzero(~np.isin(source.keys.names, columns.keys.names[columns.sources == place]))
    # a folder may lie in another that was added: a file is the same whichever way it is reached
    known = set()
    for number, other in enumerate(sources):
        if other["kind"] == "folder":
            known |= {os.path.join(other["path"], key) for key in columns.keys[columns.sources == number]}
    return np.array([row for row in range(len(source.keys)) if source.name(row) not in known], np.int64)


def _embedded(
    draft: Path, columns: Columns, facts: dict[str, Any], extractor: Extractor, sources: Sequence[Source], told: Told
) -> tuple[Columns, dict[str, Any]]:
    """Append the features of the images that are not there yet to the vectors in `draft`; what is known then."""
    facts = facts | {"sources": list(facts["sources"]), "skipped": 0}
    with open(draft / VECTORS, "ab") as file:
        for source in sources:
            if source.table is not None:
                _of_this_model(source, extractor)
            entry = {"path": source.path, "kind": source.kind}
            if entry not in facts["sources"]:
                facts["sources"].append(entry)
            place = facts["sources"].index(entry)
            rows = _new_rows(source, place, columns, facts["sources"])
            good, bad = [], []

            def left_out(at: int, error: BadSample, bad: list[int] = bad) -> None:
                bad.append(at)
                told(f"left out: {fault(error)}")

            with Meter(len(rows), "embed") as meter:
                for places, features in _features(source, rows, extractor, left_out):
                    if not np.isfinite(features).all():
                        raise UserError(f"the features of {source.path} are not finite; is {extractor.ckpt} intact?")
                    file.write(np.ascontiguousarray(features, np.float32).data)
                    good += places
                    meter.advance(len(places))
            rows, first = rows[good], facts["next_id"]
            ids = np.arange(first, first + len(rows), dtype=np.int64)
            labels = source.pids[rows], source.camids[rows]
            columns += Columns(ids, np.full(len(rows), place, np.int64), *labels, source.keys[rows])
            facts |= {"next_id": first + len(rows), "skipped": facts["skipped"] + len(bad)}
            if bad:
                told(f"{len(bad):,} of {len(bad) + len(rows):,} images of {source.path} cannot be read, left out")
    return columns, facts
