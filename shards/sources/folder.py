"""Any folder of person crops, searched recursively; no labels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from recipes.errors import UserError
from recipes.load import Section
from shards.raw.walking import file_records, walk_files, with_dots
from shards.schema import Record


class Config(Section):
    """Which files of which folder, and what they are for."""

    path: Path  # searched with all folders below it; names that begin with a dot are passed over
    split: Literal["train", "query", "gallery", "unlabeled"] = "unlabeled"
    suffixes: list[str] | None = None  # endings to take, for example [jpg, png]; None = every file must be an image
    keep_suffix: bool = False  # make the ending part of the key (a_jpg), where a.jpg and a.png are two images


def records(config: Config) -> Iterator[Record]:
    """One record a file as the walk meets it; the key is the path below the folder."""
    root = config.path
    if not root.is_dir():
        raise UserError(f"image folder {root} does not exist; give the folder that holds the crops")
    endings = None if config.suffixes is None else with_dots(config.suffixes)
    empty = True
    for record in file_records(walk_files(root), config.split, endings, config.keep_suffix):
        empty = False
        yield record
    if empty:
        what = f" with the ending {', '.join(endings)}" if endings else ""
        raise UserError(f"{root} holds no images{what}; give the folder that holds the crops, or one above it")
