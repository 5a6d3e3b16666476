"""Training images of a fine-tune: global P x K batches, each process its part, every random number of its own seed."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from finetune.augment import Augment
from finetune.identities import Identities
from finetune.methods.base import ImageBatch, Plan
from shards.images import decode
from shards.reader import ShardReader
from shards.seeds import generator

# epoch, batch, slot in the global batch, position in identities.rows, class; word numbers int64 [L] or None
Place = tuple[int, int, int, int, int, np.ndarray | None]
Item = tuple[np.ndarray, int, np.ndarray, int, np.ndarray | None]


class TrainViews(Dataset):
    """Place -> (image, label, drop-path draws, camera, words)."""

    def __init__(self, reader: ShardReader, identities: Identities, augment: Augment, seed: int, draws: int):
        self.reader, self.identities, self.augment = reader, identities, augment
        self.seed, self.draws = seed, draws

    def __getitem__(self, place: Place) -> Item:
        epoch, batch, slot, position, label, words = place
        # the slot, not the image: an image may stand in a batch more than once
        rng = generator(self.seed, "finetune/views", epoch, batch, slot)
        row = int(self.identities.rows[position])
        view = self.augment.train_view(decode(self.reader[row].image), rng, partial(self._another, position))
        draws = rng.random(self.draws, dtype=np.float32)
        return view, label, draws, int(self.reader.camids[row]), words

    def _another(self, position: int, rng: np.random.Generator) -> Image.Image:
        """A training image that is not the one at `position`."""
        rows = self.identities.rows
        return decode(self.reader[int(rows[(position + rng.integers(1, len(rows))) % len(rows)])].image)


def seed_torch(seed: int, step: int, rank: int) -> None:
    """Seed torch's own generators for a step: models of timm draw their stochastic depth from them."""
    torch.manual_seed(int(generator(seed, "finetune/torch", step, rank).integers(2**62)))


class Places:
    """A sampler whose batches are set anew for each epoch, so that the workers live through all of them."""

    def __init__(self) -> None:
        self.batches: list[list[Place]] = []

    def __iter__(self) -> Iterator[list[Place]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def places(epoch: int, plan: Plan, per_identity: int, rank: int, ranks: int) -> list[list[Place]]:
    """The places of process `rank`: of each global batch P / ranks identities."""
    size = plan.batches.shape[1] // ranks
    assert size % per_identity == 0, "checked by sampling.shard_batch"
    slots, words = range(rank * size, (rank + 1) * size), plan.words

    def place(number: int, slot: int) -> Place:
        position = int(plan.batches[number, slot])
        return epoch, number, slot, position, int(plan.labels[position]), None if words is None else words[number, slot]

    return [[place(number, slot) for slot in slots] for number in range(len(plan.batches))]


def collate(items: list[Item]) -> ImageBatch:
    """Stack the images of one process."""
    parts = zip(*items, strict=True)
    return ImageBatch(*(None if part[0] is None else torch.from_numpy(np.stack(part)) for part in parts))


def build_loader(views: TrainViews, sampler: Places, workers: int) -> DataLoader:
    """torch's DataLoader over what the sampler holds at the time."""
    return DataLoader(
        views, batch_sampler=sampler, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )
