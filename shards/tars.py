"""One tar of a set: written beside, indexed by scanning what was written, renamed, and then marked as complete."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from recipes.load import Section
from shards import index
from shards.catalogue import read_records
from shards.images import BadImage, ImagesConfig, check
from shards.packing import PlannedShard
from shards.schema import BadSample, Record, ShardEntry

PARTS = ".parts"  # folder inside the partial set: markers, the tars' indexes, tars that are being written


class Marker(Section):
    """Says that a tar is complete; what the manifest will need to know about it."""

    entry: ShardEntry
    skipped: list[str]  # the sentence about each image that was left out


def write_file(path: Path, text: str) -> None:
    """Write a small file so that it is there completely or not at all, also after a power cut."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _meta(record: Record) -> bytes:
    """The label fields that are known, as json."""
    fields = {"pid": record.pid, "camid": record.camid, "captions": list(record.captions) or None}
    return json.dumps({name: value for name, value in fields.items() if value is not None}, sort_keys=True).encode()


def _image(record: Record, images: ImagesConfig) -> tuple[bytes, str]:
    origin = record.origin or record.key
    try:
        data = record.read()
    except OSError as error:
        fault = error.strerror or error
        raise BadImage(f"{origin} cannot be read ({fault}); or leave such files out with images.on_bad=skip") from error
    return check(data, origin, images)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """One member as `webdataset.TarWriter` writes it, to the byte; that one needs torch in each process (400 MB, 2 s).

    Time 0, owner 0 and a fixed mode, so that equal samples give equal bytes.
    """
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _write_tar(
    path: Path, records: Iterable[Record], images: ImagesConfig, advance: Callable[[], None] | None
) -> list[str]:
    """Write the samples and give the sentences about those left out."""
    skipped = []
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for record in records:
                try:
                    data, extension = _image(record, images)
                except BadSample as error:
                    if images.on_bad == "error":
                        raise
                    skipped.append(str(error))
                else:
                    _add(tar, f"{record.key}.{extension}", data)
                    _add(tar, f"{record.key}.json", _meta(record))
                if advance:
                    advance()
        file.flush()
        os.fsync(file.fileno())
    return skipped


def write_shard(
    shard: PlannedShard, spool: Path, folder: Path, images: ImagesConfig, advance: Callable[[], None] | None = None
) -> Marker:
    """Write one tar of the plan into the partial folder, with its index and its marker. Module-level for the pool.

    spool: of the catalogue that the plan was made of.
    """
    parts = folder / PARTS
    # a process that outlived its killed parent may be at the same tar: each has its own file until the rename
    beside = parts / f"{shard.name}.{os.getpid()}"
    skipped = _write_tar(beside, read_records(spool, shard.records), images, advance)
    scan = index.inspect_tar(beside, whole=True)
    assert not scan.faults, scan.faults
    assert len(scan.rows) == len(shard.records) - len(skipped), "the tar holds what was written into it"
    index.save(scan.rows, parts / f"{shard.name}.npy")
    beside.replace(folder / shard.name)
    sync_folder(folder)
    entry = ShardEntry(name=shard.name, split=shard.split, samples=len(scan.rows), size=scan.size, crc32=scan.crc32)
    marker = Marker(entry=entry, skipped=skipped)
    write_file(parts / f"{shard.name}.json", marker.model_dump_json())
    return marker
