"""A fine-tune without labels: which images it trains on, and what can be measured afterwards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import benchmark
from finetune.benchmark import BenchmarkConfig, Embed
from finetune.identities import IdentitiesConfig
from finetune.rerank import RerankConfig
from finetune.validation import ValidationConfig
from recipes.errors import UserError
from shards.reader import ShardReader


def training_splits(identities: IdentitiesConfig, validation: ValidationConfig) -> Sequence[str]:
    """The splits of a set that are trained on: `train`, and without labels `unlabeled` as well, which is what a plain
    folder of crops is packed as. UserError where labels would be needed after all."""
    if identities.labels == "given":
        return ("train",)
    if validation.identities:
        raise UserError(
            "validation.identities holds out identities, and identities.labels = none knows none; leave it away: the "
            "model of the last epoch is taken"
        )
    return ("train", "unlabeled")


def open_split(
    shards: str, identities: IdentitiesConfig, validation: ValidationConfig, captions: bool = False
) -> ShardReader:
    """The training images of a set, where asked with their captions."""
    return ShardReader([shards], training_splits(identities, validation), captions=captions)


def searchable(sets: Sequence[Path | str]) -> bool:
    """Whether every set has queries and a gallery, some of each with an identity."""
    try:
        readers = [ShardReader([path], split) for path in sets for split in ("query", "gallery")]
    except UserError:
        return False  # no such split; a set that is damaged could not have been trained on
    return all((reader.pids > 0).any() for reader in readers)


def measure(
    identities: IdentitiesConfig, data: BenchmarkConfig, rerank: RerankConfig, embed: Embed, out: Path,
    facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """At the end of a run: `benchmark.run`, and print what it found. After a training without labels the set may hold
    nothing to search, which is no fault then, and told."""
    if identities.labels == "none" and not data.tests and not searchable(data.sets):
        print(
            f"nothing was measured: {data.shards} has no queries and gallery with identities. The model of the last "
            f"epoch is {out / 'model'}; to measure it: finetune/eval.py with a labelled set"
        )
        return
    outcomes = benchmark.run(data, rerank, embed, out, str(out), facts)
    print(*(outcome.sentence for outcome in outcomes), sep="\n")
