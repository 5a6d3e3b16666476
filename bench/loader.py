"""The views of a sample, from the file to what leaves a worker: ours against torchvision on PIL, crop by crop.

    python bench/loader.py

The same drawn JPEGs of 256 x 128, 2 global crops of 256 x 128 and 6 (and 8) local ones of 96 x 64, one process, one
thread. Counted is all that a worker does: read, decode, cut, resize, flip, draw the random numbers, masks, stack to a
batch. The textbook worker also does colour, blur, solarise and normalise on PIL images; ours leaves them to the device,
so what `photometric.apply` takes on one CPU core is timed beside it: `ratio` is of the workers, `with_photometric` adds
that time to ours (on a GPU it is spent there).
"""

import argparse
import io
import statistics
import tempfile
from pathlib import Path

import numpy as np
import pairs
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from pretrain import photometric
from pretrain.batch import Batch, collate
from pretrain.loader import ViewMaker
from pretrain.masks import MasksConfig, draw_mask
from pretrain.photometric import PhotometricConfig
from pretrain.views import ViewsConfig
from shards.assembly import build_set
from shards.images import ImagesConfig
from shards.order import Order, OrderConfig
from shards.packing import PackingConfig
from shards.reader import ShardReader
from shards.seeds import generator

GRID, BLOCKS = (16, 8), 12  # patches of a global crop, transformer blocks (each has two places of drop path)


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
    """Files -> a batch of normalised crops, one tensor a crop, and masks."""

    def __init__(self, files: list[Path], views: ViewsConfig):
        self.files, self.masks = files, MasksConfig()
        self.crops = [pipeline(min(view, 2), views, PhotometricConfig()) for view in range(2 + views.local_count)]

    def __getitem__(self, number: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        image = Image.open(io.BytesIO(self.files[number].read_bytes())).convert("RGB")
        masks = [draw_mask(generator(0, "masks", 0, number, view), GRID, self.masks) for view in range(2)]
        return [crop(image) for crop in self.crops], torch.from_numpy(np.stack(masks))

    def batch(self, numbers: range) -> list[torch.Tensor]:
        crops, masks = zip(*(self[number] for number in numbers), strict=True)
        return [torch.stack(view) for view in zip(*crops, strict=True)] + [torch.stack(masks)]


def draw(folder: Path, count: int) -> ShardReader:
    """A packed set of `count` drawn people, 256 x 128."""
    source = {"name": "figures", "role": "unlabeled", "identities": count, "images_per_identity": 1}
    build_set([source], folder, PackingConfig(), ImagesConfig())
    return ShardReader([folder], "unlabeled")


def measure(
    reader: ShardReader, files: list[Path], local_count: int, rounds: int
) -> tuple[pairs.Pair, list[pairs.Seconds]]:
    """The workers in turns, and photometric.apply on the batches of ours; seconds for all images."""
    views, colour = ViewsConfig(local_count=local_count), PhotometricConfig()
    order = Order(reader.shard_sizes, 0, OrderConfig())
    maker = ViewMaker(reader, order, 0, (views, colour, MasksConfig()), GRID, 2 * BLOCKS)
    theirs = Textbook(files, views)
    parts = [range(start, start + 16) for start in range(0, len(files), 16)]
    made: list[Batch] = []

    def ours() -> None:
        made[:] = [collate([maker[position] for position in part]) for part in parts]

    def apply() -> None:
        for batch in made:
            photometric.apply(batch.global_crops.flatten(0, 1), batch.global_photometric.flatten(0, 1), colour)
            photometric.apply(batch.local_crops.flatten(0, 1), batch.local_photometric.flatten(0, 1), colour)

    pair = pairs.Pair(ours, lambda: [theirs.batch(part) for part in parts], rounds)
    return pair, [pairs.seconds(apply) for _ in range(rounds)]


def main() -> None:
    """Draw, time, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="a multiple of 16")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = {}
    with tempfile.TemporaryDirectory() as temporary:
        reader = draw(Path(temporary, "set"), given.images)
        files = [Path(temporary, f"{row}.jpg") for row in range(given.images)]
        for row, file in enumerate(files):
            file.write_bytes(reader[row].image)
        for local_count in (6, 8):
            pair, applied = measure(reader, files, local_count, given.rounds)
            milliseconds = 1000 / given.images
            numbers = pair.numbers(milliseconds)
            extra = statistics.median(time.wall for time in applied) * milliseconds
            whole = numbers["textbook"] / (numbers["ours"] + extra)
            told = {"photometric": round(extra, 4), "with_photometric": round(whole, 3)}
            cases[f"2+{local_count}"] = numbers | told
    pairs.report("loader", cases["2+6"], "ms/image", pairs.peak_mb(), 1, **{"2+8": cases["2+8"]})


if __name__ == "__main__":
    main()
