"""Images -> features, with any model that has `embed`: a whole split in memory, or chunk by chunk."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

from finetune.augment import Augment
from finetune.histogram import histogram_features
from recipes.progress import Meter, track
from shards.embeddings import EmbeddingTable, Keys
from shards.images import decode
from shards.reader import ShardReader

BATCH = 256  # images


class TestViews(Dataset):
    """Row -> float32 [3, H, W] and its camera. rows: int64, of the reader; None: all."""

    __test__ = False  # no test class, whatever its name makes pytest think

    def __init__(self, reader: ShardReader, augment: Augment, rows: np.ndarray | None = None):
        self.reader, self.augment = reader, augment
        self.rows = np.arange(len(reader)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
        row = int(self.rows[place])
        return torch.from_numpy(self.augment.test_view(decode(self.reader[row].image))), int(self.reader.camids[row])


@torch.no_grad()
def embed_spans(
    model: nn.Module,
    views: TestViews,
    spans: Sequence[range],
    accelerator: Accelerator,
    workers: int,
    meter: Meter,
    batch: int = BATCH,
    flip: bool = False,
) -> Iterator[np.ndarray]:
    """The features of each span of rows, float32 [len(span), F], by this process alone.

    model: has `embed`, images [B, 3, H, W], cameras [B] -> L2-normalised [B, F]. workers: loader processes. flip: the
    mean with the feature of the mirrored image, normalised again. The batches are cut within a span, so its features do
    not depend on the other spans.
    """
    model.eval()
    batches = [span[at : at + batch] for span in spans for at in range(0, len(span), batch)]
    loader = iter(
        DataLoader(views, batch_sampler=batches, num_workers=workers, pin_memory=accelerator.device.type == "cuda")
    )
    for span in spans:
        found = []
        for _ in range(0, len(span), batch):
            images, cameras = (part.to(accelerator.device, non_blocking=True) for part in next(loader))
            with accelerator.autocast():
                features = model.embed(images, cameras).float()
                if flip:
                    mirrored = model.embed(images.flip(3), cameras).float()
                    features = torch.nn.functional.normalize(features + mirrored, dim=1)
            found.append(features.cpu().numpy())
            meter.advance(len(images))
        yield np.concatenate(found)


def embedder(
    model: nn.Module, augment: Augment, accelerator: Accelerator, workers: int, flip: bool = False
) -> Callable[..., EmbeddingTable]:
    """A function from a reader, and rows of it, to their features; model, workers and flip as in `embed_spans`."""

    def embed(reader: ShardReader, rows: np.ndarray | None = None) -> EmbeddingTable:
        views = TestViews(reader, augment, rows)
        with Meter(len(views), "embed", silent=not accelerator.is_main_process) as meter:
            (features,) = embed_spans(model, views, [range(len(views))], accelerator, workers, meter, flip=flip)
        labels = reader.pids[views.rows], reader.camids[views.rows]
        return EmbeddingTable(features, *labels, Keys(reader.keys[views.rows]))

    return embed


def histogram_split(reader: ShardReader) -> EmbeddingTable:
    """The colour-histogram baseline of all images of a reader: no network."""
    images = (decode(reader[row].image) for row in range(len(reader)))
    features = histogram_features(track(images, len(reader), "embed"))
    return EmbeddingTable(features, reader.pids, reader.camids, Keys(reader.keys))
