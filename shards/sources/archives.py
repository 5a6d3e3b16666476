"""Any tars and zips of person crops, whole or cut into parts, read where they lie; no labels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from recipes.load import Section
from shards.raw.archives import archive_records
from shards.raw.walking import IMAGE_ENDINGS, with_dots
from shards.schema import Record


class Config(Section):
    """Which images of which archives, and what they are for."""

    path: Path  # one .tar or .zip, the first part of one (.tar.001), or a folder searched with all folders below it
    split: Literal["train", "query", "gallery", "unlabeled"] = "unlabeled"
    suffixes: list[str] | None = None  # endings to take; None = jpg, jpeg, png, bmp, webp. Others are passed over
    keys: Literal["path", "basename"] = "path"  # path: archive and name of the member; basename: its last part only


def records(config: Config) -> Iterator[Record]:
    """One record an image, archive after archive."""
    endings = IMAGE_ENDINGS if config.suffixes is None else with_dots(config.suffixes)
    return archive_records(config.path, config.split, endings, config.keys == "basename")
