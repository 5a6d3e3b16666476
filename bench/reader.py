"""A set as large as LUPerson: how soon the reader is ready, what it keeps in memory, and how fast any sample is read.

    python bench/reader.py

4,180,243 samples in 2,000 tars. The index is real; on disk each tar is a link to one of a few real ones, so that the
bytes fit anywhere. `ours` reads samples in the shuffled order of an epoch, found through the order and the index,
each checked by its crc. The textbook way is `webdataset.WebDataset` streaming the same tars from front to back,
unchecked. Ready and memory are taken in fresh processes, at the first step and at step 1,000,000 of global batch
1024, with two forked workers that read 2,000 samples each: `mb_above_imports` is of the parent, `worker_mb` what one
worker has for itself.
"""

import argparse
import io
import json
import multiprocessing
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pairs
import webdataset

from shards import index
from shards.manifests import file_crc, save_index
from shards.order import Order, OrderConfig
from shards.reader import ShardReader
from shards.schema import FORMAT_VERSION, MANIFEST, Manifest, ShardEntry, index_name, shard_name

SAMPLES, TARS, REAL = 4_180_243, 2_000, 4
BATCH = 1024


def _tar(path: Path, first: int, count: int, size: int) -> np.ndarray:
    """Write a tar of `count` samples of `size` bytes; its index rows."""
    rng = np.random.default_rng(first)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            key = f"{first + number:012d}"
            for name, data in ((f"{key}.jpg", rng.bytes(size)), (f"{key}.json", b"{}")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return index.scan_tar(path)


def make(folder: Path, size: int) -> None:
    """The synthetic set; images of `size` random bytes."""
    each, more = divmod(SAMPLES, TARS)
    real = {}
    for count in {each, each + 1}:
        for number in range(REAL):
            path = folder / f"real-{count}-{number}"
            real[count, number] = (path, _tar(path, number * 10_000, count, size), file_crc(path))
    entries, parts = [], []
    for number in range(TARS):
        count = each + (number < more)
        path, rows, crc = real[count, number % REAL]
        name = shard_name("unlabeled", number)
        (folder / name).symlink_to(path)
        rows = rows.copy()
        rows["shard"] = number
        parts.append(rows)
        tar_size = path.stat().st_size
        entries.append(ShardEntry(name=name, split="unlabeled", samples=count, size=tar_size, crc32=crc))
    count = save_index(index.join(parts), folder / index_name("unlabeled"))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        sources=[],
        packing={"plan": "bench"},
        splits={"unlabeled": count},
        shards=entries,
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def memory(kind: str) -> float:
    """MB of this process; kind: "Rss" all that is resident, "Private" what nobody shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def _worker(reader: ShardReader, order: Order, start: int, answers: multiprocessing.Queue) -> None:
    before = memory("Private")
    for position in range(start, start + 2_000):
        reader[order(position)[1]]
    answers.put(memory("Private") - before)


def probe(folder: str, step: int) -> None:
    """In a process of its own: open the set, read the batch of a step, fork two workers; print what it took."""
    before = memory("Rss")
    began = time.perf_counter()
    reader = ShardReader([folder], "unlabeled")
    order = Order(reader.shard_sizes, 0, OrderConfig())
    reader[order(step * BATCH)[1]]
    ready = time.perf_counter() - began
    for position in range(step * BATCH, (step + 1) * BATCH):
        reader[order(position)[1]]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    starts = [(step + 1 + worker) * BATCH for worker in range(2)]
    workers = [context.Process(target=_worker, args=(reader, order, start, answers)) for start in starts]
    for worker in workers:
        worker.start()
    own = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    told = {"ready_s": ready, "mb_above_imports": memory("Rss") - before, "worker_mb": max(own)}
    print(json.dumps({name: round(value, 3) for name, value in told.items()}))


def main() -> None:
    """Make the set, time, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the set goes for a while; default: temporary")
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.probe:
        probe(given.probe[0], int(given.probe[1]))
        return
    cases, steps = {}, {}
    for size in (2_000, 20_000):
        with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
            folder = Path(temporary)
            make(folder, size)
            if not steps:
                for step in (0, 1_000_000):
                    command = [sys.executable, __file__, "--probe", temporary, str(step)]
                    steps[step] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            reader = ShardReader([folder], "unlabeled")
            order = Order(reader.shard_sizes, 0, OrderConfig())
            tars = [str(folder / shard_name("unlabeled", number)) for number in range(8)]
            count = int(reader.shard_sizes[:8].sum())
            start = 1_000_000 * BATCH

            span = range(start, start + count)

            def ours(reader: ShardReader = reader, order: Order = order, span: range = span) -> None:
                for position in span:
                    reader[order(position)[1]]

            def stream(tars: list[str] = tars, count: int = count) -> None:
                assert sum(1 for _ in webdataset.WebDataset(tars, shardshuffle=False)) == count

            pair = pairs.Pair(ours, stream, given.rounds)
            told = pair.numbers(1e6 / count)
            rates = {f"{who}_per_s": round(1e6 / told[who]) for who in ("ours", "textbook")}
            cases[f"{size} bytes"] = told | rates
    first, second = cases.values()
    pairs.report("reader", first, "us/sample", pairs.peak_mb(), 1, **{"20 kB": second, "steps": steps})


if __name__ == "__main__":
    main()
