"""LUPerson (Fu et al., CVPR 2021) in whatever shape it came, without labels: 4,180,243 images of some 200,000 people.

It goes around as an LMDB of JPEG bytes under keys CC_cc_VVVV_NNNNNNNN (country, city, video, image), as a folder of
files of these names, as folders by country and city, and as tars or zips, often cut into parts. LUPerson-NL (Fu et al.,
CVPR 2022) is another set, with 10,683,716 images, that looks the same and is often taken for it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from recipes.errors import UserError
from recipes.load import Section
from shards.name_lists import read_names
from shards.raw.archives import archive_records, is_archive
from shards.raw.lmdb_files import FILE, find_lmdb, look_up, pack_names, reader, walk_keys
from shards.raw.walking import IMAGE_ENDINGS, file_records, make_key, walk_files, without_suffix
from shards.schema import Published, Record

SETS = {
    "luperson": Published(
        "LUPerson (not LUPerson-NL)",
        "Fu et al., Unsupervised Pre-training for Person Re-identification, CVPR 2021",
        {"unlabeled": (4_180_243, None)},
    ),
    "luperson_nl": Published(
        "LUPerson-NL (not LUPerson)",
        "Fu et al., Large-Scale Pre-training for Person Re-identification with Noisy Labels, CVPR 2022",
        {"unlabeled": (10_683_716, None)},
    ),
    "none": Published("images in a shape of LUPerson", "no published count: expect is none", {}),
}
KEY_LIST = "keys.pkl"  # beside the LMDB or in its folder


class Config(Section):
    """Where the set lies and which one it is."""

    path: (
        Path  # an LMDB (its folder, the folder above, or data.mdb), a folder of images, or archives (one, or a folder)
    )
    expect: Literal["luperson", "luperson_nl", "none"] = (
        "luperson"  # whose published count holds; none: a part, or else
    )
    keys: Literal["basename", "path"] | None = None  # a sample goes by the name of its file, as in the published CFS
    # list, or by the whole path, which is unique; None = path where images lie in several folders, else basename
    missing: Literal["error", "skip"] = "error"  # names of keys.pkl that the LMDB does not have: refuse, or leave out


def published(config: Config) -> Published:
    """The counts of the set that `expect` names."""
    return SETS[config.expect]


def records(config: Config) -> Iterator[Record]:
    """One record an image. UserError at the end if there are exactly as many as in the set that was not expected."""
    count = 0
    for record in _find(config):
        count += 1
        yield record
    for name, other in SETS.items():
        if "none" not in (name, config.expect) and name != config.expect and other.splits["unlabeled"][0] == count:
            raise UserError(
                f"{config.path} holds {count:,} images: that is {other.title}, while source.expect={config.expect} "
                f"stands for {SETS[config.expect].splits['unlabeled'][0]:,}; set source.expect={name} if you want it"
            )


def _find(config: Config) -> Iterator[Record]:
    """The records of whichever shape the path has."""
    path = config.path
    if not path.exists():
        raise UserError(f"{path} does not exist; give LUPerson's LMDB, its folder of images, or its archives")
    file = find_lmdb(path)
    if file is not None:
        return _from_lmdb(file, config)
    if path.is_file():
        return archive_records(path, "unlabeled", IMAGE_ENDINGS, config.keys != "path")
    path = _enter(path)
    for _, _, name in walk_files(path):
        if name.lower().endswith(IMAGE_ENDINGS):
            return file_records(_images(path), "unlabeled", IMAGE_ENDINGS, basename=config.keys == "basename")
        if is_archive(name):
            return archive_records(path, "unlabeled", IMAGE_ENDINGS, config.keys != "path")
    raise UserError(f"{config.path} holds no {FILE}, no images and no tars or zips; give the folder with LUPerson")


def _enter(path: Path) -> Path:
    """Go down as long as there is nothing but one folder, so that LUP/images/NAME.jpg goes by NAME."""
    entered = set()
    while (real := os.path.realpath(path)) not in entered:  # a link may lead back
        entered.add(real)
        folder = None
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                several = folder is not None and entry.is_dir()
                if several or is_archive(entry.name) or entry.name.lower().endswith(IMAGE_ENDINGS):
                    return path
                folder = Path(entry.path) if entry.is_dir() else folder
        if folder is None:
            return path
        path = folder
    return path


def _images(path: Path) -> Iterator[tuple[str, str, str]]:
    """The files of a folder of images; archives among them would be left out without a word."""
    for file, folder, name in walk_files(path):
        if is_archive(name):
            raise UserError(f"{path} holds images and archives ({file}); give a folder with one of the two")
        yield file, folder, name


def _from_lmdb(file: Path, config: Config) -> Iterator[Record]:
    """The entries that keys.pkl names, or all of them if there is no such list."""
    lists = [folder / KEY_LIST for folder in (file.parent, file.parent.parent) if (folder / KEY_LIST).is_file()]
    if lists:
        names = _listed(str(file), lists[0], config.missing)
    else:
        names = walk_keys(str(file))
    where = str(file)
    for name in names:
        short = without_suffix(name) if name.lower().endswith(IMAGE_ENDINGS) else name
        if config.keys != "path":
            short = short.rpartition("/")[2]
        yield Record(make_key(short.lstrip("/")), "unlabeled", reader(where, name), origin=f"{name} in {where}")


def _listed(file: str, path: Path, missing: str) -> Iterator[str]:
    """The names of a key list that the LMDB has."""
    names = pack_names(read_names(path))
    lost, first = 0, None
    for name, there in look_up(file, names):
        if there:
            yield name
        else:
            lost, first = lost + 1, name if first is None else first
    if lost and (missing == "error" or lost == len(names)):
        raise UserError(
            f"{lost:,} of the {len(names):,} names in {path} are not in {file}, the first is {first!r}; fetch the two "
            "files again, or leave such names out with source.missing=skip"
        )
