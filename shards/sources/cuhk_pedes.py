"""CUHK-PEDES (Li et al., CVPR 2017): 40,206 images of 13,003 people with about two sentences each.

Images: 34,054 of 11,003 identities to train on, 3,078 and 3,074 of 1,000 each for validation and test. Read are the raw
release (`reid_raw.json`, one list) and the form with `annotations/{train,val,test}.json`, one sentence an entry.
"""

from collections.abc import Iterator
from pathlib import Path

from shards.raw.captioned import (
    PARTS,
    Choice,
    Entry,
    captioned_records,
    find_images,
    find_list,
    published_splits,
    read_list,
)
from shards.schema import Published, Record

TITLE = "CUHK-PEDES"
LISTS = ("reid_raw.json", "caption_all.json")
COUNTS = {"train": (34_054, 11_003), "val": (3_078, 1_000), "test": (3_074, 1_000)}


class Config(Choice):
    """Where the set lies, and what its parts are for."""

    path: Path  # the folder with reid_raw.json or annotations, and imgs


def published(config: Config) -> Published:
    """Counts of the paper for the splits as the config has them."""
    return Published(
        TITLE,
        "Li et al., Person Search with Natural Language Description, CVPR 2017",
        published_splits(COUNTS, config),
    )


def _entries(path: Path) -> list[Entry]:
    if (path / "annotations").is_dir():
        found = [(part, path / "annotations" / f"{part}.json") for part in PARTS]
        return [entry for part, file in found for entry in read_list(file, part=part)]
    return read_list(find_list(path, LISTS, TITLE))


def records(config: Config) -> Iterator[Record]:
    """Training images, and as gallery the test images, whose captions are the queries (shards/raw/captioned.py)."""
    images = find_images(config.path, TITLE)
    return captioned_records(_entries(config.path), images, TITLE, config)
