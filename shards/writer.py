"""Records -> shard set on disk: tars, an index a split, and the manifest, which is written last.

Everything is written into `<out>.partial` and renamed to `out` when it is complete, so `out` is a whole set or nothing.
A run that was killed continues: each tar of the partial folder has a marker, written after the tar is safely on disk.
The tars are the same byte by byte whatever the number of processes and interruptions.
"""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recipes import locks
from recipes.errors import UserError, disk_sentence
from recipes.progress import Meter
from shards import index
from shards.catalogue import Catalogue, read_records
from shards.images import ImagesConfig
from shards.manifests import read_manifest, save_index
from shards.packing import PackingConfig, Plan, PlannedShard, make_plan
from shards.processes import cores, spread
from shards.schema import FORMAT_VERSION, MANIFEST, SPLITS, Manifest, Record, index_name
from shards.tars import PARTS, Marker, sync_folder, write_file, write_shard

SKIPPED = "skipped.txt"  # beside the manifest, one sentence an image that was left out
SPOOL, LOCK = "records", "lock"  # in the folder of parts
ALONE = 2_000  # images that one process packs sooner than others have started
FRAME = 1_536  # bytes around an image in a tar: two headers, the labels, padding
WEIGHED = 64  # images read to estimate the size of a set


def _write_shards(
    todo: list[PlannedShard], spool: Path, folder: Path, images: ImagesConfig, workers: int, meter: Meter
) -> None:
    """Write the tars that are not there yet."""
    write = functools.partial(write_shard, spool=spool, folder=folder, images=images)
    if workers <= 1 or len(todo) <= 1:
        for shard in todo:
            write(shard, advance=meter.advance)
        return
    for shard, _ in zip(todo, spread(write, todo, workers), strict=True):
        meter.advance(len(shard.records))


def _workers(packing: PackingConfig, todo: list[PlannedShard]) -> int:
    if packing.workers is not None:
        return packing.workers
    return cores() if sum(len(shard.records) for shard in todo) > ALONE else 1


@contextlib.contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """`<out>.partial` with its folder of parts, held by this process alone; empty, or as an interrupted run left it."""
    partial = out.with_name(f"{out.name}.partial")
    parts = partial / PARTS
    if partial.exists() and not (partial.is_dir() and (parts.is_dir() or not any(partial.iterdir()))):
        raise UserError(f"{partial} is in the way and not from an interrupted run; delete it or choose another --out")
    busy = f"another process is packing {out} at this moment"
    with locks.holding(parts / LOCK, busy, "wait for it or choose another --out"):
        yield partial


def _sweep(parts: Path) -> None:
    """Remove files that were being written: on a full disk they are the room that is missing."""
    for path in parts.glob("*.tar.*"):
        if path.suffix[1:].isdigit():  # of the process, see tars.py
            path.unlink(missing_ok=True)


def _prepare(partial: Path, digest: str) -> None:
    """Keep what an interrupted run of the same plan left, and nothing of another one."""
    _sweep(partial / PARTS)
    stamp = partial / PARTS / "plan"
    if stamp.exists() and stamp.read_text() == digest:
        return
    for path in [*partial.iterdir(), *(partial / PARTS).iterdir()]:
        if path.name not in (PARTS, SPOOL, LOCK):
            path.unlink()
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


def _check_space(out: Path, catalogue: Catalogue, todo: list[PlannedShard], images: ImagesConfig) -> None:
    """Refuse before the first byte is written if the disk cannot hold the set, by the mean size of some images."""
    count = sum(len(shard.records) for shard in todo)
    free = shutil.disk_usage(out.parent).free
    if images.max_height is not None or count * (1 << 20) < free:  # sizes change, or a megabyte an image fits
        return
    sizes = []
    for record in read_records(catalogue.spool, catalogue.offsets[:: max(1, len(catalogue) // WEIGHED)]):
        with contextlib.suppress(OSError, UserError):  # told when its turn comes
            sizes.append(len(record.read()))
    needed = count * (float(np.mean(sizes)) + FRAME) if sizes else 0.0
    if needed > free:
        raise UserError(
            f"the set needs about {needed / 1e9:.1f} GB ({count:,} images of {np.mean(sizes) / 1e3:.1f} kB), "
            f"but only {free / 1e9:.1f} GB are free in {out.parent}; choose another --out, or smaller images by "
            "images.max_height"
        )


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
        splits[split] = save_index(index.join(parts), partial / index_name(split))
        entries += ours
    skipped = [sentence for marker in markers.values() for sentence in marker.skipped]
    if not entries:
        shutil.rmtree(partial)
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


def _write(partial: Path, plan: Plan, packing: PackingConfig, images: ImagesConfig) -> None:
    """Write what is missing of the plan's tars."""
    _prepare(partial, plan.digest)
    done = _markers(partial, plan)
    if done:
        print(f"continuing an interrupted run: {len(done)} of {len(plan.shards)} tars are in {partial}")
    todo = [shard for shard in plan.shards if shard.name not in done]
    _check_space(partial, plan.catalogue, todo, images)
    total = len(plan.catalogue)
    with Meter(total, "packing", start=total - sum(len(shard.records) for shard in todo)) as meter:
        _write_shards(todo, plan.catalogue.spool, partial, images, _workers(packing, todo), meter)


def pack(
    records: Iterable[Record],
    out: Path | str,
    packing: PackingConfig,
    images: ImagesConfig,
    configs: list[dict[str, Any]],
) -> Manifest:
    """Pack records into the shard set `out` and give its manifest; the set may be there already or be half done.

    configs: the source configs that the records came from, noted in the manifest. UserError for bad input, after which
    nothing is left behind but finished tars; after that or an interruption the same call continues.
    """
    out = Path(os.path.abspath(out))
    settings = packing.model_dump(mode="json", exclude={"workers"}) | {"images": images.model_dump(mode="json")}
    try:
        with _partial_folder(out) as partial:
            try:
                plan = make_plan(records, packing, images, configs, partial / PARTS / SPOOL)
                manifest = _existing(out, plan.digest)
                if manifest is not None:
                    print(f"{out} already holds this set; nothing to do")
                    shutil.rmtree(partial, ignore_errors=True)  # somebody may wait for the lock in it
                    shutil.rmtree(out / PARTS, ignore_errors=True)  # left when killed right after the rename
                    return manifest
                _write(partial, plan, packing, images)
                manifest = _finish(partial, plan, settings, json.loads(json.dumps(configs, default=str)))
            except UserError as error:
                if kept := len(list((partial / PARTS).glob("*.tar.json"))):
                    raise type(error)(f"{error} ({kept} finished tars are kept, the same command continues)") from error
                shutil.rmtree(partial, ignore_errors=True)
                raise
            except OSError:
                _sweep(partial / PARTS)
                raise
            partial.replace(out)
            sync_folder(out.parent)
            shutil.rmtree(out / PARTS, ignore_errors=True)  # as above, somebody who waited may be at it
    except OSError as error:
        told = disk_sentence(error) or error
        raise UserError(f"cannot write {out}: {told}; what is done is kept, the same command continues") from error
    return manifest
