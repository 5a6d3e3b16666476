"""R3: a run that goes on at step 1,000,000 reads its first batch as soon as one at step 10: nothing is replayed."""

import io
import itertools
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from writing import crop

from pretrain.loader import LoaderConfig, MicroBatches, ViewMaker, build_loader
from pretrain.masks import MasksConfig
from pretrain.photometric import PhotometricConfig
from pretrain.views import ViewsConfig
from shards import index
from shards.manifests import file_crc, save_index
from shards.order import Order, OrderConfig
from shards.reader import ShardReader
from shards.schema import FORMAT_VERSION, MANIFEST, Manifest, ShardEntry, index_name, shard_name

TAR_SAMPLES, BATCH, MICRO = 2000, 1024, 16  # images of a tar, of a step, of the micro-batch that is waited for
STEPS = (10, 1_000_000)
READY_S = 1.0


def large_set(folder: Path, tars: int) -> Path:
    """A set of so many tars of 2,000 images; the tars are links to one."""
    folder.mkdir()
    first, images = folder.parent / "first.tar", [crop(number) for number in range(20)]
    with tarfile.open(first, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(TAR_SAMPLES):
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(images[number % 20])
            tar.addfile(member, io.BytesIO(images[number % 20]))
    rows = np.tile(index.scan_tar(first), tars)
    rows["shard"] = np.repeat(np.arange(tars), TAR_SAMPLES)
    size, crc, entries = first.stat().st_size, file_crc(first), []
    for number in range(tars):
        name = shard_name("unlabeled", number)
        (folder / name).symlink_to(first)
        entries.append(ShardEntry(name=name, split="unlabeled", samples=TAR_SAMPLES, size=size, crc32=crc))
    splits = {"unlabeled": save_index(rows, folder / index_name("unlabeled"))}
    facts = {"sources": [], "packing": {"plan": "made"}, "splits": splits, "shards": entries}
    (folder / MANIFEST).write_text(Manifest(format_version=FORMAT_VERSION, **facts).model_dump_json())
    return folder


def ready(folder: Path, step: int, workers: int) -> tuple[float, list[int], list[int]]:
    """Seconds until the first micro-batch of a step is there, beginning with the set unopened; its rows and those that
    the order says."""
    began = time.perf_counter()
    reader = ShardReader([folder], "unlabeled")
    order = Order(reader.shard_sizes, 0, OrderConfig())
    sizes = ViewsConfig(global_size=(64, 32), local_size=(32, 16), local_count=2)
    maker = ViewMaker(reader, order, 0, (sizes, PhotometricConfig(), MasksConfig()), (8, 4), 4)
    sampler = MicroBatches((step, step + 1), BATCH, MICRO, 0, 1)
    config = LoaderConfig(shards=("",), batch=BATCH, workers=workers)
    batches = iter(build_loader(maker, sampler, config, pin=False))
    rows = next(batches).rows.tolist()
    took = time.perf_counter() - began
    del batches  # ends the workers
    expected = [order(position)[1] for position in itertools.islice(range(step * BATCH, (step + 1) * BATCH), MICRO)]
    return took, rows, expected


@pytest.mark.row("R3")
def test_a_late_step_costs_no_more_reads_than_an_early_one(tmp_path, monkeypatch, figures):
    folder, pread, counts, wrong = large_set(tmp_path / "set", 20), os.pread, [], 0
    for step in STEPS:
        reads = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "pread", lambda *given, reads=reads: reads.append(given) or pread(*given))
            took, rows, expected = ready(folder, step, 0)
        counts.append(len(reads))
        wrong += rows != expected
        assert took < 20 * READY_S  # of a machine with much else to do
    note = f"{counts[0]} reads until the first {MICRO} images, at both"
    figures("R3", injected="a start at steps 10 and 1,000,000", times=2, lost=0, wrong=wrong, note=note)
    assert wrong == 0
    assert counts[0] == counts[1] <= 2 * MICRO + 8


@pytest.mark.soak
@pytest.mark.row("R3")
def test_ready_within_a_second_of_four_million(tmp_path, figures):
    folder, told, wrong = large_set(tmp_path / "set", 2090), [], 0
    for workers in (0, 2):
        for step in STEPS:
            found = [ready(folder, step, workers) for _ in range(5)]
            wrong += sum(rows != expected for _, rows, expected in found)
            told.append((max(took for took, _, _ in found), f"step {step:,}, {workers} workers"))
    note = "longest of five: " + "; ".join(f"{took:.2f} s at {what}" for took, what in told)
    injected = f"a start in {2090 * TAR_SAMPLES:,} images"
    figures("R3", injected=injected, times=20, lost=0, wrong=wrong, note=note)
    assert wrong == 0
    assert max(told)[0] < READY_S
