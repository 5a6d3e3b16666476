"""Where the images of a gallery come from: a folder of crops, one image, a shard set, or an embedding table."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.errors import UserError
from shards.embeddings import TABLE, EmbeddingTable, Keys
from shards.images import decode
from shards.raw.walking import IMAGE_ENDINGS, read_file, walk_files
from shards.reader import ShardReader
from shards.remote import is_remote
from shards.schema import MANIFEST, SPLITS, UNKNOWN, BadSample, Sample
from shards.unpacked import is_source


@dataclass(frozen=True, eq=False)
class Source:
    """Images with keys and labels, which are read one by one, or a table with their features."""

    path: str  # absolute where it is a folder here, so that a gallery can be used from anywhere
    keys: Keys  # N; in a folder the paths of the files below it
    pids: np.ndarray  # int64 [N], UNKNOWN where nobody knows
    camids: np.ndarray  # int64 [N]
    reader: ShardReader | None = None  # None: a folder
    table: EmbeddingTable | None = None  # features instead of images

    def read(self, row: int) -> bytes:
        """The encoded image; BadSample where it is damaged or gone."""
        if self.table is not None:
            raise UserError(f"{self.path} is a table of features, there are no images in it")
        if self.reader is not None:
            return self.reader[row].image
        return read_image(self.name(row))

    def picture(self, row: int) -> Image.Image:
        """The RGB image; BadSample as in `read`."""
        return decode(self.read(row), self.name(row))

    @property
    def kind(self) -> str:
        """ "folder", "set" or "table"."""
        return "table" if self.table is not None else "folder" if self.reader is None else "set"

    def name(self, row: int) -> str:
        """The image in messages."""
        return shown(self.kind, self.path, self.keys[row])


def read_image(path: str) -> bytes:
    """Content of a file; BadSample where it cannot be read."""
    try:
        return read_file(path)
    except OSError as error:
        raise BadSample(f"{path} cannot be read: {error.strerror or error}") from error


def fault(error: BadSample) -> str:
    """What is wrong with an image, without the advice to those who pack a set."""
    return str(error).partition("; mend or remove it")[0]


def shown(kind: str, path: str, key: str) -> str:
    """How an image is called: in a folder its path, which can be opened, in a set or a table its key."""
    return os.path.join(path, key) if kind == "folder" else key


def _in_folder(root: Path, names: Sequence[str]) -> Source:
    unknown = np.full(len(names), UNKNOWN, np.int64)
    return Source(os.path.abspath(root), Keys(names), unknown, unknown)


def open_source(path: str, splits: Sequence[str] | None = None) -> Source:
    """What `path` names.

    path: a folder of images, searched with all folders below it; an image; a packed set, its folder or URL;
    SOURCE:PATH; or a folder that finetune/embed.py wrote. splits: of a set; None: all. UserError where there is
    nothing to be found.
    """
    here = Path(path)
    if is_source(path) or is_remote(path) or (here / MANIFEST).is_file():
        reader = ShardReader([path], list(splits or SPLITS))
        where = os.path.abspath(path) if here.exists() else path
        return Source(where, Keys(reader.keys), reader.pids, reader.camids, reader)
    if splits:
        raise UserError(f"--splits is for packed sets and SOURCE:PATH; {path} is none")
    if (here / TABLE).is_file():
        table = EmbeddingTable.load(here, mapped=True)
        return Source(os.path.abspath(path), table.keys, table.pids, table.camids, table=table)
    if here.is_file():
        return _in_folder(here.parent, [here.name])
    if not here.is_dir():
        raise UserError(f"{path} does not exist; give a folder of images, an image, a packed set or SOURCE:PATH")
    names = sorted(folder + name for _, folder, name in walk_files(here) if name.lower().endswith(IMAGE_ENDINGS))
    if not names:
        raise UserError(f"{path} holds no images ({', '.join(IMAGE_ENDINGS)}), nor do the folders in it")
    return _in_folder(here, names)


class Pictures:
    """Single images by number, as `strips.draw_strips` wants them."""

    def __init__(self, images: Sequence[tuple[str, Callable[[], bytes]]]):
        """images: of each the key, and how to read it."""
        self.images = images

    def __getitem__(self, row: int) -> Sample:
        key, read = self.images[row]
        return Sample(key, read(), UNKNOWN, UNKNOWN, ())
