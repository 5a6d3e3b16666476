"""One run by several processes that are forks (forked.py), what its samples look like, and a stop at a step."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import small
from forked import Prepare, Run, Server

from pretrain.batch import Batch
from pretrain.journal import Journal

PARTS = ("boxes", "masks", "global_drops", "local_drops", "global_crops", "local_crops")  # view-major: [V, B, ...]


def start(server: Server, command: list[str], ranks: int, prepare: Prepare = ()) -> list[Run]:
    """Start the processes of one run, which meet by gloo; one process is started without any group."""
    if ranks == 1:
        return [server.start(command, prepare)]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": small.free_port(), "ACCELERATE_USE_CPU": "true"}
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [
        server.start(command, prepare, **meet, **sizes, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)
    ]


def wait(runs: Sequence[Run]) -> set[int]:
    """The exit statuses of the processes, when all have ended."""
    return {run.wait() for run in runs}


def _look(batch: Batch, place: int) -> str:
    """A hash of all that was made of one sample."""
    digest = hashlib.sha256()
    for name in PARTS:
        digest.update(getattr(batch, name)[:, place].contiguous().numpy().tobytes())
    return digest.hexdigest()


def samples(folder: str) -> None:
    """Told before the script starts: append a line for each step of a pretraining, with the samples that this process
    took: row and hash of crops, boxes, masks and stochastic depth."""
    waited_for, record, seen = Journal.waited_for, Journal.record, []
    file = Path(folder) / f"rank-{os.environ.get('RANK', '0')}-pid-{os.getpid()}"

    def waiting(journal: Journal, *given: Any) -> Iterator[Batch]:
        for batch in waited_for(journal, *given):
            seen.extend([row, _look(batch, place)] for place, row in enumerate(batch.rows.tolist()))
            yield batch

    def recording(journal: Journal, step: int, *given: Any) -> None:
        with file.open("a") as lines:
            lines.write(json.dumps([step, seen]) + "\n")
        seen.clear()
        record(journal, step, *given)

    Journal.waited_for, Journal.record = waiting, recording


def stop_at(step: int, rank: int) -> None:
    """Told before the script starts: process `rank` is asked to stop, at the end of a step of a pretraining."""
    if int(os.environ.get("RANK", "0")) != rank:
        return
    record = Journal.record

    def recording(journal: Journal, at: int, *given: Any) -> None:
        record(journal, at, *given)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    Journal.record = recording


def steps_of(folder: Path) -> dict[int, list[tuple[int, str]]]:
    """The samples of each step, of whichever processes, sorted; what `samples` wrote."""
    found: dict[int, list[tuple[int, str]]] = {}
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            step, seen = json.loads(line)
            found.setdefault(step, []).extend((row, look) for row, look in seen)
    return {step: sorted(seen) for step, seen in sorted(found.items())}
