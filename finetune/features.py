"""Images -> embedding table, with any model that has `embed`."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

from finetune.augment import Augment
from finetune.histogram import histogram_features
from recipes.progress import Meter, track
from shards.embeddings import EmbeddingTable
from shards.images import decode
from shards.reader import ShardReader


class TestViews(Dataset):
    """Row -> float32 [3, H, W]."""

    __test__ = False  # no test class, whatever its name makes pytest think

    def __init__(self, reader: ShardReader, augment: Augment):
        self.reader, self.augment = reader, augment

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self.augment.test_view(decode(self.reader[row].image)))


def _embedded(model: nn.Module, views: TestViews, accelerator: Accelerator, workers: int) -> Iterator[np.ndarray]:
    loader = DataLoader(views, batch_size=256, num_workers=workers, pin_memory=accelerator.device.type == "cuda")
    with Meter(len(views), "embed", silent=not accelerator.is_main_process) as meter:
        for images in loader:
            with accelerator.autocast():
                features = model.embed(images.to(accelerator.device, non_blocking=True))
            yield features.float().cpu().numpy()
            meter.advance(len(images))


def embedder(
    model: nn.Module, augment: Augment, accelerator: Accelerator, workers: int
) -> Callable[[ShardReader], EmbeddingTable]:
    """A function from a reader to the features of all its images.

    model: has `embed`, images [B, 3, H, W] -> L2-normalised [B, F]. workers: loader processes.
    """

    @torch.no_grad()
    def embed(reader: ShardReader) -> EmbeddingTable:
        model.eval()
        features = np.concatenate(list(_embedded(model, TestViews(reader, augment), accelerator, workers)))
        return EmbeddingTable(features, reader.pids, reader.camids, reader.keys)

    return embed


def histogram_split(reader: ShardReader) -> EmbeddingTable:
    """The colour-histogram baseline of all images of a reader: no network."""
    images = (decode(reader[row].image) for row in range(len(reader)))
    features = histogram_features(track(images, len(reader), "embed"))
    return EmbeddingTable(features, reader.pids, reader.camids, reader.keys)
