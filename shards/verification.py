"""Is a packed set still what was packed? Every byte is read once and compared with the index and the manifest.

A sample is lost when its image or its labels do not have the crc32 of the index any more: the reader refuses it. It is
hidden when its bytes are right but its headers are not: the reader still finds it, through the index, and other
programs, which walk through the headers, do not.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipes.errors import UserError
from recipes.progress import Meter
from shards import index, remote
from shards.manifests import file_crc, read_manifest, tar_place
from shards.members import Tar
from shards.processes import spread
from shards.schema import Manifest, ShardEntry, index_name

LABELS = ("pid", "camid")
PLACE = ("offset", "length", "crc", "meta_offset", "meta_length", "meta_crc", "key")  # of a sample in its tar

MEANINGS = {  # of the keys in a report
    "lost": "are lost",
    "hidden": "have damaged headers, so that only the index finds them",
    "surplus": "are in the tar and not in the index",
}


class TarReport(NamedTuple):
    """What is left of one tar."""

    name: str
    split: str
    samples: int  # that the index has in it
    size: int  # bytes read
    lost: tuple[str, ...]  # keys
    hidden: tuple[str, ...]
    surplus: tuple[str, ...]  # whole samples in the tar that the index does not have
    faults: tuple[str, ...]  # sentences

    @property
    def fine(self) -> bool:
        return not (self.lost or self.hidden or self.surplus or self.faults)


class SetReport(NamedTuple):
    """What is left of a set."""

    tars: list[TarReport]
    faults: list[str]  # sentences about what is not in one tar

    @property
    def lost(self) -> int:
        return sum(len(tar.lost) for tar in self.tars)

    @property
    def fine(self) -> bool:
        return not self.faults and all(tar.fine for tar in self.tars)


class _Task(NamedTuple):
    """A tar to be verified."""

    place: str  # path or URL
    entry: ShardEntry
    rows: np.ndarray | None  # of the index, None if there is no index
    quick: bool


@contextlib.contextmanager
def local_copy(place: str) -> Iterator[Path]:
    """A file of a set: where it lies, or fetched for as long as it is needed."""
    if not remote.is_remote(place):
        yield Path(place)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fetched")
        remote.fetch(place, path, None, None)
        yield path


def keys_of(rows: np.ndarray) -> tuple[str, ...]:
    """The keys of rows of an index."""
    return tuple(key.decode("utf-8", "surrogateescape") for key in rows["key"].tolist())


def _intact(tar: Tar, rows: np.ndarray) -> np.ndarray:
    """Which rows have the bytes that the index says, bool [N]."""
    found = np.zeros(len(rows), dtype=bool)
    for number in np.argsort(rows["offset"], kind="stable"):
        row = rows[number]
        found[number] = all(
            not length or (offset + length <= tar.size and tar.crc32(offset, length) == crc)
            for offset, length, crc in (
                (int(row["offset"]), int(row["length"]), int(row["crc"])),
                (int(row["meta_offset"]), int(row["meta_length"]), int(row["meta_crc"])),
            )
        )
    return found


def _compare(path: Path, rows: np.ndarray, scan: index.Scan) -> tuple[list[tuple[str, ...]], list[str]]:
    """Keys of the rows that are lost, hidden and surplus, and sentences about others."""
    if len(rows) == len(scan.rows) and all(np.array_equal(rows[name], scan.rows[name]) for name in (*PLACE, *LABELS)):
        return [(), (), ()], []
    seen = {tuple(cells): tuple(labels) for cells, labels in zip(*_columns(scan.rows), strict=True)}
    there, labels = _columns(rows)
    with Tar(path) as tar:
        intact = _intact(tar, rows)
    hidden = intact & np.array([cells not in seen for cells in there], dtype=bool)
    other = sum(seen.get(cells, found) != found for cells, found in zip(there, labels, strict=True))
    surplus = ~np.isin(scan.rows["key"], rows["key"])
    faults = [f"{path}: {other} samples have other labels than in the index"] if other else []
    return [keys_of(rows[~intact]), keys_of(rows[hidden]), keys_of(scan.rows[surplus])], faults


def _columns(rows: np.ndarray) -> tuple[list[tuple], list[tuple]]:
    """Place and labels of each row, as plain tuples."""
    place, labels = (list(zip(*(rows[name].tolist() for name in names), strict=True)) for names in (PLACE, LABELS))
    return place, labels


def _verify(task: _Task) -> TarReport:
    """Read one tar and say what is left of it. Module-level for the pool."""
    place, entry, rows, quick = task
    nothing: tuple[str, ...] = ()
    report = TarReport(entry.name, entry.split, entry.samples, 0, nothing, nothing, nothing, nothing)
    faults = []
    if rows is not None and len(rows) != entry.samples:
        faults.append(f"{place}: the index has {len(rows)} samples of it, the manifest {entry.samples}")
    if quick:
        if not remote.is_remote(place) and not os.path.isfile(place):
            faults.append(f"tar {place} does not exist")
        elif not remote.is_remote(place) and (size := os.path.getsize(place)) != entry.size:
            faults.append(f"{place} has {size} bytes, the manifest says {entry.size}")
        return report._replace(faults=tuple(faults))
    try:
        with local_copy(place) as path:
            scan = index.inspect_tar(path, whole=True)
            differ = ([nothing] * 3, []) if rows is None else _compare(path, rows, scan)
            told = [fault.sentence for fault in scan.faults] + differ[1]
            faults += [sentence.replace(str(path), place) for sentence in told]
    except UserError as error:  # not there, or no right to read it
        lost = nothing if rows is None else keys_of(rows)
        return report._replace(lost=lost, faults=(*faults, str(error)))
    if rows is None and len(scan.rows) != entry.samples:
        faults.append(f"{place} holds {len(scan.rows)} whole samples, the manifest says {entry.samples}")
    if scan.size != entry.size:
        faults.append(f"{place} has {scan.size} bytes, the manifest says {entry.size}")
    elif scan.crc32 != entry.crc32:
        faults.append(f"{place} has other bytes than were packed: its crc32 is not that of the manifest")
    lost, hidden, surplus = differ[0]
    return report._replace(size=scan.size, lost=lost, hidden=hidden, surplus=surplus, faults=tuple(faults))


def _load_index(folder: str, split: str, manifest: Manifest) -> tuple[np.ndarray | None, list[str]]:
    """The index of a split, None if it cannot be used, and what is wrong with it."""
    count, place = manifest.splits[split], f"{folder}/{index_name(split)}"
    try:
        with local_copy(place) as path:
            rows = index.load(path)
            if remote.is_remote(place):
                rows = np.array(rows)
            fits = path.stat().st_size == count.index_size and file_crc(path) == count.index_crc32
    except UserError as error:
        return None, [str(error)]
    faults = [] if fits else [f"{place} has other bytes than were packed: its crc32 is not that of the manifest"]
    if len(rows) != count.images:
        faults.append(f"{place} has {len(rows)} samples, the manifest says {count.images}")
    keys, times = np.unique(rows["key"], return_counts=True)
    if len(keys) != len(rows):
        example = keys[times > 1][0].decode("utf-8", "backslashreplace")
        faults.append(f"{place} has {len(rows) - len(keys)} keys more than once, for example {example}")
    return rows, faults


def _tasks(folder: str, entries: list[ShardEntry], rows: np.ndarray | None, quick: bool) -> Iterator[_Task]:
    """The tars of a split, each with its rows of the index."""
    if rows is None:
        yield from (_Task(tar_place(folder, entry.name), entry, None, quick) for entry in entries)
        return
    shards = np.array(rows["shard"])
    order = np.argsort(shards, kind="stable")  # they are sorted already, unless the index is damaged
    starts = np.searchsorted(shards[order], np.arange(len(entries) + 1))
    for entry, start, stop in zip(entries, starts[:-1], starts[1:], strict=True):
        yield _Task(tar_place(folder, entry.name), entry, rows[order[start:stop]], quick)


def verify_set(folder: str, workers: int | None = None, quick: bool = False, silent: bool = False) -> SetReport:
    """Verify the set in a folder or at an URL.

    workers: processes, None = one a core. quick: read the indexes, and of the tars on disk only the sizes. UserError
    if there is no manifest.
    """
    manifest = read_manifest(folder)
    faults: list[str] = []
    tasks: list[Iterator[_Task]] = []
    for split in manifest.splits:
        rows, told = _load_index(folder, split, manifest)
        entries = [entry for entry in manifest.shards if entry.split == split]
        if rows is not None and len(rows) and int(rows["shard"].max()) >= len(entries):
            told.append(f"{folder}/{index_name(split)} names tars that the manifest does not have")
        tasks.append(_tasks(folder, entries, rows, quick))
        faults += told
    if not remote.is_remote(folder):
        known = {entry.name for entry in manifest.shards}
        strange = sorted(path.name for path in Path(folder).glob("*.tar") if path.name not in known)
        faults += [f"{folder}/{name} is not in the manifest" for name in strange]
    reports = []
    with Meter(sum(entry.samples for entry in manifest.shards), "verifying", silent=silent) as meter:
        for report in spread(_verify, chain.from_iterable(tasks), 1 if quick else workers, alone=2):
            reports.append(report)
            meter.advance(report.samples)
    return SetReport(reports, faults)


def numbers(report: SetReport) -> dict[str, Any]:
    """Everything as plain values, for JSON."""
    return {
        "samples": sum(tar.samples for tar in report.tars),
        "lost": report.lost,
        "faults": report.faults,
        "tars": [tar._asdict() for tar in report.tars],
    }


def lines(report: SetReport, shown: int) -> Iterator[str]:
    """The report for people; at most `shown` keys or sentences of a kind."""
    columns = ("tars", "samples", "lost", "hidden", "surplus")
    yield f"{'split':<10}" + "".join(f"{column:>13}" for column in columns)
    for split in dict.fromkeys(tar.split for tar in report.tars):
        ours = [tar for tar in report.tars if tar.split == split]
        kinds = [sum(len(getattr(tar, kind)) for tar in ours) for kind in columns[2:]]
        counts = (len(ours), sum(tar.samples for tar in ours), *kinds)
        yield f"{split:<10}" + "".join(f"{count:>13,}" for count in counts)
    yield from report.faults[:shown]
    for tar in report.tars:
        yield from tar.faults[:shown]
        for kind, meaning in MEANINGS.items():
            if keys := getattr(tar, kind):
                more = f" and {len(keys) - shown:,} more" if len(keys) > shown else ""
                yield f"{tar.name}: {len(keys):,} samples of {tar.samples:,} {meaning}: {', '.join(keys[:shown])}{more}"


def listed(report: SetReport) -> Iterator[str]:
    """Everything that is wrong, a line each: kind, tar and key or sentence, with tabs between."""
    yield from (f"fault\t\t{sentence}" for sentence in report.faults)
    for tar in report.tars:
        yield from (f"fault\t{tar.name}\t{sentence}" for sentence in tar.faults)
        yield from (f"{kind}\t{tar.name}\t{key}" for kind in MEANINGS for key in getattr(tar, kind))
