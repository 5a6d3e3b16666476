"""The protocol of one data set, or of several: embed query and gallery, search, score, write what came out."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from finetune import alignment_picture, attention_overlay, confidence, reporting, verification
from finetune.breakdown import QUERY_COLUMNS, by_cameras, matching, nearest, query_rows, spread
from finetune.features import Embedder
from finetune.metrics import JUNK, Protocol, Retrieval, evaluate
from finetune.pair_counts import Pairs
from finetune.rerank import RerankConfig, Reranked
from finetune.rescoring import Rescored, RescoringConfig
from finetune.strips import draw_strips
from finetune.verification import Calibration, calibration_of
from recipes.errors import UserError
from recipes.load import Section
from recipes.progress import Meter
from recipes.record import write_json, write_text
from shards.embeddings import EmbeddingTable
from shards.reader import ShardReader
from shards.schema import UNKNOWN

Embed = Callable[[ShardReader], EmbeddingTable]  # from a reader to the features of all its images
RESULTS, TABLE = "results.json", "table.md"
LEVEL = 0.95  # of the confidence intervals
BINS = 1 << 16  # of the cosine; distances.png shows fewer, cut to where the pairs are
# of several sets, in the results.json of all
SHORT = ("mAP", "rank1", "rank5", "rank10", "mINP", "valid", "skipped", "data", "shards", "version", "protocol")
FILES = (RESULTS, TABLE, "queries.csv", "nearest.json", "strips.png", "distances.png", "cameras.csv", "cameras.png",
         alignment_picture.NAME, attention_overlay.NAME, attention_overlay.NUMBERS)  # fmt: skip


class BenchmarkConfig(Section):
    """Where the images come from and what is reported."""

    # a set with the splits train, query and gallery: its folder or URL, or SOURCE:PATH for a data set in its own folder
    shards: str
    tests: tuple[str, ...] = ()  # sets to search instead, spelled alike: train on A, test on B and C; () = `shards`
    draw: Path | None = None  # recipe under recipes/shards that makes a set on first use
    workers: int = Field(2, ge=0)  # loader processes
    protocol: Protocol = Protocol()
    rescoring: RescoringConfig = RescoringConfig()  # of models with local features
    flip: bool = False  # the feature is the mean over an image and its mirror image; twice the time to embed
    far: float = Field(1e-3, gt=0, lt=1)  # false accept rate that the threshold for "same person" may have
    bootstrap: int = Field(1000, ge=0)  # resamples of the queries for the confidence intervals; 0 = none
    nearest: int = Field(10, ge=1)  # neighbours listed for each query
    strips: int = Field(8, ge=0)  # queries drawn as ranked lists; 0 = no picture

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets that are searched."""
        return self.tests or (self.shards,)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the search of one set came to."""

    folder: Path  # where everything was written
    told: dict[str, Any]  # results.json
    plain: Retrieval
    reranked: Retrieval | None

    @property
    def sentence(self) -> str:
        """For the terminal."""
        return reporting.sentence(self.told)

    def calibration(self) -> Calibration:
        """The threshold for "same person"; UserError where the set has too few pairs for one."""
        if self.told["calibration"] is None:
            raise UserError(f"nothing to calibrate with: {'; '.join(self.told['not_measured'])}")
        return Calibration(**self.told["calibration"])


def names(sets: Sequence[str]) -> list[str]:
    """A short name for each set, good for a folder: the last part of its path; repeated ones are numbered."""
    found: list[str] = []
    for path in sets:
        short = re.sub(r"[^\w.-]+", "-", path.rstrip("/").rpartition("/")[2]).strip("-.") or "set"
        also = sum(re.sub(r"~\d+$", "", name) == short for name in found)
        found.append(f"{short}~{also + 1}" if also else short)
    return found


class Tables:
    """Embeddings of the query and gallery split of a set."""

    def __init__(self, path: str, embed: Embed):
        self.path = path
        self.readers = {split: ShardReader([path], split) for split in ("query", "gallery")}
        self.query, self.gallery = embed(self.readers["query"]), embed(self.readers["gallery"])

    def save(self, folder: Path) -> None:
        """Write both tables, to be read again by EmbeddingTable.load."""
        self.query.save(folder / "query")
        self.gallery.save(folder / "gallery")

    def facts(self) -> dict[str, Any]:
        """Which set this is, in which version, and what its splits hold."""
        query = self.readers["query"]
        return {
            "data": [source.get("title", source["name"]) for source in query.sources],
            "shards": self.path,
            # of the packing plan: which images in which splits under which labels
            "version": "+".join(part["plan"][:12] for part in query.identity["sets"]),
            "splits": {"query": counts(self.query), "gallery": counts(self.gallery)},
            "dim": int(self.query.features.shape[1]),
        }


def counts(table: EmbeddingTable) -> dict[str, int]:
    """Images, identities, cameras, distractors, junk and images without a label."""
    pids = table.pids
    return {
        "images": len(table),
        "identities": len(np.unique(pids[pids > 0])),
        "cameras": len(np.unique(table.camids[table.camids >= 0])),
        "distractors": int((pids == 0).sum()),
        "junk": int((pids == JUNK).sum()),
        "unlabelled": int((pids == UNKNOWN).sum()),
    }


def score(path: str, embed: Embed, protocol: Protocol) -> Retrieval:
    """Only the numbers of one set; nothing is written."""
    tables = Tables(path, embed)
    return evaluate(tables.query, tables.gallery, protocol)


def _numbers(retrieval: Retrieval, resamples: int) -> dict[str, Any]:
    """The scalars with their confidence intervals, the CMC curve and the average precision of every query."""
    told: dict[str, Any] = retrieval.numbers()
    if resamples:
        found = confidence.intervals(retrieval, LEVEL, resamples)
        told["intervals"] = {"level": LEVEL, "resamples": resamples, **found}
    return {**told, "cmc": retrieval.cmc, "average_precision": retrieval.ap}


def _pairs(config: BenchmarkConfig, tables: Tables, title: str, meter: Meter) -> tuple[Pairs | None, dict[str, Any]]:
    """The pairs of the set, and what they say: ROC and open set, the calibration, and why one of them is missing."""
    told: dict[str, Any] = {"verification": None, "calibration": None, "not_measured": []}
    try:
        found = verification.verify(tables.query, tables.gallery, config.protocol, meter=meter)
        told["verification"] = found.numbers()
        told["calibration"] = calibration_of(found.pairs, title, config.protocol, config.far).model_dump()
    except UserError as error:  # a set may have too few pairs for these and still be searched
        told["not_measured"].append(str(error))
    return found.pairs if told["verification"] else None, told


def _pictures(
    folder: Path, config: BenchmarkConfig, tables: Tables, told: dict, plain: Retrieval, pairs: Pairs | None
) -> dict[str, str]:
    """strips.png, distances.png and cameras.png; what each shows, by its name."""
    shown = {}
    if config.strips:
        rows, readers = spread(plain, config.strips), (tables.readers["query"], tables.readers["gallery"])
        panel = told["title"], tables.query, tables.gallery
        draw_strips(folder / "strips.png", *readers, [panel], rows, protocol=config.protocol)
        shown["strips.png"] = (
            f"Ranked lists of {len(rows)} queries from the best to the worst average precision. Ticks and solid frames "
            "are right answers, crosses and dashed frames wrong ones."
        )
    if pairs:
        thresholds = {"equal error": told["verification"]["eer_threshold"]}
        if told["calibration"]:
            thresholds = {f"FAR {config.far:g}": told["calibration"]["threshold"]}
        histogram = reporting.Histogram(*pairs.histogram(BINS))
        roc = told["verification"]["roc"]
        shown["distances.png"] = reporting.draw_distances(folder / "distances.png", histogram, thresholds, roc)
    if len(told["cameras"]) > 1:
        shown["cameras.png"] = reporting.draw_cameras(folder / "cameras.png", told["cameras"])
    return shown


def _rescore(
    config: BenchmarkConfig, tables: Tables, embed: Embed, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The numbers after a second stage, one tree for each of its distances; and alignment.png with what it shows."""
    second = config.rescoring
    if not second.distances:
        return [], {}
    if not isinstance(embed, Embedder):
        raise UserError("benchmark.rescoring needs a model with local features; leave its distances empty")
    local = embed.local(tables.readers["query"]), embed.local(tables.readers["gallery"])
    query, gallery, told, aligned = tables.query, tables.gallery, [], None
    for kind in second.distances:
        search = Rescored((query.features, gallery.features), local, embed.model.local_distance, kind, second)
        with Meter(len(query), f"search by {kind} distance", "queries") as meter:
            found = evaluate(query, gallery, config.protocol, scores=search.scores, meter=meter)
        how = {"distance": kind, "candidates": search.count, "weight": second.weight}
        told.append({**_numbers(found, config.bootstrap), **how})
        if aligned is None and kind != "unaligned":  # the lines of the picture are those of an alignment
            aligned = kind, search, found
    if not config.strips or aligned is None:
        return told, {}
    kind, search, found = aligned
    rows = spread(found, config.strips)
    pairs = [(row, int(alignment_picture.first(search.order(row), query, gallery, row, config.protocol)))
             for row in rows]  # fmt: skip
    readers = tables.readers["query"], tables.readers["gallery"]
    shown = alignment_picture.draw(folder / alignment_picture.NAME, readers, (query, gallery), local, pairs)
    return told, {alignment_picture.NAME: f"{shown} Searched by {reporting.SECOND[kind]}."}


