"""Images -> features in two lines of Python, with any model that `--ckpt` takes:

    from finetune.extractor import Extractor
    features = Extractor("runs/market")(["a.jpg", "b.jpg"])          # float32 [2, D], rows of length 1
    cosines = features @ features.T

Images are resized to the size of the model and normalised as in its training; an orientation tag is not applied.
"""

import collections
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from finetune import models, stored_calibration
from finetune.augment import Augment
from finetune.verification import Calibration
from recipes.errors import UserError
from shards.images import decode
from shards.schema import UNKNOWN, BadSample

# a path, an image of Pillow, uint8 [H, W, 3] in the order R, G, B, an encoded file, or a function that gives one
Picture = str | Path | Image.Image | np.ndarray | bytes | Callable[[], bytes | Image.Image]
AHEAD = 2  # batches that are prepared while one is embedded
MOST_THREADS = 16  # that decode and resize


def pixels(picture: Picture, name: str = "the image") -> Image.Image:
    """An RGB image; BadSample names it (a path names itself) where it cannot be read, UserError where it is no image.

    An array must be uint8 [H, W, 3], R, G, B: OpenCV's frames are B, G, R, turn them with frame[:, :, ::-1].
    """
    if callable(picture):
        picture = picture()
    if isinstance(picture, Image.Image):
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise UserError(
                f"{name} is an array of {picture.dtype} {list(picture.shape)}; expected uint8 [H, W, 3], RGB"
            )
        return Image.fromarray(np.ascontiguousarray(picture))
    if isinstance(picture, str | Path):
        name = str(picture)
        try:
            picture = Path(picture).read_bytes()
        except OSError as error:
            raise BadSample(f"{name} cannot be read: {error.strerror or error}") from error
    if not isinstance(picture, bytes):
        raise UserError(f"{name} is a {type(picture).__name__}; expected a path, an image of Pillow or uint8 [H, W, 3]")
    return decode(picture, name)


def clipped(box: Sequence[float], width: int, height: int, name: str) -> tuple[int, int, int, int]:
    """A box x1, y1, x2, y2 in whole pixels inside the frame; UserError where nothing is left of it."""
    corners = np.asarray(box, dtype=np.float64)
    if corners.shape != (4,) or not np.isfinite(corners).all():
        raise UserError(f"{name} is {box}; expected four finite numbers x1, y1, x2, y2 in pixels")
    x1, y1, x2, y2 = np.clip(np.rint(corners), 0, [width, height, width, height]).astype(int).tolist()
    if x1 >= x2 or y1 >= y2:
        raise UserError(
            f"{name} is {[round(value, 1) for value in corners.tolist()]}: nothing of it lies in the frame of "
            f"{width} x {height} pixels; expected x1 < x2 and y1 < y2"
        )
    return x1, y1, x2, y2


