"""Records -> shard set on disk: tars, an index a split, and the manifest, which is written last.

Everything is written into `<out>.partial` and renamed to `out` when it is complete, so `out` is a whole set or nothing.
A run that was killed continues: each tar of the partial folder has a marker, written after the tar is safely on disk.
The tars are the same byte by byte whatever the number of processes and interruptions.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from recipes.errors import UserError
from recipes.progress import Meter
from shards import index
from shards.images import ImagesConfig
from shards.packing import PackingConfig, Plan, PlannedShard, make_plan
from shards.reader import read_manifest
from shards.schema import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    Manifest,
    Record,
    SplitCount,
    index_name,
)
from shards.tars import PARTS, Marker, sync_folder, write_file, write_shard

SKIPPED = "skipped.txt"  # beside the manifest, one sentence an image that was left out


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; a process whose parent was killed ends itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "only called in a child"

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shards(todo: list[PlannedShard], folder: Path, images: ImagesConfig, workers: int, meter: Meter) -> None:
    """Write the tars that are not there yet."""
    if workers <= 1 or len(todo) <= 1:
        for shard in todo:
            write_shard(shard, folder, images, meter.advance)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads (progress bar, torch) may hang
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker)
    try:
        tasks = {pool.submit(write_shard, shard, folder, images): len(shard.records) for shard in todo}
        for task in as_completed(tasks):
            task.result()
            meter.advance(tasks[task])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare(partial: Path, digest: str) -> None:
    """An empty partial folder, or the one that an interrupted run of the same plan left."""
    stamp = partial / PARTS / "plan"
    if partial.exists():
        ours = partial.is_dir() and (stamp.exists() or not [p for p in partial.iterdir() if p.name != PARTS])
        if not ours:
            raise UserError(
                f"{partial} is in the way and not from an interrupted run; delete it or choose another --out"
            )
        if stamp.exists() and stamp.read_text() == digest:
            return
        shutil.rmtree(partial)
    (partial / PARTS).mkdir(parents=True)
    write_file(stamp, digest)


def _markers(partial: Path, plan: Plan) -> dict[str, Marker]:
    """The markers of the tars that are complete."""
    found = {}
    for shard in plan.shards:
        path, tar = partial / PARTS / f"{shard.name}.json", partial / shard.name
        if path.exists():
            marker = Marker.model_validate_json(path.read_bytes())
            if tar.exists() and tar.stat().st_size == marker.entry.size:
                found[shard.name] = marker
    return found


def _existing(out: Path, digest: str) -> Manifest | None:
    """The manifest if `out` is this very set already, None if there is nothing; everything else is refused."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    way_out = "choose another --out or delete it"
    if not (out / MANIFEST).exists():
        raise UserError(f"{out} exists already and is not a shard set; {way_out}")
    manifest = read_manifest(out)
    if manifest.packing.get("plan") != digest:
        raise UserError(f"{out} holds a set packed from other sources or with other settings; {way_out}")
    for entry in manifest.shards:
        path = out / entry.name
        if not path.exists() or path.stat().st_size != entry.size:
            raise UserError(f"{out} is incomplete: {entry.name} is missing or not of its {entry.size} bytes; {way_out}")
    return manifest


def _finish(partial: Path, plan: Plan, settings: dict[str, Any], shown: list[dict]) -> Manifest:
    """Join the indexes, then write the manifest."""
    markers = _markers(partial, plan)
    assert len(markers) == len(plan.shards), "every tar is there"
    splits, entries = {}, []
    for split in SPLITS:
        ours = [marker.entry for marker in markers.values() if marker.entry.split == split and marker.entry.samples]
        if not ours:
            continue
        parts = []
        for number, entry in enumerate(ours):
            rows = np.array(index.load(partial / PARTS / f"{entry.name}.npy"))
            rows["shard"] = number
            parts.append(rows)
        rows = index.join(parts)
        index.save(rows, partial / index_name(split))
        pids, camids = np.unique(rows["pid"]), np.unique(rows["camid"])
        splits[split] = SplitCount(images=len(rows), identities=int((pids > 0).sum()), cameras=int((camids >= 0).sum()))
        entries += ours
    skipped = [sentence for marker in markers.values() for sentence in marker.skipped]
    if not entries:
        raise UserError(f"none of the {len(skipped)} images can be decoded; the first: {skipped[0]}")
    for marker in markers.values():
        if not marker.entry.samples:  # all its images were left out
            (partial / marker.entry.name).unlink()
    if skipped:
        write_file(partial / SKIPPED, "".join(f"{sentence}\n" for sentence in skipped))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        sources=shown,
        packing=settings | {"plan": plan.digest},
        splits=splits,
        shards=entries,
        skipped=len(skipped),
    )
    write_file(partial / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def pack(
    records: Iterable[Record],
    out: Path | str,
    packing: PackingConfig,
    images: ImagesConfig,
    configs: list[dict[str, Any]],
) -> Manifest:
    """Pack records into the shard set `out` and give its manifest; the set may be there already or be half done.

    configs: the source configs that the records came from, noted in the manifest. UserError for bad input, after which
    nothing is left behind; after an interruption the same call continues.
    """
    out = Path(os.path.abspath(out))
    plan = make_plan(records, packing, images, configs)
    if (manifest := _existing(out, plan.digest)) is not None:
        print(f"{out} already holds this set; nothing to do")
        shutil.rmtree(out / PARTS, ignore_errors=True)  # left when killed right after the rename
        return manifest
    partial = out.with_name(f"{out.name}.partial")
    settings = packing.model_dump(mode="json", exclude={"workers"}) | {"images": images.model_dump(mode="json")}
    try:
        _prepare(partial, plan.digest)
        done = _markers(partial, plan)
        if done:
            print(f"continuing an interrupted run: {len(done)} of {len(plan.shards)} tars are in {partial}")
        todo = [shard for shard in plan.shards if shard.name not in done]
        total = sum(len(shard.records) for shard in plan.shards)
        start = total - sum(len(shard.records) for shard in todo)
        try:
            with Meter(total, "packing", start=start) as meter:
                _write_shards(todo, partial, images, packing.workers, meter)
            manifest = _finish(partial, plan, settings, json.loads(json.dumps(configs, default=str)))
        except UserError:
            shutil.rmtree(partial)
            raise
        partial.replace(out)
        sync_folder(out.parent)
        shutil.rmtree(out / PARTS)
    except BrokenProcessPool as error:
        raise UserError(
            "a packing process died (out of memory?); the same command with fewer packing.workers continues"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}; what is done is kept, the same command continues") from error
    return manifest