def _report(
    config: BenchmarkConfig, rerank: RerankConfig, tables: Tables, embed: Embed, folder: Path, facts: Mapping[str, Any]
) -> Outcome:
    """Search one set and write everything about it; results.json comes last."""
    query, gallery, protocol = tables.query, tables.gallery, config.protocol
    with Meter(2 * len(query), "search", "queries") as meter:
        plain, second = evaluate(query, gallery, protocol, meter=meter), None
        about = tables.facts()
        pairs, measured = _pairs(config, tables, f"{' + '.join(about['data'])} ({about['version']})", meter)
    told = {**_numbers(plain, config.bootstrap), **facts, **about, "flip": config.flip}
    told |= {"protocol": {**protocol.model_dump(), "rules": protocol.rules()}, **measured}
    if rerank.k1:
        again = Reranked(query.features, gallery.features, rerank)
        with Meter(len(query), "search re-ranked", "queries") as meter:
            second = evaluate(query, gallery, protocol, scores=again.scores, meter=meter)
        told["reranked"] = {**_numbers(second, config.bootstrap), "rerank": rerank.model_dump()}
    told["rescored"], shown = _rescore(config, tables, embed, folder)
    matches = matching(query, gallery, protocol)
    told["cameras"] = by_cameras(query, gallery, matches, protocol)
    reporting.write_csv(folder / "queries.csv", QUERY_COLUMNS, query_rows(query, gallery, matches, plain, second))
    if told["cameras"]:
        columns = "query", "gallery", "queries", "mAP"
        rows = ([pair[column] for column in columns] for pair in told["cameras"])
        reporting.write_csv(folder / "cameras.csv", columns, rows)
    write_json(folder / "nearest.json", nearest(query, gallery, config.nearest))
    if config.strips and isinstance(embed, Embedder):
        rows = np.sort(spread(plain, config.strips))
        seen = attention_overlay.draw(folder, embed, tables.readers["query"], rows)
        shown |= {} if seen is None else {attention_overlay.NAME: seen}
    shown |= _pictures(folder, config, tables, told, plain, pairs)
    write_text(folder / TABLE, reporting.table(told["title"], [told], shown))
    write_json(folder / RESULTS, told)
    return Outcome(folder, told, plain, second)


