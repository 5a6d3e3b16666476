"""From JPEGs to the optimiser's step, ours and the textbook's, for bench/throughput.py."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import loader
import torch
from pairs.children import memory_mb
from torch import Tensor
from torch.utils.data import DataLoader

from pretrain.backbone import BackboneConfig
from pretrain.batch import Batch
from pretrain.heads import HeadsConfig
from pretrain.loader import LoaderConfig, MicroBatches, ViewMaker, build_loader
from pretrain.masks import MasksConfig
from pretrain.photometric import PhotometricConfig
from pretrain.views import ViewsConfig
from shards.order import Order, OrderConfig
from shards.reader import ShardReader
from textbook_step import Images, Settings, TextbookStep
from textbook_step.ours import OurStep, build_student, shape_of


@dataclass(frozen=True)
class Work:
    """What both do."""

    sets: tuple[tuple[str, ...], ...]  # each what one reader reads: folders of shard sets, or SOURCE:PATH
    split: str
    files: str  # folder of JPEGs, for the textbook
    model: str
    batch: int
    locals: int
    out_dim: int
    bf16: bool
    compile: bool
    device: str
    workers: int
    prefetch: int  # batches ahead of each worker

    @property
    def views(self) -> ViewsConfig:
        return ViewsConfig(local_count=self.locals)

    @property
    def warm(self) -> int:
        """Steps before the clock runs: what the workers made while nobody took it."""
        return max(2, self.workers * self.prefetch)


class Took(NamedTuple):
    """Of some steps."""

    seconds: float
    waited: float  # of them, for the loader


class Pipeline(ABC):
    """A loader and a step. place: which of Work.sets."""

    step: Any

    def __init__(self, work: Work):
        self.imported = memory_mb("VmRSS")
        self.work, self.cuda = work, work.device == "cuda"
        config, head = BackboneConfig(name=work.model), HeadsConfig(out_dim=work.out_dim)
        self.student = build_student(config, head, work.views.global_size, compiled=work.compile and self.compiles)
        self.places, self.grid = len(self.student.backbone.drops), self.student.backbone.grid

    compiles = False

    @abstractmethod
    def batches(self, place: int, count: int) -> Iterator[Any]:
        """The next `count` batches."""

    def on_device(self, batch: Any) -> Any:
        """A batch as the step takes it."""
        return batch.to(torch.device(self.work.device))

    def _settle(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def whole(self, place: int, steps: int) -> Took:
        """Loader and step, as a run has them."""
        batches, waited = self.batches(place, 2 * self.work.warm + steps), 0.0  # the workers have work until the end
        for _ in range(self.work.warm):
            self.step(self.on_device(next(batches)))
        start = self._settle()
        for _ in range(steps):
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            self.step(self.on_device(batch))
        return Took(self._settle() - start, waited)

    def loading(self, place: int, steps: int) -> float:
        """Seconds of the loader alone."""
        batches = self.batches(place, 2 * self.work.warm + steps)
        for _ in range(self.work.warm):
            next(batches)
        start = time.perf_counter()
        for _ in range(steps):
            next(batches)
        return time.perf_counter() - start

    def stepping(self, place: int, steps: int) -> float:
        """Seconds of the step alone, on one batch."""
        batch = self.on_device(next(self.batches(place, 1)))
        self.step(batch)
        start = self._settle()
        for _ in range(steps):
            self.step(batch)
        return self._settle() - start

    def peak_mb(self) -> float:
        """Most memory of this process above the imports, MiB, without its workers; on a GPU, of tensors."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.cuda else memory_mb("VmHWM") - self.imported


class OurPipeline(Pipeline):
    """ShardReader, ViewMaker, DataLoader and step of pretrain/run.py."""

    compiles = True

    def __init__(self, work: Work):
        super().__init__(work)
        self.step = OurStep(self.student, Settings(), work.bf16, work.device)
        self.makers, self.opening = [], []
        for paths in work.sets:
            start = time.perf_counter()
            reader = ShardReader(list(paths), work.split)
            order = Order(reader.shard_sizes, 0, OrderConfig())
            configs = (work.views, PhotometricConfig(), MasksConfig())
            maker = ViewMaker(reader, order, 0, configs, self.grid, self.places)
            maker[len(reader) // 2]
            self.opening.append(time.perf_counter() - start)
            self.makers.append(maker)
        self.next = [len(maker) // 2 // work.batch for maker in self.makers]  # first step: the middle of an epoch

    def ready(self) -> list[float]:
        """Seconds from nothing to the first views, of each set."""
        return self.opening

    def batches(self, place: int, count: int) -> Iterator[Batch]:
        work, first = self.work, self.next[place]
        self.next[place] += count
        config = LoaderConfig(
            shards=work.sets[place],
            batch=work.batch,
            batch_per_device=work.batch,
            workers=work.workers,
            prefetch=work.prefetch,
        )
        sampler = MicroBatches((first, first + count), work.batch, work.batch, 0, 1)
        return iter(build_loader(self.makers[place], sampler, config, pin=self.cuda))


class TextbookPipeline(Pipeline):
    """torchvision on PIL images in a DataLoader, file by file, and the textbook's step."""

    def __init__(self, work: Work):
        super().__init__(work)
        precision = "published" if work.bf16 else "float32"
        weights, rate = self.student.state_dict(), BackboneConfig().drop_path
        self.step = TextbookStep(weights, shape_of(self.student), rate, Settings(), precision, work.device)
        del self.student
        self.dataset = loader.Textbook(sorted(Path(work.files).glob("*.jpg")), work.views)

    def batches(self, place: int, count: int) -> Iterator[Images]:
        work, files = self.work, len(self.dataset.files)
        generator = torch.Generator().manual_seed(count)
        chosen = torch.randint(files, (count, work.batch), generator=generator).tolist()
        data = DataLoader(
            self.dataset,
            batch_sampler=chosen,
            collate_fn=self._collate,
            num_workers=work.workers,
            prefetch_factor=work.prefetch if work.workers else None,
            pin_memory=self.cuda,
            worker_init_fn=_one_thread,
        )
        return iter(data)

    def _collate(self, samples: list[tuple[list[Tensor], Tensor]]) -> Images:
        crops, masks = zip(*samples, strict=True)
        views = [torch.stack(view) for view in zip(*crops, strict=True)]
        draws = list(torch.rand(len(views), len(samples), self.places))
        return Images(views, list(torch.stack(masks, dim=1)), draws)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
