"""From shards to batches: a map-style dataset over positions, a sampler that is a range, torch's DataLoader."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from pretrain import masks, photometric, views
from pretrain.batch import Views, collate
from pretrain.masks import MasksConfig
from pretrain.photometric import PhotometricConfig
from pretrain.views import ViewsConfig
from recipes.load import Section
from shards.images import decode
from shards.order import Order, rank_positions
from shards.reader import ShardReader
from shards.seeds import generator


class LoaderConfig(Section):
    """Which images, and how many at a time."""

    shards: tuple[Path, ...] = Field(min_length=1)  # folders made by shards/build.py
    splits: tuple[Literal["unlabeled", "train"], ...] = ("unlabeled",)  # of each set; never a test split
    draw: Path | None = None  # recipe under recipes/shards that makes a missing set on first use
    batch: int = Field(1024, ge=1)  # global: images an optimiser step, over all processes
    batch_per_device: int = Field(128, ge=1)  # at most; the accumulation steps follow
    workers: int = Field(4, ge=0)  # loader processes of each training process
    prefetch: int = Field(2, ge=1)  # batches ahead of each worker


class ViewMaker(Dataset):
    """Position in the run -> the views of its sample. Every random number is a function of (seed, epoch, row, view)."""

    def __init__(
        self,
        reader: ShardReader,
        order: Order,
        seed: int,
        configs: tuple[ViewsConfig, PhotometricConfig, MasksConfig],
        grid: tuple[int, int],
        drop_places: int,
    ):
        self.reader, self.order, self.seed = reader, order, seed
        self.views, self.photometric, self.masks = configs
        self.grid, self.drop_places = grid, drop_places

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, position: int) -> Views:
        epoch, row = self.order(position)
        image = decode(self.reader[row].image)
        crops, boxes, numbers, drops = [], [], [], []
        for view in range(2 + self.views.local_count):
            rng = generator(self.seed, "views", epoch, row, view)
            cut = views.global_view if view < 2 else views.local_view
            pixels, box = cut(image, rng, self.views)
            crops.append(pixels)
            boxes.append(box)
            numbers.append(photometric.draw(rng, min(view, 2), self.photometric))
            drops.append(rng.random(self.drop_places, dtype=np.float32))
        return Views(
            row=row,
            global_crops=np.stack(crops[:2]),
            local_crops=np.stack(crops[2:]) if crops[2:] else np.zeros((0, *self.views.local_size, 3), np.uint8),
            boxes=np.stack(boxes),
            global_photometric=np.stack(numbers[:2]),
            local_photometric=np.array(numbers[2:], np.float32).reshape(-1, photometric.NUMBERS),
            masks=np.stack([self._mask(epoch, row, view) for view in range(2)]),
            global_drops=np.stack(drops[:2]),
            local_drops=np.array(drops[2:], np.float32).reshape(-1, self.drop_places),
        )

    def _mask(self, epoch: int, row: int, view: int) -> np.ndarray:
        if epoch < self.masks.start_epoch:
            return np.zeros(self.grid, dtype=bool)
        return masks.draw_mask(generator(self.seed, "masks", epoch, row, view), self.grid, self.masks)


class MicroBatches:
    """The positions of this process from a step on, cut into micro-batches: the sampler of the DataLoader."""

    def __init__(self, span: tuple[int, int], batch: int, micro: int, rank: int, ranks: int):
        """span: first step and the one after the last. batch: global. micro: images of one micro-batch."""
        self.first_step, self.steps = span
        self.batch, self.micro, self.rank, self.ranks = batch, micro, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            positions = rank_positions(step, self.batch, self.rank, self.ranks)
            for start in range(0, len(positions), self.micro):
                yield list(positions[start : start + self.micro])

    def __len__(self) -> int:
        return (self.steps - self.first_step) * (self.batch // self.ranks // self.micro)


def micro_batch(config: LoaderConfig, ranks: int) -> int:
    """Images a device takes at once: the largest divisor of its share that is not above loader.batch_per_device."""
    share = config.batch // ranks
    return max(size for size in range(1, min(share, config.batch_per_device) + 1) if share % size == 0)


def build_loader(dataset: ViewMaker, batches: MicroBatches, config: LoaderConfig, pin: bool) -> DataLoader:
    """torch's DataLoader over the micro-batches of this process. pin: page-locked memory, for a GPU."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        pin_memory=pin,
        worker_init_fn=_one_thread,
    )


def _one_thread(_: int) -> None:
    # a worker only crops and stacks; more threads would fight with the training process
    torch.set_num_threads(1)
