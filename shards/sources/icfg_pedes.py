"""ICFG-PEDES (Ding et al., 2021): 54,522 images of 4,102 people out of MSMT17, with one sentence each.

Images: 34,674 of 3,102 identities to train on, 19,848 of 1,000 others to test; there is no validation part. A file that
is listed twice becomes one image with both sentences, so a count may come out one lower than published.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from recipes.load import Section
from shards.raw.captioned import Choice, captioned_records, find_images, find_list, published_splits, read_list
from shards.schema import Published, Record

TITLE = "ICFG-PEDES"
LISTS = ("ICFG-PEDES.json", "ICFG_PEDES.json")
COUNTS = {"train": (34_674, 3_102), "test": (19_848, 1_000)}


class Config(Section):
    """Where the set lies and what its parts are for."""

    path: Path  # the folder with ICFG-PEDES.json and imgs
    missing: Literal["error", "skip"] = "error"  # images that are listed but not there: refuse, or leave out


def _choice(config: Config) -> Choice:
    return Choice(missing=config.missing)


def published(config: Config) -> Published:
    """Counts of the paper for the splits as the config has them."""
    return Published(
        TITLE,
        "Ding et al., Semantically Self-Aligned Network for Text-to-Image Part-aware Person Re-identification, 2021",
        published_splits(COUNTS, _choice(config)),
    )


def records(config: Config) -> Iterator[Record]:
    """Training images, and as gallery the test images, whose captions are the queries (shards/raw/captioned.py)."""
    images = find_images(config.path, TITLE)
    entries = read_list(find_list(config.path, LISTS, TITLE))
    return captioned_records(entries, images, TITLE, _choice(config))
