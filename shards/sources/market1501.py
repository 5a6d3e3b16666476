"""Market-1501 (Zheng et al., ICCV 2015): 6 cameras, 751 identities to train on, 750 to test on.

Images: 12,936 in bounding_box_train, 3,368 in query, 15,913 in bounding_box_test without the 3,819 junk ones.
"""

from collections.abc import Iterator
from pathlib import Path

from recipes.load import Section
from shards.raw.market_style import read_folders
from shards.schema import Published, Record

CAMERAS = 6
GALLERY, JUNK = 15_913, 3_819  # images


class Config(Section):
    """Where the set lies."""

    path: Path  # the folder with bounding_box_train, query, bounding_box_test, or the one above it
    keep_junk: bool = False  # also pack the junk detections (pid -1), which the published protocol does not load


def published(config: Config) -> Published:
    """Counts of the protocol; distractors (pid 0) and junk are images but no identity."""
    gallery = GALLERY + JUNK if config.keep_junk else GALLERY
    splits = {"train": (12_936, 751), "query": (3_368, 750), "gallery": (gallery, 750)}
    return Published("Market-1501", "Zheng et al., Scalable Person Re-identification, ICCV 2015", splits)


def records(config: Config) -> Iterator[Record]:
    """Train, query and gallery; distractors keep pid 0."""
    return read_folders(config.path, "Market-1501", CAMERAS, config.keep_junk)