def _clear(folder: Path) -> None:
    """Make the folder; what an earlier evaluation left in it goes, so that nothing old stands beside new numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def run(
    config: BenchmarkConfig, rerank: RerankConfig, embed: Embed, out: Path, title: str, facts: Mapping[str, Any]
) -> list[Outcome]:
    """Search every set of the config and write what came out, for one set into OUT, for several into OUT/<set>.

    embed: from a reader to its table, for example features.Embedder of a model. title: what was evaluated, for tables
    and pictures. facts: more about it, JSON-able, for results.json. With several sets OUT/table.md and OUT/results.json
    have the numbers of all. Call it in one process only.
    """
    sets, folders = config.sets, [out]
    _clear(out)
    if len(sets) > 1:
        folders = [out / name for name in names(sets)]
    outcomes = []
    for path, folder in zip(sets, folders, strict=True):
        _clear(folder)
        tables = Tables(path, embed)
        tables.save(folder / "embeddings")
        outcomes.append(_report(config, rerank, tables, embed, folder, {"title": title, **facts}))
    if len(sets) > 1:
        every = [outcome.told for outcome in outcomes]
        pages = {f"{folder.name}/{TABLE}": folder.name for folder in folders}
        write_text(out / TABLE, reporting.table(title, every, {}, pages))
        short = {folder.name: {key: told[key] for key in SHORT} for folder, told in zip(folders, every, strict=True)}
        write_json(out / RESULTS, {"title": title, **facts, "sets": short})
    return outcomes
