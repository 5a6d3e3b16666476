"""Sources -> shard set: what `build.py` does, callable from the parts that draw or pack their data on first use."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from recipes.errors import UserError
from recipes.load import Section, validate
from shards import sources
from shards.images import ImagesConfig
from shards.packing import PackingConfig
from shards.schema import Manifest, Record
from shards.writer import pack


class BuildConfig(Section):
    """Sections of `recipes/shards/*.yaml`."""

    sources: list[dict[str, Any]] = Field(default_factory=list)  # mappings: `name` (a file in shards/sources), its keys
    source: dict[str, Any] = Field(default_factory=dict)  # keys for every source that has them
    packing: PackingConfig = PackingConfig()
    images: ImagesConfig = ImagesConfig()


Configured = list[tuple[str, Section]]  # name and validated config of each source


def configure(wanted: list[dict[str, Any]], shared: dict[str, Any]) -> Configured:
    """Mappings of a recipe (`name` and that source's keys) -> (name, validated config) of each source.

    shared: keys for every source that has them; a key that no source has is refused.
    """
    if not wanted:
        raise UserError("no source is given: name one as SOURCE:PATH or under `sources:` in the recipe")
    found: Configured = []
    unused = set(shared)
    for number, mapping in enumerate(wanted):
        if "name" not in mapping:
            raise UserError(f"sources[{number}] has no name; known are {', '.join(sources.names())}")
        keys = {key: value for key, value in mapping.items() if key != "name"}
        model = sources.find(mapping["name"]).Config
        own = {key: value for key, value in shared.items() if key in model.model_fields}
        unused -= set(own)
        found.append((mapping["name"], validate(model, keys | own, f"source {mapping['name']}")))
    if unused:
        known = sorted({key for _, config in found for key in type(config).model_fields})
        raise UserError(
            f"source.{min(unused)} is a key of no source given here; they have {', '.join(known) or 'none'}"
        )
    return found


PIDS, CAMIDS = 1_000_000, 100  # identities and cameras that a source may have where labels are offset


def _offset(record: Record, number: int) -> Record:
    """With the labels of the n-th of several sources; junk, distractors and unknown ones stay what they are."""
    pid, camid = record.pid, record.camid
    if (pid or 0) >= PIDS or (camid or 0) >= CAMIDS:
        raise UserError(
            f"{record.origin or record.key}: packing.offset_labels has room for identities below {PIDS:,} and cameras "
            f"below {CAMIDS}, not for pid {pid}, camid {camid}; pack this source alone"
        )
    pid = pid + number * PIDS if pid is not None and pid > 0 else pid
    return dataclasses.replace(record, pid=pid, camid=None if camid is None else camid + number * CAMIDS)


def gather(configured: Configured, drop_labels: bool = False, offset_labels: bool = False) -> Iterator[Record]:
    """The records of all sources; with several ones, the keys of the n-th begin with `s<n>/`.

    Identities of several sources may collide, so a second source with labels is a UserError unless they are dropped or
    offset.
    """
    labelled: str | None = None
    for number, (name, config) in enumerate(configured):
        told = False
        for record in sources.find(name).records(config):
            if len(configured) == 1:
                yield record
                continue
            if offset_labels:
                record = _offset(record, number)
            elif not told and not drop_labels and (record.pid is not None or record.camid is not None):
                if labelled is not None:
                    raise UserError(
                        f"{labelled} and {name} both have labels, which may collide; pack each alone, or set "
                        "packing.offset_labels=true, or packing.drop_labels=true"
                    )
                labelled, told = name, True
            yield dataclasses.replace(record, key=f"s{number}/{record.key}")


def described(configured: Configured) -> list[dict[str, Any]]:
    """What manifests and results say of the sources: name, published title where there is one, settings."""
    told = []
    for name, config in configured:
        published = getattr(sources.find(name), "published", None)
        title = {"title": published(config).title} if published else {}
        told.append({"name": name, **title, **config.model_dump()})
    return told


def build_set(
    wanted: list[dict[str, Any]],
    out: Path | str,
    packing: PackingConfig,
    images: ImagesConfig,
    shared: dict[str, Any] | None = None,
) -> Manifest:
    """Pack the sources of a recipe (mappings with `name` and that source's keys) into the shard set `out`.

    shared: keys that go to every source that has them. Labels of several sources may collide, so more than one source
    with labels needs `packing.offset_labels` or `packing.drop_labels`.
    """
    configured = configure(wanted, shared or {})
    here = Path(out).resolve()
    for name, config in configured:
        inside = getattr(config, "path", None)
        if inside is not None and here.is_relative_to(Path(inside).resolve()):
            raise UserError(f"--out {out} lies inside {inside}, which is read as source {name}; choose a place outside")
    return pack(
        gather(configured, packing.drop_labels, packing.offset_labels), out, packing, images, described(configured)
    )
