"""A data set used from its folder, unpacked: the samples, the shards and the order are those of the packed set.

Only the tars are missing: a sample is read by its source where it lies. Listing takes some microseconds an image at
each start, and nothing but a decoder notices damaged bytes.
"""

import functools
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from recipes.errors import UserError
from shards.assembly import configure, described, gather
from shards.catalogue import read_records
from shards.images import ImagesConfig
from shards.packing import PackingConfig, Plan, make_plan
from shards.schema import UNKNOWN, BadSample, Sample

SPELLED = re.compile(r"([a-z]\w*):(?!//)(.*)", re.DOTALL)  # SOURCE:PATH


def is_source(path: str) -> bool:
    """Whether a path of a recipe is spelled SOURCE:PATH."""
    return SPELLED.fullmatch(path) is not None and not Path(path).exists()


@functools.lru_cache(maxsize=8)
def _plan(spelled: str) -> tuple[Plan, list[dict], tempfile.TemporaryDirectory]:
    """The plan of packing the source with default settings, and the folder of its spool, removed with the process."""
    match = SPELLED.fullmatch(spelled)
    assert match is not None, spelled
    configured = configure([{"name": match[1]} | ({"path": match[2]} if match[2] else {})], {})
    scratch = tempfile.TemporaryDirectory(prefix="unpacked-", ignore_cleanup_errors=True)
    sources = described(configured)
    spool = Path(scratch.name, "records")
    return make_plan(gather(configured), PackingConfig(), ImagesConfig(), sources, spool), sources, scratch


class UnpackedSplit:
    """The samples of one split of a source, as `PackedSplit` gives those of a packed set."""

    def __init__(self, spelled: str, split: str):
        plan, self.sources, self.scratch = _plan(spelled)
        self.digest = plan.digest
        order = plan.catalogue.shuffled(split)
        self.spool = plan.catalogue.spool
        self.offsets = plan.catalogue.offsets[order]
        self.labels = {"pid": plan.catalogue.pids[order], "camid": plan.catalogue.camids[order]}
        self.shard_sizes = np.array([len(s.records) for s in plan.shards if s.split == split], dtype=np.int64)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "scratch": None}  # the process that listed the folder cleans up

    def __len__(self) -> int:
        return len(self.offsets)

    def column(self, name: str) -> np.ndarray:
        """`pid`, `camid` or `key` of all rows."""
        if name != "key":
            return self.labels[name]
        return np.array([r.key.encode("utf-8", "surrogateescape") for r in read_records(self.spool, self.offsets)])

    def __getitem__(self, row: int) -> Sample:
        (record,) = read_records(self.spool, self.offsets[row : row + 1])
        try:
            image = record.read()
        except OSError as error:
            raise BadSample(f"{record.origin or record.key} cannot be read ({error.strerror or error})") from error
        pid, camid = (UNKNOWN if value is None else value for value in (record.pid, record.camid))
        return Sample(record.key, image, pid, camid, record.captions)

    def share_files(self, fraction: float) -> None:
        """Nothing stays open, so nothing is shared."""

    def ahead(self, shards: Iterable[int]) -> None:
        """Nothing is fetched: the source is read where it lies."""

    def close(self) -> None:
        """Nothing stays open between two samples."""


def splits_of(spelled: str) -> tuple[list[str], str, list[dict]]:
    """Splits that the source holds, the digest of its plan, and what is told about it."""
    plan, sources, _ = _plan(spelled)
    if not plan.shards:
        raise UserError(f"{spelled} holds no images")
    return list(plan.catalogue.counts()), plan.digest, sources
