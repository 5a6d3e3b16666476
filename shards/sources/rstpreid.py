"""RSTPReid (Zhu et al., ACM MM 2021): 20,505 images of 4,101 people out of MSMT17, five each, with two sentences each.

Images: 18,505 of 3,701 identities to train on, 1,000 of 200 each for validation and test. The first release of the list
had another split (19,505, 500 and 500 images); its authors have corrected it.
"""

from collections.abc import Iterator
from pathlib import Path

from shards.raw.captioned import Choice, captioned_records, find_images, find_list, published_splits, read_list
from shards.schema import Published, Record

TITLE = "RSTPReid"
LISTS = ("data_captions.json",)
COUNTS = {"train": (18_505, 3_701), "val": (1_000, 200), "test": (1_000, 200)}


class Config(Choice):
    """Where the set lies, and what its parts are for."""

    path: Path  # the folder with data_captions.json, and imgs


def published(config: Config) -> Published:
    """Counts of the paper for the splits as the config has them."""
    return Published(
        TITLE,
        "Zhu et al., DSSL: Deep Surroundings-person Separation Learning, ACM MM 2021",
        published_splits(COUNTS, config),
    )


def records(config: Config) -> Iterator[Record]:
    """Training images, and as gallery the test images, whose captions are the queries (shards/raw/captioned.py)."""
    images = find_images(config.path, TITLE)
    entries = read_list(find_list(config.path, LISTS, TITLE), "img_path")
    return captioned_records(entries, images, TITLE, config)
