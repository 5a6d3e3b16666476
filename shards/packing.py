"""Which sample goes into which tar: the plan of a shard set. Nothing is read or written here.

Neighbours in a raw set are frames of one video, so the samples of each split are permuted before they are cut into
shards: they are sorted by a seeded hash of their key. The plan depends on the records and the settings only, never on
the order in which a source lists them or on the number of processes.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from recipes.errors import UserError
from recipes.load import Section
from shards.catalogue import Catalogue
from shards.images import ImagesConfig
from shards.schema import Record, shard_name


class PackingConfig(Section):
    """How records become tars."""

    shard_samples: int = Field(4096, ge=1)  # samples a tar; the last one of a split has the rest
    seed: int = Field(0, ge=0, lt=2**64)  # of the permutation of each split
    workers: int | None = Field(None, ge=0, le=256)  # processes that pack, None = one a core. Does not change the bytes
    splits: list[Literal["train", "query", "gallery", "unlabeled"]] | None = None  # splits to take, None = all
    drop_labels: bool = False  # pack all as split `unlabeled`, without pid, camid and captions
    # of several sources with labels: identities of the n-th get n million added, its cameras n hundred, n = 0, 1, ...
    offset_labels: bool = False


@dataclass(frozen=True)
class PlannedShard:
    """One tar to be written."""

    name: str
    split: str
    records: np.ndarray  # int64: offsets in the spool of the catalogue, in the order of the tar


@dataclass(frozen=True)
class Plan:
    """All tars of a set, and what tells this set from every other."""

    shards: list[PlannedShard]
    catalogue: Catalogue
    digest: str  # hexadecimal sha256 over the sources, the settings, and key and labels of every sample


def _select(records: Iterable[Record], packing: PackingConfig, found: Counter[str]) -> Iterator[Record]:
    """The records to pack; `found` counts those of each split, taken or not."""
    for record in records:
        found[record.split] += 1
        if packing.splits is not None and record.split not in packing.splits:
            continue
        if packing.drop_labels:
            record = dataclasses.replace(record, split="unlabeled", pid=None, camid=None, captions=())
        yield record


def _digest(catalogue: Catalogue, packing: PackingConfig, images: ImagesConfig, sources: list[dict]) -> str:
    """sha256 of everything that decides the bytes of the set; paths count as absolute ones."""
    settings = {"packing": packing.model_dump(exclude={"workers"}), "images": images.model_dump(), "sources": sources}
    text = json.dumps(settings, sort_keys=True, default=lambda path: str(Path(path).resolve()))
    return hashlib.sha256(f"{text}\n{catalogue.digest}".encode()).hexdigest()


def make_plan(
    records: Iterable[Record],
    packing: PackingConfig,
    images: ImagesConfig,
    sources: list[dict[str, Any]],
    spool: Path,
) -> Plan:
    """Permute each split and cut it into shards of `packing.shard_samples`.

    sources: the source configs, which tell apart sets whose keys are the same. spool: scratch file that the plan needs
    as long as it is used. UserError if there are no records, if two have one key, or if the chosen splits are empty.
    """
    found: Counter[str] = Counter()
    catalogue = Catalogue(_select(records, packing, found), spool, packing.seed)
    if not found:
        where = ", ".join(str(source.get("path", source.get("name", "the source"))) for source in sources)
        raise UserError(f"{where or 'the source'} holds no images; check the path and the kind of source")
    if not len(catalogue):
        there = ", ".join(f"{split} {count}" for split, count in sorted(found.items()))
        raise UserError(f"packing.splits = {packing.splits} leaves no images; the source has {there}")
    shards = []
    for split in catalogue.counts():
        order = catalogue.shuffled(split)
        for number, start in enumerate(range(0, len(order), packing.shard_samples)):
            part = catalogue.offsets[order[start : start + packing.shard_samples]]
            shards.append(PlannedShard(shard_name(split, number), split, part))
    return Plan(shards, catalogue, _digest(catalogue, packing, images, sources))
