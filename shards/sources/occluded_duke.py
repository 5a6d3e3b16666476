"""Occluded-Duke (Miao et al., ICCV 2019): DukeMTMC-reID split anew, so that every query is occluded.

Withdrawn with DukeMTMC in 2019; read from a local copy only. 8 cameras; images: 15,618 of 702 identities to train,
2,210 queries of 519, a gallery of 17,661 of 1,110.
"""

from collections.abc import Iterator
from pathlib import Path

from recipes.load import Section
from shards.raw.market_style import read_folders
from shards.raw.withdrawn import require_acknowledgement
from shards.schema import Published, Record

CAMERAS = 8
TITLE = "Occluded-Duke"


class Config(Section):
    """Where the local copy lies."""

    path: Path  # the folder with bounding_box_train, query, bounding_box_test, or the one above it
    acknowledge_withdrawn: bool = False  # you know that the set was withdrawn for privacy, and may use your copy


def published(config: Config) -> Published:
    """Counts of the paper."""
    splits = {"train": (15_618, 702), "query": (2_210, 519), "gallery": (17_661, 1_110)}
    return Published(f"{TITLE} (withdrawn)", "Miao et al., Pose-Guided Feature Alignment, ICCV 2019", splits)


def records(config: Config) -> Iterator[Record]:
    """Train, query and gallery."""
    require_acknowledgement(TITLE, config.acknowledge_withdrawn)
    return read_folders(config.path, TITLE, CAMERAS)
