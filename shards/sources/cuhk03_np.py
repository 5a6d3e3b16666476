"""CUHK03 (Li et al., CVPR 2014) in the new protocol (Zhong et al., CVPR 2017): 767 identities to train on, 700 to test.

Images, "detected": 7,365 train, 1,400 query, 5,332 gallery; "labeled": 7,368, 1,400, 5,328. Names are
`PPPP_cCsS_NNNNNN_KK.jpg`, C being the view (1 or 2) in a pair of cameras.
"""

from collections.abc import Iterator
from pathlib import Path

from recipes.load import Section
from shards.market_style import read_folders
from shards.schema import Record

CAMERAS = 2


class Config(Section):
    """Where the set lies."""

    path: Path  # the folder with bounding_box_train, query, bounding_box_test


def records(config: Config) -> Iterator[Record]:
    """Train, query and gallery."""
    return read_folders(config.path, "CUHK03-NP", CAMERAS)
