"""Packed sets of up to millions of samples, made of a few small JPEGs within seconds."""

import io
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from recipes.errors import UserError
from shards import index
from shards.manifests import file_crc, save_index
from shards.schema import FORMAT_VERSION, MANIFEST, Manifest, ShardEntry, index_name, shard_name
from shards.sources import figures

TAR_SAMPLES = 2000
IMAGES, QUALITY = 64, 30  # JPEGs of 2 kB
NEEDED = 3.2e9  # bytes for a million samples


def _write_tar(path: Path) -> None:
    """One tar of TAR_SAMPLES samples."""
    config = figures.Config(role="unlabeled", identities=IMAGES, images_per_identity=1)
    images = []
    for pid in range(1, IMAGES + 1):
        buffer = io.BytesIO()
        figures.render(config, pid, pid % config.cameras, 0).save(buffer, "JPEG", quality=QUALITY)
        images.append(buffer.getvalue())
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(TAR_SAMPLES):
            data = images[number % IMAGES]
            member = tarfile.TarInfo(f"{number:012d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def make_sets(folder: Path, sizes: Sequence[int]) -> list[tuple[str]]:
    """Sets of these many samples, rising; the smaller ones are the first tars of the largest."""
    assert all(size % TAR_SAMPLES == 0 for size in sizes), f"whole tars of {TAR_SAMPLES}"
    free, needed = shutil.disk_usage(folder).free, NEEDED * sizes[-1] / 1e6
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed; give another --folder"
        )
    first = folder / "first.tar"
    _write_tar(first)
    rows, crc, size = index.scan_tar(first), file_crc(first), first.stat().st_size
    print(f"writing {sizes[-1]:,} samples, {sizes[-1] // TAR_SAMPLES * size / 1e9:.1f} GB", flush=True)
    sets = []
    for samples in reversed(sizes):
        own = folder / f"set-{samples}"
        own.mkdir()
        parts, entries = [], []
        for number in range(samples // TAR_SAMPLES):
            name = shard_name("unlabeled", number)
            if samples == sizes[-1]:
                shutil.copyfile(first, own / name)
            else:
                (own / name).symlink_to(folder / f"set-{sizes[-1]}" / name)
            part = rows.copy()
            part["shard"] = number
            parts.append(part)
            entries.append(ShardEntry(name=name, split="unlabeled", samples=TAR_SAMPLES, size=size, crc32=crc))
        count = save_index(index.join(parts), own / index_name("unlabeled"))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            sources=[],
            packing={"plan": "bench"},
            splits={"unlabeled": count},
            shards=entries,
        )
        (own / MANIFEST).write_text(manifest.model_dump_json())
        sets.append((str(own),))
    return sets[::-1]
