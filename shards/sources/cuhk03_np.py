"""CUHK03 (Li et al., CVPR 2014) in the new protocol (Zhong et al., CVPR 2017): 767 identities to train on, 700 to test.

Images, "detected": 7,365 train, 1,400 query, 5,332 gallery; "labeled": 7,368, 1,400, 5,328. Names are
`PPPP_cCsS_NNNNNN_KK.jpg`, C being the view (1 or 2) in a pair of cameras.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from recipes.errors import UserError
from recipes.load import Section
from shards.raw.market_style import find_root, image_names, read_folders
from shards.schema import Published, Record

CAMERAS = 2
TITLE = "CUHK03-NP"
COUNTS = {"detected": (7_365, 5_332), "labeled": (7_368, 5_328)}  # variant -> images in train and gallery
FOLDERS = {"detected": ("detected",), "labeled": ("labeled", "labelled")}  # variant -> what its folder is called


class Config(Section):
    """Where the set lies and which of its two variants it is."""

    path: Path  # the folder with bounding_box_train, query, bounding_box_test, or the one above it
    variant: Literal["detected", "labeled"] | None = None  # boxes by a detector or by hand; None = found out by the
    # number of images, and if that fits neither, by the name of the folder


def _root(config: Config) -> Path:
    """The folder of the variant: the set is published with both, one in a folder each."""
    for name in FOLDERS.get(config.variant or "", ()):
        if (config.path / name).is_dir():
            return find_root(config.path / name, TITLE)
    return find_root(config.path, TITLE)


def _by_count(root: Path) -> str | None:
    """The variant whose published numbers of images the folder has exactly."""
    found = tuple(len(image_names(root / folder)) for folder in ("bounding_box_train", "bounding_box_test"))
    return next((variant for variant, counts in COUNTS.items() if counts == found), None)


def find_variant(config: Config) -> str | None:
    """'detected', 'labeled', or None if neither the config nor the folder tells. UserError if they disagree."""
    root = _root(config)
    counted = _by_count(root)
    if config.variant and counted and counted != config.variant:
        raise UserError(
            f"{root} has exactly the images of {TITLE} {counted}, but source.variant={config.variant}; give the other "
            "folder or change the key"
        )
    names = "/".join(root.parts[-2:]).lower()
    named = [variant for variant, mark in (("detected", "detect"), ("labeled", "label")) if mark in names]
    return config.variant or counted or (named[0] if len(named) == 1 else None)


def published(config: Config) -> Published:
    """Counts of the variant; where it is not known, only those that both have in common."""
    paper = "Zhong et al., Re-ranking with k-reciprocal Encoding, CVPR 2017"
    variant = find_variant(config)
    if variant is None:
        return Published(f"{TITLE} (detected or labeled: unknown)", paper, {"query": (1_400, 700)})
    train, gallery = COUNTS[variant]
    splits = {"train": (train, 767), "query": (1_400, 700), "gallery": (gallery, 700)}
    return Published(f"{TITLE} {variant}", paper, splits)


def records(config: Config) -> Iterator[Record]:
    """Train, query and gallery."""
    find_variant(config)
    return read_folders(_root(config), TITLE, CAMERAS)
