"""Work that the processes of a run divide, or that one of them does for all."""

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from accelerate import Accelerator

from finetune.features import BATCH
from finetune.id_losses import processes
from recipes.errors import UserError
from shards.embeddings import EmbeddingTable
from shards.reader import ShardReader

T = TypeVar("T")


def share(rows: int, rank: int, ranks: int) -> slice:
    """The part of `rows` places that process `rank` of `ranks` takes: whole batches, in order, so that the features are
    those of one process to the last bit. Parts at the end may be empty."""
    size = math.ceil(math.ceil(rows / BATCH) / ranks) * BATCH
    return slice(min(rank * size, rows), min((rank + 1) * size, rows))


def embed_together(
    embed: Callable[[ShardReader, np.ndarray], EmbeddingTable], reader: ShardReader, rows: np.ndarray, acc: Accelerator
) -> np.ndarray:
    """Features of rows of a reader, float32 [N, F], on every process; each embeds its share. All must call it.

    embed: of features.Embedder. rows: int64 [N].
    """
    mine = rows[share(len(rows), acc.process_index, acc.num_processes)]
    # the width of the features is not known before one is there
    found = embed(reader, mine if len(mine) else rows[:1]).features[: len(mine)]
    if acc.num_processes == 1:
        return found
    parts = [None] * acc.num_processes
    dist.all_gather_object(parts, found)
    return np.concatenate(parts)


def by_first(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in all of them. All must call it; a UserError there is one here.

    The answer of every process would be the same only if their machines rounded alike.
    """
    if processes() == 1:
        return work()
    told: list = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = work()
        except UserError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told, src=0)
    if told[1]:
        raise UserError(told[1])
    return told[0]
