"""The views of a sample, from the file to normalised images: ours against torchvision on PIL, crop by crop.

    python bench/loader.py

The same drawn JPEGs of 256 x 128, 2 global crops of 256 x 128 and 8 (and 6) local ones of 96 x 64 with the whole
augmentation, one process, one thread. Both ways count everything: read, decode, cut, resize, flip, colour, blur,
solarise, random numbers, masks, stack to a batch, normalise. The textbook normalises crop by crop; ours does it to the
batch, on a GPU where there is one. Here the CPU core does it too, and it is in the total: `worker` is what a loader
process takes, `normalise` the rest. `images_per_s` is of one core, ours and textbook.
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from pretrain.batch import collate
from pretrain.loader import ViewMaker
from pretrain.masks import MasksConfig, draw_mask
from pretrain.photometric import PhotometricConfig, normalize
from pretrain.views import ViewsConfig
from shards.assembly import build_set
from shards.images import ImagesConfig
from shards.order import Order, OrderConfig
from shards.packing import PackingConfig
from shards.reader import ShardReader
from shards.seeds import generator

GRID, BLOCKS = (16, 8), 12  # patches of a global crop, transformer blocks (each has two places of drop path)
BATCH = 16


class Blur:
    """Gaussian blur of PIL with probability p."""

    def __init__(self, p: float, sigma: tuple[float, float]):
        self.p, self.sigma = p, sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(1).item() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=torch.empty(1).uniform_(*self.sigma).item()))


def pipeline(kind: int, views: ViewsConfig, colour: PhotometricConfig) -> transforms.Compose:
    """The transform of one crop. kind: 0 global view 1, 1 global view 2, 2 local."""
    size, scale = (views.local_size, views.local_scale) if kind == 2 else (views.global_size, views.global_scale)
    jitter = transforms.ColorJitter(colour.brightness, colour.contrast, colour.saturation, colour.hue)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale, views.ratio, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(views.flip),
            transforms.RandomApply([jitter], p=colour.jitter),
            transforms.RandomGrayscale(colour.gray),
            Blur(colour.blur[kind], colour.blur_sigma),
            transforms.RandomSolarize(128, p=colour.solarize[kind]),
            transforms.ToTensor(),
            transforms.Normalize(colour.mean, colour.std),
        ]
    )


class Textbook:
    """Files -> batches of normalised crops, one tensor a crop, and masks."""

    def __init__(self, files: list[Path], views: ViewsConfig):
        self.files, self.masks = files, MasksConfig()
        self.crops = [pipeline(min(view, 2), views, PhotometricConfig()) for view in range(2 + views.local_count)]

    def __getitem__(self, number: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        image = Image.open(io.BytesIO(self.files[number].read_bytes())).convert("RGB")
        rng = generator(0, "masks", 0, number)
        masks = [draw_mask(rng, GRID, self.masks) for _ in range(2)]
        return [crop(image) for crop in self.crops], torch.from_numpy(np.stack(masks))

    def __call__(self) -> None:
        for start in range(0, len(self.files), BATCH):
            crops, masks = zip(*(self[number] for number in range(start, start + BATCH)), strict=True)
            _ = [torch.stack(view) for view in zip(*crops, strict=True)], torch.stack(masks)


class Ours:
    """The loader of pretrain/run.py, and the first thing that student and teacher do with its batches."""

    def __init__(self, reader: ShardReader, views: ViewsConfig):
        self.colour, order = PhotometricConfig(), Order(reader.shard_sizes, 0, OrderConfig())
        self.maker = ViewMaker(reader, order, 0, (views, self.colour, MasksConfig()), GRID, 2 * BLOCKS)
        self.normalise: list[float] = []  # seconds of each call

    def __call__(self) -> None:
        seconds = 0.0
        for start in range(0, len(self.maker), BATCH):
            batch = collate([self.maker[position] for position in range(start, start + BATCH)])
            begin = time.perf_counter()
            for crops in (batch.global_crops, batch.local_crops):
                normalize(crops.flatten(0, 1), self.colour.mean, self.colour.std)
            seconds += time.perf_counter() - begin
        self.normalise.append(seconds)


def draw(folder: Path, count: int) -> ShardReader:
    """A packed set of `count` drawn people, 256 x 128."""
    source = {"name": "figures", "role": "unlabeled", "identities": count, "images_per_identity": 1}
    build_set([source], folder, PackingConfig(), ImagesConfig())
    return ShardReader([folder], "unlabeled")


def measure(reader: ShardReader, files: list[Path], local_count: int, rounds: int) -> dict[str, Any]:
    """Both ways in turns, in ms for an image."""
    views = ViewsConfig(local_count=local_count)
    ours = Ours(reader, views)
    numbers = pairs.Pair(ours, Textbook(files, views), rounds).numbers(1000 / len(files))
    normalise = statistics.median(ours.normalise[1:]) * 1000 / len(files)  # the first call warms up
    speeds = {name: round(1000 / numbers[name]) for name in ("ours", "textbook")}
    parts = {"worker": round(numbers["ours"] - normalise, 4), "normalise": round(normalise, 4)}
    return numbers | parts | {"images_per_s": speeds}


def main() -> None:
    """Draw, time, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="a multiple of 16")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Once an array of this size was freed, glibc keeps memory instead of asking for it anew for each batch. In a
    # training run that is so after the first step; here it spares both ways the same noise.
    np.ones(31 << 20, np.uint8)
    with tempfile.TemporaryDirectory() as temporary:
        reader = draw(Path(temporary, "set"), given.images)
        files = [Path(temporary, f"{row}.jpg") for row in range(given.images)]
        for row, file in enumerate(files):
            file.write_bytes(reader[row].image)
        cases = {count: measure(reader, files, count, given.rounds) for count in (8, 6)}
    pairs.report("loader", cases[8], "ms/image", pairs.peak_mb(), 1, **{"2+6": cases[6]})


if __name__ == "__main__":
    main()
