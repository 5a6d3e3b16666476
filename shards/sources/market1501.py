"""Market-1501 (Zheng et al., ICCV 2015): 6 cameras, 751 identities to train on, 750 to test on.

Images: 12,936 in bounding_box_train, 3,368 in query, 15,913 in bounding_box_test without the 3,819 junk ones.
"""

from collections.abc import Iterator
from pathlib import Path

from recipes.load import Section
from shards.market_style import read_folders
from shards.schema import Record

CAMERAS = 6


class Config(Section):
    """Where the set lies."""

    path: Path  # the folder with bounding_box_train, query, bounding_box_test, or the one above it
    keep_junk: bool = False  # also pack the junk detections (pid -1), which the published protocol does not load


def records(config: Config) -> Iterator[Record]:
    """Train, query and gallery; distractors keep pid 0."""
    return read_folders(config.path, "Market-1501", CAMERAS, config.keep_junk)