class Extractor:
    """A model that is ready to embed.

    ckpt: what `--ckpt` takes (docs/checkpoints.md): a run folder, a teacher, a file of others, timm:NAME.
    device: "cuda", "cpu", ...; None: the GPU if there is one. precision: "no" is float32; None: bf16 on a GPU, else
    float32. batch: images a forward pass. flip: the mean with the feature of the mirrored image; twice the time.
    size: height, width of the input in pixels. calibration: None where the model has none. fingerprint: of its weights.
    """

    def __init__(
        self, ckpt: str | Path, device: str | None = None, precision: str | None = None, batch: int = 64,
        flip: bool = False,
    ):  # fmt: skip
        self.ckpt, self.batch, self.flip = str(ckpt), batch, flip
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.device = torch.zeros(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
            told = " ".join(str(error).split())[:120]
            raise UserError(f"device {device!r} cannot be used here ({told}); leave it away, or give cpu") from error
        precision = precision or ("bf16" if self.device.type == "cuda" else "no")
        if precision not in ("no", "bf16") or batch < 1:
            raise UserError(f"precision = {precision!r}, batch = {batch}; expected no or bf16, and at least 1 image")
        self.half = precision == "bf16"
        self.model, augment, stored = models.load_known(self.ckpt)
        self.model.eval().to(self.device)
        self.augment, self.size = Augment(augment), augment.size
        # what a feature depends on beside the weights
        self.input = {name: getattr(augment, name) for name in ("height", "width", "mean", "std")} | {"flip": flip}
        calibration = stored.get(stored_calibration.KEY)
        self.calibration = None if calibration is None else Calibration(**calibration)
        self.threads = min(MOST_THREADS, os.cpu_count() or 1)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal, tells the weights from all others."""
        return models.fingerprint(self.model)

    @cached_property
    def dim(self) -> int:
        """Numbers of a feature, D."""
        return self._embed(torch.zeros(1, 3, *self.size), [UNKNOWN]).shape[1]

    @torch.no_grad()
    def _embed(self, images: Tensor, cameras: Sequence[int]) -> np.ndarray:
        """images: float32 [B, 3, H, W]. Returns float32 [B, D]."""
        images, known = images.to(self.device), torch.as_tensor(cameras, dtype=torch.int64, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            features = self.model.embed(images, known).float()
            if self.flip:
                features = F.normalize(features + self.model.embed(images.flip(3), known).float(), dim=1)
        return features.cpu().numpy()

    def _views(
        self, pictures: Iterable[Picture], on_bad: Callable[[int, BadSample], None] | None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of images float32 [n, 3, H, W] with their places, prepared by threads; damaged ones are left out."""

        def view(place: int, picture: Picture) -> np.ndarray | BadSample:
            try:
                return self.augment.test_view(pixels(picture, f"image {place}"))
            except BadSample as error:
                if on_bad is None:
                    raise
                return error

        numbered, waiting = enumerate(pictures), collections.deque()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                while True:
                    while len(waiting) <= AHEAD and (chunk := list(itertools.islice(numbered, self.batch))):
                        waiting.append([(place, pool.submit(view, place, picture)) for place, picture in chunk])
                    if not waiting:
                        return
                    done = [(place, future.result()) for place, future in waiting.popleft()]
                    for place, found in done:
                        if isinstance(found, BadSample):
                            on_bad(place, found)
                    good = [(place, found) for place, found in done if not isinstance(found, BadSample)]
                    if good:
                        yield [place for place, _ in good], torch.from_numpy(np.stack([found for _, found in good]))
            finally:
                pool.shutdown(cancel_futures=True)  # the caller may stop early

    def stream(
        self,
        pictures: Iterable[Picture],
        cameras: Sequence[int] | None = None,
        on_bad: Callable[[int, BadSample], None] | None = None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Batch by batch the places of the images and their features, float32 [n, D], in the memory of some batches.

        cameras: of each image, UNKNOWN or None where nobody knows; few models look at them. on_bad: called with the
        place of an image that cannot be read, which is then left out; without it the error is raised.
        """
        for places, images in self._views(pictures, on_bad):
            known = [UNKNOWN] * len(places) if cameras is None else [int(cameras[place]) for place in places]
            yield places, self._embed(images, known)

    def __call__(self, images: Iterable[Picture] | Picture, cameras: Sequence[int] | None = None) -> np.ndarray:
        """L2-normalised features, float32 [N, D], of images of any kind, also mixed; a single image gives [1, D]."""
        pictures = _listed(images)
        if cameras is not None and len(cameras) != len(pictures):
            raise UserError(f"{len(cameras)} cameras for {len(pictures)} images; give one for each")
        found = [features for _, features in self.stream(pictures, cameras)]
        return np.concatenate(found) if found else np.zeros((0, self.dim), np.float32)

    def sentences(self, texts: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
        """L2-normalised features, float32 [S, D], of sentences, comparable with those of images; and the words that
        the model does not know, which are left out. UserError where the model reads no text, and for a sentence
        without any known word."""
        if not hasattr(self.model, "embed_sentences"):
            raise UserError(f"{self.ckpt} was not trained with sentences, so it cannot search by text; fine-tune one "
                            "with method.name=text_search")  # fmt: skip
        return self.model.embed_sentences(texts)

    def crops(self, frame: Picture, boxes: Any) -> np.ndarray:
        """Features float32 [N, D] of people in a video frame.

        boxes: [N, 4] x1, y1, x2, y2 in pixels, x2 and y2 excluded; what lies outside the frame is cut off. UserError
        names the box of which nothing is left.
        """
        image = pixels(frame, "the frame")
        return self([image.crop(clipped(box, *image.size, f"box {number}")) for number, box in enumerate(boxes)])

    def tracklets(self, tracklets: Sequence[Sequence[Picture]]) -> np.ndarray:
        """One feature a tracklet, float32 [T, D]: the mean over its images, normalised again."""
        tracklets = [_listed(images) for images in tracklets]
        for number, images in enumerate(tracklets):
            if not images:
                raise UserError(f"tracklet {number} holds no images; leave it out")
        features = self(itertools.chain.from_iterable(tracklets))
        starts = np.cumsum([0, *map(len, tracklets)])[:-1]
        return pooled(features, starts) if len(starts) else features

    @torch.no_grad()
    def patches(self, images: Iterable[Picture] | Picture) -> np.ndarray:
        """The tokens of the patches after the last norm, float32 [N, rows, columns, D], not L2-normalised.

        Of a network that is no Vision Transformer the places of its last feature map.
        """
        found = [self._patches(torch.zeros(1, 3, *self.size))[:0]]  # so that no image has a shape, too
        found += [self._patches(batch) for _, batch in self._views(_listed(images), None)]
        tokens = np.concatenate(found)
        own, places = self.model.backbone.grid, tokens.shape[1]
        # a network of another kind was asked for its grid at 256 x 128
        rows, columns = own if own[0] * own[1] == places else grid(self.size, places)
        return tokens.reshape(len(tokens), rows, columns, tokens.shape[2])

    def _patches(self, images: Tensor) -> np.ndarray:
        """Patch tokens float32 [B, N, D] of the backbone; with a camera embedding, as of an unknown camera."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            return self.model.tokens(images.to(self.device)).patches.float().cpu().numpy()


def _listed(images: Iterable[Picture] | Picture) -> list[Picture]:
    """A list of images from one, or from many."""
    one = isinstance(images, str | Path | Image.Image | bytes) or callable(images)
    return [images] if one or (isinstance(images, np.ndarray) and images.ndim == 3) else list(images)


def pooled(features: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Means of runs of rows, L2-normalised, float32 [T, D]. features: [N, D]. starts: first row of each run, [T]."""
    sums = np.add.reduceat(features, starts, axis=0)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def grid(size: tuple[int, int], places: int) -> tuple[int, int]:
    """Rows and columns of `places` equal cells of an image of that height and width, as nearly square as they get."""
    shapes = [(rows, places // rows) for rows in range(1, places + 1) if places % rows == 0]
    return min(shapes, key=lambda shape: abs(np.log(size[0] / shape[0] / (size[1] / shape[1]))))
