"""Data sets of images with sentences, described by JSON: entries, identities and splits.

Text search asks with the sentences of the test images for the test images. So the test images with their captions are
the split `gallery`; there is no split `query`, the queries are the captions of the gallery.
"""

import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from recipes import plain_json
from recipes.errors import UserError
from recipes.load import Section
from shards.raw.missing_files import Presence, inside
from shards.raw.walking import make_key, read_file, without_suffix
from shards.schema import Record

PARTS = ("train", "val", "test")


class Entry(NamedTuple):
    """One image as a set lists it."""

    part: str  # one of PARTS
    file: str  # relative to the folder of images
    number: int  # identity as the set counts
    captions: tuple[str, ...]


class Choice(Section):
    """What becomes of the parts of a set; keys of its source."""

    val: Literal["leave", "train"] = "leave"  # train: the validation images are training data too
    gallery: Literal["test", "val"] = "test"  # the part that is searched; val is for choosing settings
    missing: Literal["error", "skip"] = "error"  # images that are listed but not there: refuse, or leave out

    def split(self, part: str) -> str | None:
        """The split that a part goes to, None if it is left out."""
        if part == self.gallery:
            return "gallery"
        return "train" if part == "train" or (part == "val" and self.val == "train") else None


def read_json(path: Path) -> Any:
    """The tree of a JSON file. UserError naming it if it is missing or damaged."""
    try:
        return plain_json.parse(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); it lists the images and their captions") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from error


def _entry(tree: Any, path: Path, place: int, file_key: str, part: str | None) -> Entry:
    """One entry of a list; `part` where the file is of one part only."""
    where = f"entry {place} of {path}"
    if not isinstance(tree, dict):
        raise UserError(f"{where} is {type(tree).__name__}; expected are mappings with {file_key}, id and captions")
    if part is None and "split" not in tree:
        raise UserError(
            f"{where} has no 'split': this list does not say which images are for training (caption_all.json of some "
            "copies of CUHK-PEDES); take the one with 'split', reid_raw.json"
        )
    part = part or tree["split"]
    texts = tree.get("captions", tree.get("sentence"))
    texts = [texts] if isinstance(texts, str) else texts
    file, number = tree.get(file_key), tree.get("id")
    number = int(number) if isinstance(number, str) and number.isdecimal() else number
    if not isinstance(file, str) or not isinstance(number, int) or not isinstance(texts, list) or part not in PARTS:
        raise UserError(
            f"{where} lacks {file_key}, id, captions or a split out of {', '.join(PARTS)}: {str(tree)[:80]}"
        )
    captions = tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
    return Entry(part, inside(file, path), number, captions)


def read_list(path: Path, file_key: str = "file_path", part: str | None = None) -> list[Entry]:
    """The entries of a JSON list, or of the list under 'annotations' of a mapping.

    file_key: the key with the path of the image. part: where the whole file is of one part. Entries of one image, one
    sentence each or listed twice, become one entry with all its captions.
    """
    tree = read_json(path)
    tree = tree.get("annotations") if isinstance(tree, dict) else tree
    if not isinstance(tree, list) or not tree:
        raise UserError(f"{path} is no list of images, nor a mapping with one under 'annotations'")
    found: dict[tuple[str, str], Entry] = {}
    for place, item in enumerate(tree):
        entry = _entry(item, path, place, file_key, part)
        before = found.get(entry[:2])
        if before is not None:
            if before.number != entry.number:
                raise UserError(f"{path} gives {entry.file} the identities {before.number} and {entry.number}; mend it")
            entry = entry._replace(captions=tuple(dict.fromkeys(before.captions + entry.captions)))
        found[entry[:2]] = entry
    return list(found.values())


def identity_shifts(entries: Iterable[Entry]) -> dict[str, int]:
    """What is added to the numbers of each part, so that identities are above 0 and no two parts share one.

    The parts of these sets hold different people. If all numbers are above 0 and the parts share none, nothing is
    added; else the set is moved up to begin with 1, and a part that shares numbers with those before goes behind them.
    """
    numbers: dict[str, set[int]] = {}
    for entry in entries:
        numbers.setdefault(entry.part, set()).add(entry.number)
    up = max(0, 1 - min(map(min, numbers.values()), default=1))
    shifts: dict[str, int] = {}
    taken: set[int] = set()
    for part in PARTS:
        if part in numbers:
            moved = {number + up for number in numbers[part]}
            behind = max(taken) + 1 - min(moved) if moved & taken else 0
            shifts[part] = up + behind
            taken |= {number + behind for number in moved}
    return shifts


def captioned_records(entries: list[Entry], images: Path, title: str, choice: Choice) -> Iterator[Record]:
    """The images of the parts that are wanted, with identity and captions; no cameras.

    images: the folder that the entries' paths are relative to. UserError at the end if images are missing.
    """
    if choice.val == "train" and choice.gallery == "val":
        raise UserError("val=train and gallery=val contradict each other: what was trained on cannot be searched")
    shifts = identity_shifts(entries)
    presence = Presence(title, choice.missing)
    for part, file, number, captions in entries:
        split = choice.split(part)
        path = os.path.join(images, file)
        if split is not None and presence.check(path):
            key, pid = make_key(without_suffix(file).removeprefix("./")), number + shifts[part]
            yield Record(key, split, partial(read_file, path), pid, None, captions, path)
    presence.finish()


def find_images(root: Path, title: str) -> Path:
    """The folder of images: `imgs` in most copies, else the root itself."""
    if not root.is_dir():
        raise UserError(f"{title} folder {root} does not exist; give the folder with the JSON list and imgs")
    return root / "imgs" if (root / "imgs").is_dir() else root


def find_list(root: Path, names: tuple[str, ...], title: str) -> Path:
    """The first of these files that there is."""
    for name in names:
        if (root / name).is_file():
            return root / name
    raise UserError(f"{root} has no {' or '.join(names)}, the list of images and captions of {title}")


def published_splits(counts: dict[str, tuple[int, int]], choice: Choice) -> dict[str, tuple[int, int | None]]:
    """Images and identities of each part -> of each split."""
    splits: dict[str, tuple[int, int | None]] = {}
    for part, (images, identities) in counts.items():
        split = choice.split(part)
        if split is not None:
            before = splits.get(split, (0, 0))
            splits[split] = (before[0] + images, (before[1] or 0) + identities)
    return splits
