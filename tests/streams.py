"""What a forked run writes down about itself, and errors that it meets: told before its script starts (forked.py)."""

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.journal import Journal as FinetuneJournal
from finetune.methods.base import ImageBatch
from pretrain.batch import Batch
from pretrain.journal import Journal


def _append(file: str, step: int, rows: Sequence[Tensor], more: Sequence[Sequence[Tensor]]) -> None:
    """A line of a stream: what the batches of a step are. It is written at once, so a kill leaves whole lines."""
    digest = hashlib.sha256()
    for tensor in (*rows, *itertools.chain(*more)):
        digest.update(tensor.numpy().tobytes())
    line = {"step": step, "rows": [row for batch in rows for row in batch.tolist()], "digest": digest.hexdigest()}
    with open(file, "a") as lines:
        lines.write(json.dumps(line) + "\n")


def stream(file: str) -> None:
    """Append a line for each step of a pretraining: its rows, and a hash of rows, crop boxes, masks and drops."""
    waited_for, record, batches = Journal.waited_for, Journal.record, []

    def waiting(journal: Journal, *given: Any) -> Iterator[Batch]:
        for batch in waited_for(journal, *given):
            batches.append(batch)
            yield batch

    def recording(journal: Journal, step: int, *given: Any) -> None:
        parts = [(b.boxes, b.masks, b.global_drops, b.local_drops) for b in batches]
        _append(file, step, [batch.rows for batch in batches], parts)
        batches.clear()
        record(journal, step, *given)

    Journal.waited_for, Journal.record = waiting, recording


def finetune_stream(file: str) -> None:
    """The same for a fine-tune: "rows" are the labels of the images, the hash is of images, labels and draws."""
    to, record, batches = ImageBatch.to, FinetuneJournal.record, []

    def moving(batch: ImageBatch, *given: Any) -> ImageBatch:
        batches.append(batch)
        return to(batch, *given)

    def recording(journal: FinetuneJournal, step: int, *given: Any) -> None:
        _append(file, step, [batch.labels for batch in batches], [(b.images, b.drops, b.cameras) for b in batches])
        batches.clear()
        record(journal, step, *given)

    ImageBatch.to, FinetuneJournal.record = moving, recording


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _children() -> list[int]:
    return [int(pid) for pid in Path("/proc/self/task", str(os.getpid()), "children").read_text().split()]


def measure(file: str, every: int) -> None:
    """Append a line every so many steps of a pretraining: resident MB of the process and of its workers, open files,
    threads."""
    record = Journal.record

    def recording(journal: Journal, step: int, *given: Any) -> None:
        record(journal, step, *given)
        if step % every:
            return
        line = {
            "step": step,
            "mb": _resident_mb(os.getpid()),
            "workers_mb": [_resident_mb(pid) for pid in _children()],
            "files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
        }
        with open(file, "a") as lines:
            lines.write(json.dumps(line) + "\n")

    Journal.record = recording


def fail(step: int) -> None:
    """Raise what nobody expects at the end of a step of a pretraining."""
    record = Journal.record

    def recording(journal: Journal, at: int, *given: Any) -> None:
        record(journal, at, *given)
        if at == step:
            raise RuntimeError(f"planted at step {step}")

    Journal.record = recording
