"""SynergyReID (Van Zandycke et al., DeepSportradar-v1, 2022): basketball players, referees and coaches.

Images: 8,569 of 436 identities in reid_training, 50 queries and 910 gallery images of 50 others in reid_test. Names are
`identity_sequence_frame.jpeg`. All frames come from one viewpoint; to rank them as two cameras would be, queries (the
first frame of a sequence) are camera 0 and the gallery (later frames) is camera 1, as in the challenge's own code.
The images of reid_challenge have no published identity and differ from year to year.
"""

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from recipes.errors import UserError
from recipes.load import Section
from shards.raw.market_style import image_names
from shards.raw.walking import make_key, read_file, without_suffix
from shards.schema import Published, Record

FOLDERS = {"reid_training": ("train", 0), "reid_test/query": ("query", 0), "reid_test/gallery": ("gallery", 1)}
CHALLENGE = {"reid_challenge/query": 0, "reid_challenge/gallery": 1}  # folder -> camera
NESTED = ("", "data_reid", "raw/data_reid", "raw")  # folders that the archive of the set unpacks to
NAME = re.compile(r"(\d+)_(\d+)_(\d+)")


class Config(Section):
    """Where the set lies."""

    path: Path  # the folder with reid_training and reid_test, or one above it
    challenge: Literal["leave", "unlabeled"] = "leave"  # images of reid_challenge: leave out, or add without labels


def published(config: Config) -> Published:
    """Counts of training and test set; those of the challenge differ from year to year."""
    splits = {"train": (8_569, 436), "query": (50, 50), "gallery": (910, 50)}
    return Published("SynergyReID", "Van Zandycke et al., DeepSportradar-v1, MMSports 2022", splits)


def _find_root(path: Path) -> Path:
    for nested in NESTED:
        if all((path / nested / folder).is_dir() for folder in FOLDERS):
            return path / nested
    raise UserError(f"{path} is no folder of SynergyReID; it should hold {', '.join(FOLDERS)}")


def _names(folder: Path) -> list[str]:
    names = image_names(folder)
    if not names:
        raise UserError(f"{folder} holds no images; unpack SynergyReID again")
    return names


def _record(root: Path, folder: str, name: str, split: str, pid: int | None, camid: int) -> Record:
    path = os.path.join(root, folder, name)
    key = make_key(f"{folder}/{without_suffix(name)}")
    return Record(key, split, partial(read_file, path), pid, camid, origin=path)


def records(config: Config) -> Iterator[Record]:
    """Train, query and gallery, and the challenge if it is wanted; identities are the set's number + 1, so never 0."""
    root = _find_root(config.path)
    for folder, (split, camid) in FOLDERS.items():
        for name in _names(root / folder):
            match = NAME.match(name)
            if not match:
                raise UserError(
                    f"{root / folder / name} is not named like an image of SynergyReID (0001_0002_0003.jpeg)"
                )
            yield _record(root, folder, name, split, int(match[1]) + 1, camid)
    for folder, camid in CHALLENGE.items() if config.challenge == "unlabeled" else ():
        if not (root / folder).is_dir():
            raise UserError(f"{root} has no {folder}; without it, set source.challenge=leave")
        for name in _names(root / folder):
            yield _record(root, folder, name, "unlabeled", None, camid)
