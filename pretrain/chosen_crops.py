"""The images that pictures are drawn of: of a folder, or of packed sets; which ones is a function of a seed."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipes.errors import UserError
from shards.decoding import pixels
from shards.raw.walking import IMAGE_ENDINGS, read_file, walk_files
from shards.reader import ShardReader
from shards.remote import is_remote
from shards.schema import MANIFEST, SPLITS, UNKNOWN, BadSample
from shards.seeds import generator
from shards.unpacked import is_source

SPARE = 64  # images drawn beside those that are wanted, in the place of damaged ones


@dataclass(frozen=True, eq=False)
class Crops:
    """Images by row, with labels where there are any."""

    told: str  # where they come from, for people
    read: Callable[[int], np.ndarray]  # row -> uint8 [H, W, 3], RGB; BadSample where it is damaged or gone
    pids: np.ndarray  # int64 [N], UNKNOWN where nobody knows
    camids: np.ndarray  # int64 [N]
    shard_sizes: np.ndarray | None = None  # int64 [S], where a whole shard has to be fetched for an image of it

    def __len__(self) -> int:
        return len(self.pids)


def of_reader(reader: ShardReader, told: str, labels: bool = True) -> Crops:
    """Those of packed sets. labels: False where they are of no use, and not to be read."""

    def read(row: int) -> np.ndarray:
        sample = reader[row]
        return pixels(sample.image, f"sample {sample.key!r}")

    unknown = np.full(len(reader), UNKNOWN, np.int64)
    pids, camids = (reader.pids, reader.camids) if labels else (unknown, unknown)
    return Crops(told, read, pids, camids, reader.shard_sizes if reader.remote else None)


def open_crops(paths: Sequence[str], splits: Sequence[str] | None = None) -> Crops:
    """What the paths name: packed sets (folders or URLs) or SOURCE:PATH, or else one folder of images, searched with
    all folders below it, or one image. splits: of sets; None: all. UserError where there is nothing to be found.
    """
    sets = [path for path in paths if is_source(path) or is_remote(path) or (Path(path) / MANIFEST).is_file()]
    if len(sets) == len(paths):
        return of_reader(ShardReader(paths, list(splits or SPLITS)), ", ".join(paths))
    if len(paths) > 1:
        other = next(path for path in paths if path not in sets)
        raise UserError(f"{other} is no packed set; give one folder of images, or packed sets only")
    if splits:
        raise UserError(f"--splits is for packed sets and SOURCE:PATH; {paths[0]} is none")
    root = Path(paths[0])
    if root.is_dir():
        files = sorted(path for path, _, name in walk_files(root) if name.lower().endswith(IMAGE_ENDINGS))
    else:
        files = [str(root)] if root.is_file() else []
    if not files:
        fault = f"holds no images ({', '.join(IMAGE_ENDINGS)})" if root.exists() else "does not exist"
        raise UserError(f"{root} {fault}; give a folder of images, a packed set or SOURCE:PATH")

    def read(row: int) -> np.ndarray:
        try:
            return pixels(read_file(files[row]), files[row])
        except OSError as error:
            raise BadSample(f"{files[row]} cannot be read: {error.strerror or error}") from error

    unknown = np.full(len(files), UNKNOWN, np.int64)
    return Crops(str(root), read, unknown, unknown)


def shuffled(crops: Crops, count: int, seed: int) -> list[int]:
    """`count` rows by chance and SPARE more, or all; of sets that have to be fetched, those of few shards."""
    rng, many = generator(seed, "pictures"), min(len(crops), count + SPARE)
    if crops.shard_sizes is None:
        return rng.choice(len(crops), many, replace=False).tolist()
    starts, rows = np.cumsum(crops.shard_sizes) - crops.shard_sizes, []
    for shard in rng.permutation(len(starts)).tolist():
        rows += (starts[shard] + rng.permutation(crops.shard_sizes[shard])).tolist()
        if len(rows) >= many:
            break
    return rows[:many]


def readable(crops: Crops, rows: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Those of the rows that are sound, each with its pixels; UserError behind the last where none was."""
    fault: BadSample | None = None
    some = False
    for row in rows:
        try:
            image = crops.read(row)
        except BadSample as error:
            fault = error
            continue
        some = True
        yield row, image
    if not some:
        raise UserError(f"no image of {crops.told} can be read: {fault or 'there are none'}")


def sound(crops: Crops, rows: Iterable[int], count: int) -> dict[int, np.ndarray]:
    """The first `count` of the rows that can be read, with their pixels; UserError where none can."""
    return dict(itertools.islice(readable(crops, rows), count))


def people(crops: Crops, count: int, seed: int) -> list[tuple[int, int]]:
    """Two rows of each of up to `count` people, by chance; from different cameras where these are known.

    Junk and distractors (identity -1 and 0) are no people.
    """
    rng = generator(seed, "pictures people")
    known = np.flatnonzero(crops.pids > 0)
    _, inverse, counts = np.unique(crops.pids[known], return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    ends, found = np.cumsum(counts), []
    for person in rng.permutation(np.flatnonzero(counts > 1)).tolist():
        if len(found) == count:
            break
        rows = rng.permutation(known[order[ends[person] - counts[person] : ends[person]]])
        first, others = rows[0], rows[1:]
        elsewhere = others[(crops.camids[others] != crops.camids[first]) & (crops.camids[others] != UNKNOWN)]
        found.append((int(first), int(elsewhere[0] if len(elsewhere) else others[0])))
    return found
