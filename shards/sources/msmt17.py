"""MSMT17 (Wei et al., CVPR 2018): 15 cameras, 1,041 identities to train on, 3,060 to test on.

V1 lies in `train` and `test`, V2, where faces are blurred, in `mask_train_v2` and `mask_test_v2`; the lists are the
same. Published results are on V1, and on V2 they come out 1.7 to 3.9 mAP lower, so every title names the version.

The set counts identities from 0 in training and again from 0 in testing, for other people; and 0 means distractor here.
So training identities become 1 to 1,041 (number + 1) and test identities 1,042 to 4,101 (number + 1,042).
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from recipes.errors import UserError
from recipes.load import Section
from shards.raw.missing_files import Presence, inside
from shards.raw.walking import make_key, read_file, without_suffix
from shards.schema import Published, Record

FOLDERS = {"V1": ("train", "test"), "V2": ("mask_train_v2", "mask_test_v2")}
NESTED = ("MSMT17_V1", "MSMT17_V2", "MSMT17")  # folders that the archives of the set unpack to
LISTS = {"train": "list_train.txt", "val": "list_val.txt", "query": "list_query.txt", "gallery": "list_gallery.txt"}
IDENTITIES = {"train": 1_041, "test": 3_060}
CAMERAS = 15


class Config(Section):
    """Where the set lies and what its validation images are for."""

    path: Path  # the folder with the lists and the two folders of a version, or the one above it
    val: Literal["train", "leave"] = "train"  # train: list_val.txt is training data too (32,621 images, as PersonViT,
    # TransReID and SOLIDER have it); leave: it is left out (30,248, as fast-reid has it)


def find_version(path: Path) -> tuple[Path, str]:
    """The folder with the lists, and 'V1' or 'V2'. UserError if there is none or more than one."""
    if not path.is_dir():
        raise UserError(f"MSMT17 folder {path} does not exist; it should hold the lists and train, test (V1)")
    found = [
        (root, version)
        for root in (path, *(path / name for name in NESTED))
        for version, folders in FOLDERS.items()
        if all((root / folder).is_dir() for folder in folders)
    ]
    if len(found) > 1:
        both = " and ".join(f"{version} in {root}" for root, version in found)
        raise UserError(f"{path} holds MSMT17 {both}; results differ, so give a folder with one of them")
    if not found:
        mirror = (path / "bounding_box_train").is_dir()
        why = "; a mirror sorted into bounding_box_train does not tell V1 from V2" if mirror else ""
        raise UserError(f"{path} holds neither train, test (MSMT17 V1) nor mask_train_v2, mask_test_v2 (V2){why}")
    root, version = found[0]
    lost = [name for name in LISTS.values() if not (root / name).is_file()]
    if lost:
        raise UserError(f"MSMT17 folder {root} lacks {', '.join(lost)}; unpack the set again")
    return root, version


def published(config: Config) -> Published:
    """Counts of the version that lies there, with the validation images as the config has them."""
    _, version = find_version(config.path)
    train = 32_621 if config.val == "train" else 30_248
    splits = {"train": (train, IDENTITIES["train"]), "query": (11_659, 3_060), "gallery": (82_161, 3_060)}
    title = f"MSMT17 {version}" + ("" if config.val == "train" else " without val")
    return Published(title, "Wei et al., Person Transfer GAN to Bridge Domain Gap, CVPR 2018", splits)


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """Relative path and identity number of each line of a list."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            name, _, identity = line.strip().rpartition(" ")
            if not name or not identity.isdecimal():
                raise UserError(f"line {number} of {path} is not of the form PATH IDENTITY: {line.strip()[:80]!r}")
            yield inside(name, path), int(identity)


def _camera(name: str, path: Path) -> int:
    fields = os.path.basename(name).split("_")
    if len(fields) < 3 or not fields[2].isdecimal() or not 1 <= int(fields[2]) <= CAMERAS:
        raise UserError(f"{name} in {path} does not name a camera from 1 to {CAMERAS} between its second and third '_'")
    return int(fields[2]) - 1


def records(config: Config) -> Iterator[Record]:
    """Train (with or without val), query and gallery. UserError at the end if listed images are not there."""
    root, version = find_version(config.path)
    presence = Presence(f"MSMT17 {version}")
    for part, list_name in LISTS.items():
        if part == "val" and config.val == "leave":
            continue
        half = "train" if part in ("train", "val") else "test"
        folder = FOLDERS[version][half == "test"]
        shift = 1 if half == "train" else 1 + IDENTITIES["train"]
        for name, identity in _lines(root / list_name):
            if identity >= IDENTITIES[half]:
                raise UserError(
                    f"{root / list_name} has identity {identity}; MSMT17 has 0 to {IDENTITIES[half] - 1} there"
                )
            camid = _camera(name, root / list_name)
            path = os.path.join(root, folder, name)
            if presence.check(path):
                key, split = make_key(f"{folder}/{without_suffix(name)}"), "train" if half == "train" else part
                yield Record(key, split, partial(read_file, path), identity + shift, camid, origin=path)
    presence.finish()
