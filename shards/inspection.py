"""What a data set holds: every image of a source is read, and decoded if wanted, and counted in constant memory.

Per image 9 bytes are kept, a hash of its bytes and its split, to find exact duplicates.
"""

import functools
import hashlib
import io
import itertools
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from recipes.load import Section
from recipes.progress import Meter
from shards import sources
from shards.images import DAMAGE, BadImage, ImagesConfig, check
from shards.processes import spread
from shards.schema import SPLITS, BadSample, Record

BATCH = 64  # images a task
ALONE = 16  # tasks that one process does sooner than others have started
KEPT = 1000  # sentences about damaged images that are kept; all of them go to `on_bad`
ASPECTS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)  # height / width where the bins of the histogram begin, after one from 0


class _Look(NamedTuple):
    """One image as it was found."""

    size: int  # encoded bytes
    digest: int  # 64-bit hash of them
    height: int  # pixels
    width: int
    fault: str  # sentence; "" if the image is good


def _dimensions(data: bytes, origin: str) -> tuple[int, int]:
    """Height and width as the header of the image says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "BMP"))
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise BadImage(f"{origin} is not a JPEG, PNG, WebP or BMP image") from error
    return image.height, image.width


def _look(batch: list[tuple[Callable[[], bytes], str]], decode: bool) -> list[_Look]:
    """Read some images. Module-level for the pool."""
    looks = []
    for read, origin in batch:
        data, digest = b"", 0
        try:
            data = read()
            digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") if data else 0
            if decode or not data:
                check(data, origin, ImagesConfig())
            looks.append(_Look(len(data), digest, *_dimensions(data, origin), ""))
        except OSError as error:
            looks.append(_Look(0, 0, 0, 0, f"{origin} cannot be read ({error.strerror or error})"))
        except BadSample as error:
            looks.append(_Look(len(data), digest, 0, 0, str(error).partition("; mend or remove it")[0]))
    return looks


class SplitTally:
    """Counts of one split."""

    def __init__(self) -> None:
        self.images = self.unlabelled = self.distractors = self.junk = self.captions = 0
        self.identities: set[int] = set()
        self.cameras: set[int] = set()

    def add(self, record: Record) -> None:
        self.images += 1
        self.captions += len(record.captions)
        self.unlabelled += record.pid is None
        self.distractors += record.pid == 0
        self.junk += record.pid == -1
        if record.pid is not None and record.pid > 0:
            self.identities.add(record.pid)
        if record.camid is not None:
            self.cameras.add(record.camid)


def _middle(counts: Counter[int]) -> tuple[int, int, int]:
    """Smallest, median and largest of counted values."""
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[value] for value in values])
    return int(values[0]), int(values[np.searchsorted(ends, ends[-1] / 2)]), int(values[-1])


class Tally:
    """Counts of a whole source."""

    def __init__(self) -> None:
        self.splits: dict[str, SplitTally] = {}
        self.bytes = self.undecodable = 0
        self.heights: Counter[int] = Counter()
        self.widths: Counter[int] = Counter()
        self.aspects = [0] * (len(ASPECTS) + 1)
        self.faults: list[str] = []  # the first KEPT sentences about damaged images
        self.digests, self.kinds = array("Q"), array("B")

    def add(self, record: Record, look: _Look) -> None:
        self.splits.setdefault(record.split, SplitTally()).add(record)
        self.bytes += look.size
        self.digests.append(look.digest)
        self.kinds.append(SPLITS.index(record.split))
        if look.fault:
            self.undecodable += 1
            if len(self.faults) < KEPT:
                self.faults.append(look.fault)
            return
        self.heights[look.height] += 1
        self.widths[look.width] += 1
        self.aspects[sum(look.height >= bound * look.width for bound in ASPECTS)] += 1

    @property
    def images(self) -> int:
        return sum(split.images for split in self.splits.values())

    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """Smallest, median and largest height and width, pixels; empty if no image could be read."""
        return {"height": _middle(self.heights), "width": _middle(self.widths)} if self.heights else {}

    def groups(self) -> list[np.ndarray]:
        """Numbers of the images that have equal bytes, a group for each content, in the order of the source."""
        digests = np.frombuffer(self.digests, np.uint64) if self.digests else np.zeros(0, np.uint64)
        order = np.argsort(digests, kind="stable")
        order = order[digests[order] != 0]  # what could not be read has none
        ranked = digests[order]
        starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]][: len(ranked)])
        ends = np.r_[starts[1:], len(ranked)][: len(starts)]
        return [order[starts[i] : ends[i]] for i in np.flatnonzero(ends - starts > 1)]

    def duplicates(self) -> tuple[int, int]:
        """Images that repeat the bytes of another one, and how many contents lie in more than one split."""
        groups = self.groups()
        kinds = np.frombuffer(self.kinds, np.uint8) if self.kinds else np.zeros(0, np.uint8)
        return sum(len(group) - 1 for group in groups), sum(len(set(kinds[group].tolist())) > 1 for group in groups)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    waiting = iter(records)
    while batch := list(itertools.islice(waiting, BATCH)):
        yield batch


def inspect_source(
    name: str,
    config: Section,
    workers: int | None = None,
    decode: bool = True,
    on_bad: Callable[[str], Any] = lambda sentence: None,
    expected: int | None = None,
    silent: bool = False,
) -> Tally:
    """Count everything that a source yields.

    workers: processes, None = one a core. decode: decode every image; without, only its header is looked at. on_bad:
    called with a sentence about each damaged image. expected: images, for the time left. UserError where the source is
    not in order.
    """
    records = sources.find(name).records
    tally, under_way = Tally(), []

    def tasks() -> Iterator[list[tuple[Callable[[], bytes], str]]]:
        for batch in _batches(records(config)):
            under_way.append(batch)
            yield [(record.read, record.origin or record.key) for record in batch]

    with Meter(expected, "checking", silent=silent) as meter:
        for looks in spread(functools.partial(_look, decode=decode), tasks(), workers, ALONE):
            for record, look in zip(under_way.pop(0), looks, strict=True):
                tally.add(record, look)
                if look.fault:
                    on_bad(look.fault)
            meter.advance(len(looks))
    return tally


def name_duplicates(name: str, config: Section, tally: Tally) -> list[list[str]]:
    """The origins of the images of each group with equal bytes; goes through the source once more."""
    groups = tally.groups()
    wanted = {int(number): row for row, group in enumerate(groups) for number in group}
    named: list[list[str]] = [[] for _ in groups]
    for number, record in enumerate(sources.find(name).records(config)):
        if (row := wanted.get(number)) is not None:
            named[row].append(record.origin or record.key)
    return named


def numbers(tally: Tally) -> dict[str, Any]:
    """All counts as plain numbers, for JSON."""
    repeated, across = tally.duplicates()
    splits = {}
    for split in (name for name in SPLITS if name in tally.splits):
        counts = dict(vars(tally.splits[split]))
        splits[split] = {name: value if isinstance(value, int) else len(value) for name, value in counts.items()}
    bounds = (0.0, *ASPECTS)
    return {
        "images": tally.images,
        "splits": splits,
        **{side: list(values) for side, values in tally.sizes().items()},  # smallest, median, largest
        "aspects": dict(zip((f"{bound:g}" for bound in bounds), tally.aspects, strict=True)),  # lower bound -> images
        "bytes": tally.bytes,
        "repeated": repeated,
        "repeated_across_splits": across,
        "undecodable": tally.undecodable,
    }


def lines(tally: Tally) -> Iterator[str]:
    """All counts for people."""
    columns = ("images", "identities", "cameras", "distractors", "junk", "unlabelled", "captions")
    told = numbers(tally)
    yield f"{'split':<10}" + "".join(f"{column:>13}" for column in columns)
    for split, counts in told["splits"].items():
        yield f"{split:<10}" + "".join(f"{counts[column]:>13,}" for column in columns)
    for side, (low, middle, high) in tally.sizes().items():
        yield f"{side:<13}{low} to {high} pixels, median {middle}"
    edges = [f"{bound:g}" for bound in ASPECTS]
    names = [f"below {edges[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(edges)), f"{edges[-1]} and more"]
    good = max(1, sum(tally.aspects))
    shares = [f"{name}: {100 * count / good:.1f} %" for name, count in zip(names, tally.aspects, strict=True) if count]
    yield f"{'height/width':<13}{', '.join(shares) or 'unknown'}"
    yield f"{'bytes':<13}{tally.bytes:,}, {tally.bytes / max(1, tally.images):,.0f} an image"
    across = f"; {told['repeated_across_splits']:,} of these lie in more than one split"
    yield f"{'duplicates':<13}{told['repeated']:,} images repeat another one byte by byte{across}"
    yield f"{'damaged':<13}{tally.undecodable:,} images cannot be read or decoded"
