"""Which sample goes into which tar: the plan of a shard set. Nothing is read or written here.

Neighbours in a raw set are frames of one video, so the samples of each split are permuted before they are cut into
shards. The plan depends on the records and the settings only, never on the number of processes.
"""

import dataclasses
import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from recipes.errors import UserError
from recipes.load import Section
from shards.images import ImagesConfig
from shards.schema import SPLITS, Record, shard_name
from shards.seeds import generator

KEY = re.compile(r"[^./\s][^.\s]*")


class PackingConfig(Section):
    """How records become tars."""

    shard_samples: int = Field(4096, ge=1)  # samples a tar; the last one of a split has the rest
    seed: int = Field(0, ge=0)  # of the permutation of each split
    workers: int = Field(0, ge=0, le=256)  # processes that pack; 0 and 1 = only this one. Does not change the bytes
    splits: list[Literal["train", "query", "gallery", "unlabeled"]] | None = None  # splits to take, None = all
    drop_labels: bool = False  # pack all as split `unlabeled`, without pid, camid and captions


@dataclass(frozen=True)
class PlannedShard:
    """One tar to be written."""

    name: str
    split: str
    records: list[Record]  # in the order of the tar


@dataclass(frozen=True)
class Plan:
    """All tars of a set, and what tells this set from every other."""

    shards: list[PlannedShard]
    digest: str  # hexadecimal sha256 over the sources, the settings, and key and labels of every sample in its place


def _check_key(record: Record, taken: dict[str, str]) -> None:
    """Keys become file names in a tar, where the first dot ends the key, and must find one image."""
    where = record.origin or f"the record {record.key!r}"
    if not KEY.fullmatch(record.key):
        raise UserError(f"{where} has the key {record.key!r}; a key has no dot or white space and no '/' in front")
    if record.key in taken:
        raise UserError(f"{where} and {taken[record.key]} have the same key {record.key!r}; rename one of them")
    if record.split not in SPLITS:
        raise UserError(f"{where} is of split {record.split!r}; known splits are {', '.join(SPLITS)}")
    if len(record.key.encode()) > 90:  # only long ones are tried, because trying costs as much as writing
        try:
            tarfile.TarInfo(f"{record.key}.json").tobuf(tarfile.USTAR_FORMAT)
        except ValueError as error:
            raise UserError(
                f"{where} has a key too long for a tar ({len(record.key)} characters); shorten it"
            ) from error
    taken[record.key] = record.origin or "another record"


def _select(records: Iterable[Record], packing: PackingConfig) -> dict[str, list[Record]]:
    """The records to pack, by split, checked."""
    chosen: dict[str, list[Record]] = {split: [] for split in SPLITS}
    found: Counter[str] = Counter()
    taken: dict[str, str] = {}
    for record in records:
        _check_key(record, taken)
        found[record.split] += 1
        if packing.splits is not None and record.split not in packing.splits:
            continue
        if packing.drop_labels:
            record = dataclasses.replace(record, split="unlabeled", pid=None, camid=None, captions=())
        chosen[record.split].append(record)
    if found and not any(chosen.values()):
        there = ", ".join(f"{split} {count}" for split, count in sorted(found.items()))
        raise UserError(f"packing.splits = {packing.splits} leaves no images; the source has {there}")
    return {split: rows for split, rows in chosen.items() if rows}


def _digest(shards: list[PlannedShard], packing: PackingConfig, images: ImagesConfig, sources: list[dict]) -> str:
    """sha256 of everything that decides the bytes of the set; paths count as absolute ones."""
    settings = {"packing": packing.model_dump(exclude={"workers"}), "images": images.model_dump(), "sources": sources}
    text = json.dumps(settings, sort_keys=True, default=lambda path: str(Path(path).resolve()))
    digest = hashlib.sha256(text.encode())
    for shard in shards:
        digest.update(f"\n{shard.name}\n".encode())
        for record in shard.records:
            digest.update(repr((record.key, record.pid, record.camid, record.captions)).encode("utf-8", "replace"))
    return digest.hexdigest()


def make_plan(
    records: Iterable[Record], packing: PackingConfig, images: ImagesConfig, sources: list[dict[str, Any]]
) -> Plan:
    """Permute each split and cut it into shards of `packing.shard_samples`.

    sources: the source configs, which tell apart sets whose keys are the same. UserError if there are no records, if
    two have one key, or if the chosen splits are empty.
    """
    shards: list[PlannedShard] = []
    for split, rows in _select(records, packing).items():
        order = generator(packing.seed, "packing", SPLITS.index(split)).permutation(len(rows))
        for number, start in enumerate(range(0, len(rows), packing.shard_samples)):
            part = [rows[i] for i in order[start : start + packing.shard_samples]]
            shards.append(PlannedShard(shard_name(split, number), split, part))
    if not shards:
        where = ", ".join(str(source.get("path", source.get("name", "the source"))) for source in sources)
        raise UserError(f"{where or 'the source'} holds no images; check the path and the kind of source")
    return Plan(shards, _digest(shards, packing, images, sources))
