"""The contract of the data: what a source yields, what a shard holds, what the reader gives.

A shard is a plain webdataset tar: for each sample `<key>.<jpg|png|...>` followed by `<key>.json` with the label
fields. `manifest.json` beside the tars describes the set, `index-<split>.npy` locates every sample of a split.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from recipes.errors import UserError
from recipes.load import Section

UNKNOWN = -2  # pid or camid of a sample without label, in integer arrays; -1 is junk, 0 a distractor (Market-1501)
SPLITS = ("train", "query", "gallery", "unlabeled")
MANIFEST = "manifest.json"
FORMAT_VERSION = 2


class BadSample(UserError):
    """The bytes of one sample are damaged, missing or no image. A loader may put another sample in its place."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image as a source yields it."""

    key: str  # unique in the source; no dot, no white space; '/' allowed
    split: str  # one of SPLITS
    read: Callable[[], bytes]  # the encoded image; picklable
    pid: int | None = None  # identity; -1 junk, 0 distractor, None unknown
    camid: int | None = None  # camera, 0-based
    captions: tuple[str, ...] = ()
    origin: str = ""  # path or description, for messages


class Sample(NamedTuple):
    """One image as the reader gives it."""

    key: str
    image: bytes  # encoded
    pid: int  # UNKNOWN if the sample has none
    camid: int
    captions: tuple[str, ...]


class Published(NamedTuple):
    """What a data set holds according to its authors."""

    title: str  # name with its version, for example "MSMT17 V2"; goes into manifests and results
    paper: str  # where the counts come from
    splits: dict[str, tuple[int, int | None]]  # split -> images, identities (None = not published)


class ShardEntry(Section):
    """One tar of a set."""

    name: str
    split: str
    samples: int
    size: int  # bytes
    crc32: int  # of the whole file


class SplitCount(Section):
    """What a split holds."""

    images: int
    identities: int  # distinct pids > 0
    cameras: int
    index_size: int  # bytes of the sample index
    index_crc32: int


class Manifest(Section):
    """What a shard set is; written last, so a folder with a manifest is complete."""

    format_version: int
    sources: list[dict]  # the source configs that the set was packed from
    packing: dict  # the writer's config
    splits: dict[str, SplitCount]
    shards: list[ShardEntry]
    skipped: int = 0  # images left out because they could not be read


def shard_name(split: str, number: int) -> str:
    """File name of a shard, for example `train-000003.tar`."""
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    """File name of the sample index of a split."""
    return f"index-{split}.npy"
