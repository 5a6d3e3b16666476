"""Any folder of person crops, searched recursively; no labels."""

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from recipes.errors import UserError
from recipes.load import Section
from shards.market_style import read_file
from shards.schema import Record

NOT_IMAGES = {"thumbs.db", "desktop.ini"}  # what file managers leave behind


class Config(Section):
    """Which files of which folder, and what they are for."""

    path: Path  # searched with all folders below it; names that begin with a dot are passed over
    split: Literal["train", "query", "gallery", "unlabeled"] = "unlabeled"
    suffixes: list[str] | None = None  # endings to take, for example [jpg, png]; None = every file must be an image


def _files(root: Path) -> Iterator[Path]:
    """Regular files below root, sorted within each folder; links are followed, each folder is entered once."""
    entered: set[str] = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            inner.clear()
            continue
        entered.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and name.lower() not in NOT_IMAGES and path.is_file():
                yield path


def _key(path: Path, root: Path, taken: set[str]) -> str:
    """Path below root without suffix as a key; the suffix and then a number is added where that name is taken."""
    stem = re.sub(r"[.\s]", "_", str(path.relative_to(root).with_suffix("")))
    stem = re.sub(r"^__", "_", stem)  # webdataset passes over what lies in a folder like __this__
    key = stem
    if key in taken:
        stem = key = f"{stem}_{path.suffix[1:]}"
    number = 2
    while key in taken:
        key, number = f"{stem}_{number}", number + 1
    taken.add(key)
    return key


def records(config: Config) -> Iterator[Record]:
    """One record a file, in the order of the paths."""
    root = config.path
    if not root.is_dir():
        raise UserError(f"image folder {root} does not exist; give the folder that holds the crops")
    endings = None if config.suffixes is None else tuple("." + ending.lower().lstrip(".") for ending in config.suffixes)
    taken: set[str] = set()
    for path in _files(root):
        if endings is None or path.name.lower().endswith(endings):
            read = functools.partial(read_file, path)
            yield Record(_key(path, root, taken), config.split, read, origin=str(path))
    if not taken:
        what = f" with the ending {', '.join(endings)}" if endings else ""
        raise UserError(f"{root} holds no images{what}; give the folder that holds the crops, or one above it")
