"""The images of a gallery as the search page shows them: read where the gallery says that they lie, and made small."""

import base64
import functools
import io
import os
import sys
import threading
from collections.abc import Callable
from pathlib import PurePath
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from finetune.gallery import Gallery
from finetune.gallery_sources import Source, open_source, read_image, shown
from recipes.errors import UserError
from shards.images import decode
from shards.schema import BadSample

TALL, WIDE = 256, 192  # pixels, a picture on the page at most
KEPT = 512  # small pictures that stay in memory, 50 kB each or less
QUALITY = 88  # of their JPEGs
# what a viewer is told where an image is missing: no path of this machine
GONE = "The original is not there any more, or cannot be read."
NO_IMAGES = "Built from a table of features, which has no images."

Found = TypeVar("Found")


class Missing(UserError):
    """The original of an image of the gallery cannot be shown; the message is for the page."""


def small(image: Image.Image) -> np.ndarray:
    """uint8 [h, w, 3], at most TALL x WIDE with the same aspect ratio; never larger than the image."""
    share = min(1.0, TALL / image.height, WIDE / image.width)
    if share == 1.0:
        return np.asarray(image)
    size = max(1, round(image.width * share)), max(1, round(image.height * share))
    return cv2.resize(np.asarray(image), size, interpolation=cv2.INTER_AREA)


def data_uri(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] as a JPEG inside its address: without the metadata of the original, and without a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


class Originals:
    """Reads the images of a gallery by their row."""

    def __init__(self, gallery: Gallery):
        self.columns, self.sources = gallery.columns, gallery.facts["sources"]
        self._opened: dict[int, tuple[Source, dict[str, int]] | None] = {}
        self._lock, self._told = threading.Lock(), set()
        self.pixels = functools.lru_cache(KEPT)(self._pixels)  # of this gallery only, so it goes with it

    def label(self, row: int) -> str:
        """How the page calls an image: its name below the folder or in the set, with that one's own name where the
        gallery has several; never a path of this machine."""
        number, key = int(self.columns.sources[row]), self.columns.keys[row]
        label = key if len(self.sources) == 1 else f"{PurePath(self.sources[number]['path']).name}/{key}"
        return label.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # names of files may be any bytes

    def read(self, row: int) -> bytes:
        """The encoded image; Missing where it cannot be read."""
        number, key = int(self.columns.sources[row]), self.columns.keys[row]
        kind, path = (self.sources[number][what] for what in ("kind", "path"))
        if kind == "table":
            raise Missing(NO_IMAGES)
        if kind == "folder":
            if os.path.isabs(key) or ".." in PurePath(key).parts:  # of a gallery that somebody made up
                raise Missing(GONE)
            return self._attempt(number, lambda: read_image(shown(kind, path, key)))
        source, places = self._open(number) or (None, {})
        if source is None or key not in places:
            raise Missing(GONE)
        return self._attempt(number, lambda: source.read(places[key]))

    def _pixels(self, row: int) -> np.ndarray:
        """The image, small; Missing as `read`. See `small`."""
        encoded, number = self.read(row), int(self.columns.sources[row])
        return self._attempt(number, lambda: small(decode(encoded, self.label(row))))

    def _open(self, number: int) -> tuple[Source, dict[str, int]] | None:
        """A packed set and the places of its keys; None where it cannot be opened, which is told once."""
        with self._lock:
            if number not in self._opened:
                try:
                    source = open_source(self.sources[number]["path"])
                    self._opened[number] = source, {key: place for place, key in enumerate(source.keys)}
                except UserError as error:
                    self._tell(number, error)
                    self._opened[number] = None
            return self._opened[number]

    def _attempt(self, number: int, action: Callable[[], Found]) -> Found:
        """What the action gives; Missing where the image is damaged or gone."""
        try:
            return action()
        except BadSample as error:
            self._tell(number, error)
            raise Missing(GONE) from error

    def _tell(self, number: int, error: UserError) -> None:
        """To the terminal, once a source: why an image is not shown."""
        if number not in self._told:
            self._told.add(number)
            print(f"an original cannot be shown: {error}", file=sys.stderr, flush=True)
