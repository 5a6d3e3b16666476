"""A packed set again with its queries cut: a part of the height is gone, above or below, as a bad detection leaves it.

For testing how a model stands people who are not whole: the same set whole and cropped, the same queries, the same
gallery. Which part of an image stays is a function of the seed and of its place in the split.
"""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from recipes.load import Section
from shards.images import decode
from shards.manifests import read_manifest
from shards.packed import PackedSplit
from shards.schema import SPLITS, UNKNOWN, Published, Record
from shards.seeds import generator

Split = Literal["train", "query", "gallery", "unlabeled"]
QUALITY = 95  # of the JPEG of a cut image


class Config(Section):
    """Which set, and how much stays."""

    path: Path  # a packed set
    cut: tuple[Split, ...] = ("query",)  # splits that are cut
    copy_whole: tuple[Split, ...] = ("gallery",)  # splits that are taken as they are; others are left away
    keep: tuple[float, float] = (0.5, 0.9)  # share of the height that stays, drawn evenly between these for each image
    side: Literal["top", "bottom", "either"] = "either"  # which part stays: the upper one, the lower one, one of them
    seed: int = Field(0, ge=0)

    @field_validator("keep")
    @classmethod
    def _shares(cls, keep: tuple[float, float]) -> tuple[float, float]:
        if not 0 < keep[0] <= keep[1] <= 1:
            raise ValueError(f"keep must be two shares of the height, the smaller one first, in (0, 1], not {keep}")
        return keep


def cropped(data: bytes, config: Config, split: str, row: int) -> bytes:
    """An encoded image without a part of its height, as a JPEG. row: its place in the split."""
    random = generator(config.seed, f"cropped {split}", row)
    share, below = float(random.uniform(*config.keep)), bool(random.integers(2))
    image = decode(data)
    height = max(1, round(share * image.height))
    lower = below if config.side == "either" else config.side == "bottom"
    top = image.height - height if lower else 0
    buffer = io.BytesIO()
    image.crop((0, top, image.width, top + height)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _read(part: PackedSplit, row: int) -> bytes:
    return part[row].image


def _read_cut(part: PackedSplit, row: int, config: Config, split: str) -> bytes:
    return cropped(part[row].image, config, split, row)


def published(config: Config) -> Published:
    """Its name; nobody published counts."""
    sources = read_manifest(config.path).sources
    title = " + ".join(str(source.get("title", source["name"])) for source in sources)
    share = f"{config.keep[0]:g} to {config.keep[1]:g}"
    return Published(f"{title}, {' and '.join(config.cut)} cut to {share} of the height", "made from a packed set", {})


def records(config: Config) -> Iterator[Record]:
    """The cut splits and the whole ones, in the order of the set."""
    manifest = read_manifest(config.path)
    for split in SPLITS:
        if split not in manifest.splits or split not in (*config.cut, *config.copy_whole):
            continue
        part = PackedSplit(str(config.path), manifest, split, None, captions=False)
        keys, pids, camids = (part.column(name) for name in ("key", "pid", "camid"))
        for row, (key, pid, camid) in enumerate(zip(keys, pids, camids, strict=True)):
            name = key.decode("utf-8", "surrogateescape")
            labels = (None if value == UNKNOWN else int(value) for value in (pid, camid))
            read = partial(_read_cut, part, row, config, split) if split in config.cut else partial(_read, part, row)
            yield Record(name, split, read, *labels, origin=f"{config.path}: {name}")
