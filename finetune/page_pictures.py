"""Pictures inside a page: as data in their addresses, encoded small, and never more than a page may hold."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from finetune import page_results
from finetune.page_results import Notes
from finetune.page_run import PRETRAINING, Run, Searched
from recipes.errors import UserError
from shards.images import decode

ROOM = 3_700_000  # characters of all pictures of a page, of its 5 MB
QUALITY = 80  # of WebP; of the maps of attention.png it makes a tenth of the PNG
LARGEST = 1640, 2400  # pixels, width and height of a picture in a page
FILE = 40 << 20  # bytes of a picture file that is opened
FOLDER, EPOCH = "pictures", re.compile(r"epoch-(\d+(?:\.\d+)?)")
# what pretrain/pictures.py and a pretraining draw; how to read them is docs/pictures.md
KINDS = {
    "attention": "Where the class token looks",
    "components": "Which patches look alike to the network",
    "correspondence": "Which patch of one image it finds in another one",
    "clusters": "What its prototypes stand for",
}


class Picture(NamedTuple):
    """An image of the page."""

    title: str
    uri: str
    alt: str
    width: int
    height: int
    more: str = ""


class Snapshot(NamedTuple):
    """The pictures of one teacher."""

    title: str
    pictures: list[Picture]


class Album:
    """Counts what the pictures of a page take; a picture for which there is no room is noted."""

    def __init__(self, notes: Notes, room: int = ROOM):
        self.notes, self.room = notes, room
        self.refused = 0

    def uri(self, image: Image.Image) -> str | None:
        """The image as an address; None where there is no room for it any more."""
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=QUALITY)
        found = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(found) > self.room:
            self.refused += 1
            return None
        self.room -= len(found)
        return found

    def add(self, path: Path, title: str, alt: str, more: str = "") -> Picture | None:
        """A picture file; None where it is missing, damaged or too large, which is noted unless it is missing."""
        try:
            with open(path, "rb") as file:
                data = file.read(FILE + 1)
            if len(data) > FILE:
                self.notes.append(f"{path} is left out: it has more than {FILE:,} bytes.")
                return None
            image = decode(data, path.name)
        except FileNotFoundError:
            return None
        except (OSError, UserError) as error:
            told = getattr(error, "strerror", None) or str(error).partition(";")[0]
            self.notes.append(f"{path} cannot be shown: {told}.")
            return None
        image.thumbnail(LARGEST, Image.Resampling.LANCZOS)
        uri = self.uri(image)
        if uri is None:
            self.notes.append(f"{path} is left out: the page would become larger than 5 MB. Open the file itself.")
            return None
        return Picture(title, uri, alt, *image.size, more)


def described(folder: Path, name: str, otherwise: str) -> str:
    """The words for a picture in the table.md of an evaluation."""
    try:
        with open(folder / "table.md", encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 20)
    except OSError:
        return otherwise
    found = re.search(rf"!\[([^\]\n]+)\]\({re.escape(name)}\)", text)
    return found[1] if found else otherwise


def of_search(searched: Searched, album: Album) -> list[Picture]:
    """The pictures of an evaluation beside its ranked lists."""
    words = {
        "distances.png": ("Distances of pairs", "Distances of pairs of one person and of two, and the ROC."),
        "cameras.png": ("Pairs of cameras", "mAP of the queries of one camera among the images of another one."),
        "alignment.png": (
            "Aligned stripes",
            "Which stripe of a query meets which stripe of its first answer.",
        ),
        "attention.png": ("Learned attention", "Where the model looks, by the maps that it learned."),
    }
    found = []
    for name, (title, otherwise) in words.items():
        alt = described(searched.folder, name, otherwise)
        found.append(album.add(searched.folder / name, title, alt, alt))
    return [picture for picture in found if picture]


def _told(numbers: dict[str, Any], kind: str) -> str:
    told = numbers.get(kind)
    sentence = told.get("sentence") if isinstance(told, dict) else None
    return f"{sentence[:1].upper()}{sentence[1:500]}." if isinstance(sentence, str) and sentence else ""


def _of_folder(folder: Path, title: str, album: Album) -> Snapshot | None:
    """What pretrain/pictures.py left in a folder."""
    numbers = page_results.read_tree(folder / "numbers.json", album.notes)
    found = []
    for kind, name in KINDS.items():
        told = _told(numbers, kind)
        found.append(album.add(folder / f"{kind}.png", name, f"{name}. {told}".strip(), told))
    pictures = [picture for picture in found if picture]
    return Snapshot(title, pictures) if pictures else None


def _snapshots(folder: Path) -> Iterator[tuple[Path, str]]:
    """The folders with pictures that a pretraining left: of its last teacher, and of the first one to compare with."""
    try:
        epochs = sorted((float(match[1]), path) for path in folder.iterdir() if (match := EPOCH.fullmatch(path.name)))
    except (FileNotFoundError, NotADirectoryError):
        return
    if epochs:
        yield epochs[-1][1], f"After epoch {epochs[-1][0]:g}"
    if len(epochs) > 1:
        yield epochs[0][1], f"To compare: after epoch {epochs[0][0]:g}"


def of_teachers(run: Run, more: list[Path], album: Album) -> list[Snapshot]:
    """What the teacher sees: the pictures in RUN/pictures and those of the folders `more`, the latter first.

    UserError where one of `more` holds no picture.
    """
    found = []
    for folder in more:
        snapshot = _of_folder(folder, folder.resolve().name, album)
        if snapshot is None:
            raise UserError(f"--pictures {folder} holds none of {', '.join(f'{kind}.png' for kind in KINDS)}")
        found.append(snapshot)
    own = run.folder / FOLDER
    flat = _of_folder(own, "Drawn by pretrain/pictures.py", album)
    found += [flat] if flat else []
    if run.kind == PRETRAINING:
        found += [one for folder, title in _snapshots(own) if (one := _of_folder(folder, title, album))]
    return found
