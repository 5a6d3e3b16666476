"""Images -> features, with any model that has `embed`: a whole split in memory, or chunk by chunk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset

from finetune.augment import Augment
from finetune.histogram import histogram_features
from recipes.errors import UserError
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
    local: bool = False,
) -> Iterator[np.ndarray]:
    """The features of each span of rows, float32 [len(span), F], by this process alone.

    model: has `embed`, images [B, 3, H, W], cameras [B] -> L2-normalised [B, F]. workers: loader processes. flip: the
    mean with the feature of the mirrored image, normalised again. local: `embed_local` in its place, [len(span), H, c].
    The batches are cut within a span, so its features do not depend on the other spans.
    """
    model.eval()
    embed = model.embed_local if local else model.embed
    batches = [span[at : at + batch] for span in spans for at in range(0, len(span), batch)]
    loader = iter(
        DataLoader(views, batch_sampler=batches, num_workers=workers, pin_memory=accelerator.device.type == "cuda")
    )
    for span in spans:
        found = []
        for _ in range(0, len(span), batch):
            images, cameras = (part.to(accelerator.device, non_blocking=True) for part in next(loader))
            with accelerator.autocast():
                features = embed(images, cameras).float()
                if flip:
                    features = torch.nn.functional.normalize(features + embed(images.flip(3), cameras).float(), dim=-1)
            found.append(features.cpu().numpy())
            meter.advance(len(images))
        yield np.concatenate(found)


@dataclass(frozen=True)
class Embedder:
    """From a reader, and rows of it, to their features; the fields as in `embed_spans`."""

    model: nn.Module
    augment: Augment
    accelerator: Accelerator
    workers: int
    flip: bool = False

    def _all(self, views: TestViews, label: str, local: bool) -> np.ndarray:
        with Meter(len(views), label, silent=not self.accelerator.is_main_process) as meter:
            how = {"flip": self.flip, "local": local}
            spans = [range(len(views))]
            (found,) = embed_spans(self.model, views, spans, self.accelerator, self.workers, meter, **how)
        return found

    def __call__(self, reader: ShardReader, rows: np.ndarray | None = None) -> EmbeddingTable:
        """float32 [N, F] with labels and keys."""
        views = TestViews(reader, self.augment, rows)
        features = self._all(views, "embed", local=False)
        labels = reader.pids[views.rows], reader.camids[views.rows]
        return EmbeddingTable(features, *labels, Keys(reader.keys[views.rows]))

    def local(self, reader: ShardReader) -> np.ndarray:
        """The local features of all images, float16 [N, H, c]. UserError where the model has none."""
        shape = getattr(self.model, "local_shape", None)
        if shape is None:
            raise UserError("benchmark.rescoring needs a model with local features, and this one has none; fine-tune "
                            "one with method.name=aligned, or leave benchmark.rescoring.distances empty")  # fmt: skip
        return self._all(TestViews(reader, self.augment), "embed stripes", local=True).astype(np.float16)


def histogram_split(reader: ShardReader) -> EmbeddingTable:
    """The colour-histogram baseline of all images of a reader: no network."""
    images = (decode(reader[row].image) for row in range(len(reader)))
    features = histogram_features(track(images, len(reader), "embed"))
    return EmbeddingTable(features, reader.pids, reader.camids, Keys(reader.keys))
