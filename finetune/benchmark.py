"""The protocol of one data set: embed query and gallery, search, score, write what came out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from finetune.metrics import Retrieval, evaluate
from finetune.strips import draw_strips
from recipes.load import Section
from recipes.record import write_json
from shards.embeddings import EmbeddingTable
from shards.neighbours import search
from shards.reader import ShardReader


class BenchmarkConfig(Section):
    """Where the images come from and what is reported."""

    # a set with the splits train, query and gallery: its folder or URL, or SOURCE:PATH for a data set in its own folder
    shards: str
    draw: Path | None = None  # recipe under recipes/shards that makes the set on first use
    workers: int = Field(2, ge=0)  # loader processes
    nearest: int = Field(10, ge=1)  # neighbours listed for each query
    strips: int = Field(8, ge=0)  # queries drawn as ranked lists; 0 = no picture


class Tables:
    """Embeddings of the query and gallery split."""

    def __init__(self, config: BenchmarkConfig, embed: Callable[[ShardReader], EmbeddingTable]):
        """embed: from a reader to its table, for example features.embed_split of a model."""
        self.config = config
        self.readers = {split: ShardReader([config.shards], split) for split in ("query", "gallery")}
        self.query, self.gallery = embed(self.readers["query"]), embed(self.readers["gallery"])

    def save(self, folder: Path) -> None:
        """Write both tables, to be read again by EmbeddingTable.load."""
        self.query.save(folder / "query")
        self.gallery.save(folder / "gallery")

    def score(self) -> Retrieval:
        """CMC, mAP and mINP under the protocol of Market-1501: matches of the same camera do not count."""
        return evaluate(self.query, self.gallery)


def spread(retrieval: Retrieval, count: int) -> list[int]:
    """Query rows from the best to the worst average precision, evenly spaced."""
    valid = np.flatnonzero(~np.isnan(retrieval.ap))
    order = valid[np.argsort(-retrieval.ap[valid], kind="stable")]
    return [int(order[i]) for i in np.linspace(0, len(order) - 1, min(count, len(order))).astype(int)]


def nearest(query: EmbeddingTable, gallery: EmbeddingTable, count: int) -> dict[str, list[dict[str, Any]]]:
    """The `count` nearest gallery images of each query by FAISS, same-camera images included: key and cosine."""
    scores, rows = search(gallery.features, query.features, min(count, len(gallery)))
    return {
        key: [{"key": gallery.keys[r], "cosine": round(float(s), 4)} for s, r in zip(ss, rr, strict=True)]
        for key, ss, rr in zip(query.keys, scores, rows, strict=True)
    }


def report(tables: Tables, out: Path, title: str, facts: dict[str, Any]) -> Retrieval:
    """Score the tables and write results.json, nearest.json and strips.png into `out`."""
    retrieval, config = tables.score(), tables.config
    data = [source.get("title", source["name"]) for source in tables.readers["query"].sources]
    told = {**retrieval.numbers(), "data": data, **facts, "average_precision": retrieval.ap}
    write_json(out / "results.json", told)
    write_json(out / "nearest.json", nearest(tables.query, tables.gallery, config.nearest))
    if config.strips:
        panel = (title, tables.query, tables.gallery)
        readers = tables.readers["query"], tables.readers["gallery"]
        draw_strips(out / "strips.png", *readers, [panel], spread(retrieval, config.strips))
    return retrieval


def sentence(retrieval: Retrieval) -> str:
    """The result in one line, in per cent."""
    numbers = {"mAP": retrieval.mAP, "Rank-1": retrieval.rank1, "Rank-5": retrieval.rank5, "mINP": retrieval.mINP}
    text = "  ".join(f"{name} {100 * value:.1f}" for name, value in numbers.items())
    return f"{text}  ({retrieval.valid} queries, {retrieval.skipped} without a match)"
