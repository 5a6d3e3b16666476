"""Records and settings for the tests of the writer."""

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image

from shards.catalogue import read_records
from shards.images import ImagesConfig
from shards.packing import PackingConfig, make_plan
from shards.raw.walking import read_file
from shards.schema import Record
from shards.writer import pack

CONFIGS = [{"name": "made"}]


def crop(number: int, kind: str = "JPEG", height: int = 32) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height // 8, 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((16, height)).save(buffer, kind)
    return buffer.getvalue()


def made_rows(tmp_path: Path) -> list[Record]:
    """50 training images with labels, 6 queries with captions, 10 unlabeled PNGs."""
    (tmp_path / "raw").mkdir()
    rows = []
    for i in range(66):
        path = tmp_path / "raw" / f"{i:03}"
        path.write_bytes(crop(i, "PNG" if i >= 56 else "JPEG"))
        read = functools.partial(read_file, path)
        if i < 50:
            rows.append(Record(f"train/{i:03}", "train", read, i // 5, i % 2, origin=str(path)))
        elif i < 56:
            rows.append(Record(f"query/{i:03}", "query", read, i, 0, (f"person {i} in red, éàü",), origin=str(path)))
        else:
            rows.append(Record(f"{i:03}", "unlabeled", read, origin=str(path)))
    return rows


def planned(rows, folder, **packing):
    """(name, split, records) of each tar of the plan, and the digest."""
    spool = folder / "spool"
    plan = make_plan(rows, PackingConfig(**{"shard_samples": 8} | packing), ImagesConfig(), CONFIGS, spool)
    return [(s.name, s.split, list(read_records(spool, s.records))) for s in plan.shards], plan.digest


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(rows, out, images=None, **packing):
    return pack(rows, out, PackingConfig(**{"shard_samples": 8} | packing), images or ImagesConfig(), CONFIGS)


def stop():
    raise KeyboardInterrupt


def interrupt_at(rows, place):
    """The same records, but reading the one at `place` is Ctrl-C."""
    row = rows[place]
    cut = Record(row.key, row.split, stop, row.pid, row.camid, row.captions, row.origin)
    return [*rows[:place], cut, *rows[place + 1 :]]
