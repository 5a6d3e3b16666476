"""Folders in the style of Market-1501: three sub-folders, identity and camera in the file name.

Names are `PPPP_cC...` (for example `0002_c1s1_000451_03.jpg`): P identity, -1 for junk, 0 for a distractor, and C the
camera, counted from 1 in the name and from 0 here.
"""

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from recipes.errors import UserError
from shards.raw.walking import IMAGE_ENDINGS, read_file, without_suffix
from shards.schema import Record

FOLDERS = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}  # sub-folder -> split
NAME = re.compile(r"(-?\d+)_c(\d+)")


def find_root(path: Path, dataset: str) -> Path:
    """The folder that holds the three sub-folders: `path`, or the one folder directly inside it that does."""
    if not path.is_dir():
        raise UserError(f"{dataset} folder {path} does not exist; it should hold {', '.join(FOLDERS)}")
    missing = [name for name in FOLDERS if not (path / name).is_dir()]
    if not missing:
        return path
    inside = [child for child in sorted(path.iterdir()) if all((child / name).is_dir() for name in FOLDERS)]
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise UserError(f"{path} holds more than one {dataset} set; give one of {', '.join(map(str, inside))}")
    raise UserError(
        f"{dataset} folder {path} lacks {', '.join(missing)}; expected are the sub-folders {', '.join(FOLDERS)}"
    )


def image_names(folder: Path) -> list[str]:
    """Names of the images directly in a folder, sorted; files that are no images are passed over."""
    names = (entry.name for entry in os.scandir(folder) if entry.is_file())
    return sorted(name for name in names if name.lower().endswith(IMAGE_ENDINGS) and name[0] != ".")


def _record(root: Path, folder: str, name: str, cameras: int, dataset: str) -> Record:
    path = os.path.join(root, folder, name)
    match = NAME.match(name)
    if not match:
        raise UserError(
            f"{path} is not named like an image of {dataset} (identity_cCAMERA..., 0002_c1s1_000451_03.jpg)"
        )
    pid, camera = int(match[1]), int(match[2])
    if not 1 <= camera <= cameras:
        raise UserError(f"{path} names camera {camera}; {dataset} has the cameras 1 to {cameras}")
    key = f"{folder}/{without_suffix(name)}".replace(".", "_")
    return Record(key, FOLDERS[folder], partial(read_file, path), pid=pid, camid=camera - 1, origin=path)


def read_folders(path: Path, dataset: str, cameras: int, keep_junk: bool = False) -> Iterator[Record]:
    """Records of the three sub-folders, each in the order of its names; files that are no images are passed over.

    cameras: the highest camera number in a name. keep_junk: give the images of identity -1 too, which the published
    protocol leaves out when it loads.
    """
    root = find_root(path, dataset)
    for folder in FOLDERS:
        names = image_names(root / folder)
        if not names:
            raise UserError(f"{root / folder} holds no images; unpack {dataset} again")
        for name in names:
            record = _record(root, folder, name, cameras, dataset)
            if record.pid != -1 or keep_junk:
                yield record
