"""From shards to batches: a map-style dataset over positions, a sampler that is a range, torch's DataLoader."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from pretrain import masks, photometric, views, views_pil
from pretrain.backbone import Backbone
from pretrain.batch import Batch, Views, collate
from pretrain.gaps import Gaps
from pretrain.masks import MasksConfig
from pretrain.photometric import PhotometricConfig
from pretrain.views import ViewsConfig
from recipes.errors import UserError
from recipes.load import Section
from shards.decoding import pixels
from shards.order import Order, OrderConfig, rank_positions
from shards.reader import ShardReader
from shards.schema import BadSample
from shards.seeds import generator

NUMBERS = views.NUMBERS + photometric.NUMBERS  # random numbers of a view
REPLACEMENTS = 10  # samples tried in the place of a bad one


class LoaderConfig(Section):
    """Which images, and how many at a time."""

    # each the folder or the URL of a set made by shards/build.py, or SOURCE:PATH for a data set in its own folder
    shards: tuple[str, ...] = Field(min_length=1)
    splits: tuple[Literal["unlabeled", "train"], ...] = ("unlabeled",)  # of each set; never a test split
    keep: Path | None = None  # keep-list written by shards/cfs_keep.py: only its samples; None: all
    draw: Path | None = None  # recipe under recipes/shards that makes a missing set on first use
    batch: int = Field(1024, ge=1)  # global: images an optimiser step, over all processes
    batch_per_device: int = Field(128, ge=1)  # at most; the accumulation steps follow
    workers: int = Field(4, ge=0)  # loader processes of each training process
    prefetch: int = Field(2, ge=1)  # batches ahead of each worker
    max_bad: float = Field(0.001, ge=0, le=1)  # share of damaged samples, replaced by others, above which a run stops


class ViewMaker(Dataset):
    """Position in the run -> the views of its sample. Every random number is a function of (seed, epoch, row, view).

    A sample that cannot be read or decoded is replaced by another one; its random numbers stay those of its own row,
    and nothing changes for any other sample. UserError when all the replacements are damaged, too.
    """

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
        reference = self.views.backend == "pil"
        self.crop, self.change = (views_pil.crop, views_pil.apply) if reference else (views.crop, photometric.apply)
        cv2.setNumThreads(1)  # OpenCV's threads do not live on in a forked worker, and each worker has one core

    def __len__(self) -> int:
        return len(self.reader)

    def __getitems__(self, positions: list[int]) -> list[Views]:
        """The samples of a micro-batch; what is remote is fetched side by side, with what comes next in its lanes."""
        if self.reader.remote:
            self.reader.ahead(self.order.shards_near(positions))
        return [self[position] for position in positions]

    def __getitem__(self, position: int) -> Views:
        epoch, row = self.order(position)
        used, image = self._image(epoch, row)
        count = 2 + self.views.local_count
        rng = generator(self.seed, "views", epoch, row)
        crops, boxes = [], []
        for view, u in enumerate(rng.random((count, NUMBERS), dtype=np.float32).tolist()):
            box = views.draw_box(u, image, view >= 2, self.views)
            part = self.crop(image, box, self.views.global_size if view < 2 else self.views.local_size)
            crops.append(self.change(part, photometric.draw(u[views.NUMBERS :], min(view, 2), self.photometric)))
            boxes.append(box)
        drops = rng.random((count, self.drop_places), dtype=np.float32)
        return Views(
            row=used,
            replaced=-1 if used == row else row,
            global_crops=np.array(crops[:2]),
            local_crops=np.array(crops[2:], np.uint8).reshape(-1, *self.views.local_size, 3),
            boxes=np.array(boxes, np.int64),
            masks=self._masks(epoch, row),
            global_drops=drops[:2],
            local_drops=drops[2:],
        )

    def _image(self, epoch: int, row: int) -> tuple[int, np.ndarray]:
        """The row that is used, `row` itself if it is sound, and its image uint8 [H, W, 3]."""
        used, faults = row, []
        for attempt in range(REPLACEMENTS + 1):
            try:
                sample = self.reader[used]
                image = pixels(sample.image, f"sample {sample.key!r}")
            except BadSample as error:
                faults.append(error)
                used = int(generator(self.seed, "replacement", epoch, row, attempt).integers(len(self.reader)))
                continue
            if faults:
                print(f"warning: {faults[0]}; another sample takes its place", file=sys.stderr, flush=True)
            return used, image
        raise UserError(
            f"row {row} of the shard set is damaged, and so are all {REPLACEMENTS} drawn in its place; check the set "
            f"with shards/check.py. The last one: {faults[-1]}"
        )

    def _masks(self, epoch: int, row: int) -> np.ndarray:
        if epoch < self.masks.start_epoch:
            return np.zeros((2, *self.grid), dtype=bool)
        rng = generator(self.seed, "masks", epoch, row)
        return np.stack([masks.draw_mask(rng, self.grid, self.masks) for _ in range(2)])


class MicroBatches:
    """The positions of this process from a step on, cut into micro-batches: the sampler of the DataLoader."""

    def __init__(
        self,
        span: tuple[int, int],
        batch: int,
        micro: int,
        rank: int,
        ranks: int,
        gaps: Gaps | None = None,
    ):
        """span: first step and the one after the last. batch: global. micro: images of one micro-batch. gaps: batches
        that are left out."""
        self.first_step, self.steps = span
        self.batch, self.micro, self.rank, self.ranks, self.gaps = batch, micro, rank, ranks, gaps or Gaps()

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            positions = rank_positions(self.gaps.data_step(step), self.batch, self.rank, self.ranks)
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


class Recipe(Protocol):
    """The sections that say which batches come."""

    seed: int
    loader: LoaderConfig
    order: OrderConfig
    views: ViewsConfig
    photometric: PhotometricConfig
    masks: MasksConfig


def build_batches(
    config: Recipe, reader: ShardReader, backbone: Backbone, span: tuple[int, int], accelerator: Accelerator, gaps: Gaps
) -> Iterator[Batch]:
    """The micro-batches of this process for the steps of `span`, one after the other."""
    data, ranks = config.loader, accelerator.num_processes
    order = Order(reader.shard_sizes, config.seed, config.order)
    views = (config.views, config.photometric, config.masks)
    maker = ViewMaker(reader, order, config.seed, views, backbone.grid, len(backbone.drops))
    sampler = MicroBatches(span, data.batch, micro_batch(data, ranks), accelerator.process_index, ranks, gaps)
    return iter(build_loader(maker, sampler, data, pin=accelerator.device.type == "cuda"))


def _one_thread(_: int) -> None:
    # one core for each worker; more threads would fight with the training process
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
