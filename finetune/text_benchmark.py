"""Search with the captions of a set, and say how well: what benchmark.py is for images as queries.

The queries are the captions of the split `gallery`, each image of it is searched once (cross_modal.py). The files are
those of an evaluation with images, as far as they make sense.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from finetune import unlabelled
from finetune.benchmark import RESULTS, TABLE, BenchmarkConfig, counts, names
from finetune.cross_modal import KEEP, CrossModalConfig, Side, both_ways, search, sentence
from finetune.identities import IdentitiesConfig
from finetune.metrics import Retrieval
from finetune.reporting import percent
from finetune.rerank import RerankConfig
from finetune.validation import Split, retrieve
from finetune.words import Sentences
from recipes.errors import UserError
from recipes.progress import track
from recipes.record import write_json, write_text
from shards.embeddings import EmbeddingTable
from shards.reader import ShardReader

BATCH = 512  # sentences
WORDS_TOLD = 100  # unknown words in results.json
WAYS = {"t2i": "text to image", "i2t": "image to text"}
COLUMNS = {"rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mAP": "mAP", "mINP": "mINP"}

Embed = Callable[..., EmbeddingTable]  # of features.embedder: a reader, and rows of it -> features of the images


@runtime_checkable
class ReadsText(Protocol):
    """A model that compares sentences with images, as methods/text_search.py makes it."""

    second_look: CrossModalConfig

    def numbers(self, captions: Sequence[Sequence[str]]) -> Sentences:
        """The captions of each image in word numbers."""

    def embed_words(self, words: Tensor) -> Tensor:
        """Word numbers int64 [B, L] -> L2-normalised [B, F]."""


def read_captions(reader: ShardReader, rows: np.ndarray) -> list[tuple[str, ...]]:
    """The captions of rows of a reader that was opened with captions, int64 [N], in their order."""
    return [reader[row].captions for row in track(rows.tolist(), len(rows), "captions")]


@torch.no_grad()
def embed_captions(model: ReadsText, captions: Sequence[Sequence[str]], pids: np.ndarray) -> tuple[Side, Sentences]:
    """All captions that have a known word. captions, pids [N]: of each image. UserError where there is none."""
    model.eval()
    found = model.numbers(captions)
    device = next(iter(model.parameters())).device
    parts = torch.from_numpy(found.numbers).split(BATCH)
    features = [model.embed_words(part.to(device)).float().cpu().numpy() for part in parts]
    return Side(np.concatenate(features), pids[found.owners]), found


def scorer(model: nn.Module) -> Callable[..., Retrieval]:
    """What `Validation` scores an epoch with. Where the model reads sentences: the captions of the held-out images
    search these images; else as `validation.retrieve`."""
    if not isinstance(model, ReadsText):
        return retrieve

    def score(reader: ShardReader, split: Split, embed: Embed, *_: Any) -> Retrieval:
        rows = np.sort(np.concatenate([split.query, split.gallery]))
        images = Side(embed(reader, rows).features, reader.pids[rows])
        texts, _ = embed_captions(model, read_captions(reader, rows), images.pids)
        return search(texts, images, ("caption", "image"))

    return score


def _score(path: str, embed: Embed, model: ReadsText, folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Search one set both ways; results.json comes last."""
    reader = ShardReader([path], "gallery", captions=True)
    captions = read_captions(reader, np.arange(len(reader)))
    if not any(captions):
        raise UserError(f"no image of the split gallery of {path} has a caption, so there is no query; pack a set with")
    table = embed(reader)
    texts, found = embed_captions(model, captions, table.pids)
    table.save(folder / "embeddings" / "gallery")
    texts.table("caption").save(folder / "embeddings" / "captions")
    told = both_ways(Side(table.features, table.pids), texts, model.second_look)
    told |= {**told["t2i"], **facts, "shards": path, "dim": int(table.features.shape[1])}
    told |= {"data": [source.get("title", source["name"]) for source in reader.sources]}
    told |= {"version": "+".join(part["plan"][:12] for part in reader.identity["sets"])}
    told |= {"splits": {"gallery": counts(table)}, "cross_modal": model.second_look.model_dump()}
    rules = "captions of the gallery search its images, each image once; no camera rule"
    told |= {"protocol": {**KEEP.model_dump(), "rules": rules}}
    told |= {"left_out": found.left_out, "unknown_words": list(found.unknown[:WORDS_TOLD])}
    write_text(folder / TABLE, _table(told))
    write_json(folder / RESULTS, told)
    return told


def _table(told: Mapping[str, Any]) -> str:
    """The numbers of one set as Markdown."""
    lines = [f"# {told['title']}", "", f"{' + '.join(told['data'])} ({told['version']}): {told['captions']} captions, "
             f"{told['images']} images; {told['protocol']['rules']}.", ""]  # fmt: skip
    lines += [f"| | {' | '.join(COLUMNS.values())} |", f"|---|{'---|' * len(COLUMNS)}"]
    for way, name in WAYS.items():
        for key, more in ((way, ""), (f"{way}_second", ", second look")):
            if key in told:
                lines.append(f"| {name}{more} | {' | '.join(percent(told[key][column]) for column in COLUMNS)} |")
    if told["left_out"]:
        lines += ["", f"{told['left_out']} captions have no known word and are no queries."]
    if told["unknown_words"]:
        lines += ["", f"Unknown words, left out: {', '.join(told['unknown_words'])}."]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the search of one set came to."""

    folder: Path  # where everything was written
    told: dict[str, Any]  # results.json

    @property
    def sentence(self) -> str:
        """For the terminal."""
        return f"{' + '.join(self.told['data'])}: {sentence(self.told)}"

    def calibration(self) -> None:
        """A sentence and an image are never the same thing, so there is no threshold to store: UserError."""
        raise UserError("--calibrate is for models whose queries are images, and this one searches by sentences")


def reads_text(embed: Embed) -> bool:
    """Whether the model behind features.Embedder reads sentences."""
    return isinstance(getattr(embed, "model", None), ReadsText)


def run(
    config: BenchmarkConfig, rerank: RerankConfig, embed: Embed, out: Path, title: str, facts: Mapping[str, Any]
) -> list[Outcome]:
    """Search every set of the config, for one set into OUT, for several into OUT/<set>.

    embed: features.Embedder of a model that reads text. Call it in one process only. UserError where `rerank` is on: it
    is for images among images, and the model's own `cross_modal` section has what is for sentences.
    """
    if rerank.k1:
        raise UserError("rerank.k1 is for images as queries; set method.cross_modal.k before the training")
    sets = config.sets
    folders = [out / name for name in names(sets)] if len(sets) > 1 else [out]
    outcomes = []
    for path, folder in zip(sets, folders, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (RESULTS, TABLE):
            (folder / name).unlink(missing_ok=True)
        facts = {"title": title, "flip": config.flip, **facts}
        outcomes.append(Outcome(folder, _score(path, embed, embed.model, folder, facts)))
    return outcomes


def measure(
    identities: IdentitiesConfig, data: BenchmarkConfig, rerank: RerankConfig, embed: Embed, out: Path,
    facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """At the end of a run: with captions where the model reads them, else with images as `unlabelled.measure`."""
    if not reads_text(embed):
        unlabelled.measure(identities, data, rerank, embed, out, facts)
        return
    print(*(outcome.sentence for outcome in run(data, rerank, embed, out, str(out), facts)), sep="\n")
