"""From the identities of a training split to the classes of a classifier; or all of its images, without labels."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from recipes.errors import UserError
from recipes.load import Section
from shards.schema import UNKNOWN
from shards.seeds import generator


class IdentitiesConfig(Section):
    """Which identities and images are trained on; the limits are for studies with few labels."""

    # "none": all images, whoever they show; for methods that find their classes themselves, which never see a label
    labels: Literal["given", "none"] = "given"
    max_identities: int | None = Field(None, ge=2)  # identities kept, drawn by seed; None keeps all
    images_per_identity: int | None = Field(None, ge=1)  # images of an identity kept at most, drawn by seed
    seed: int = Field(0, ge=0)  # of both draws
    # an identity with one image cannot form a pair: refuse, use its image several times, or leave it out
    singletons: Literal["error", "repeat", "drop"] = "error"


@dataclass(frozen=True, eq=False)
class Identities:
    """The images to train on."""

    rows: np.ndarray  # int64 [N], ascending row numbers in the split
    labels: np.ndarray  # int64 [N], class of each row, 0..C-1; without labels all UNKNOWN
    pids: np.ndarray  # int64 [C], ascending; pids[label] is the identity of a class; without labels empty
    ignored: int  # images without an identity (pid <= 0: junk, distractor, unknown)
    dropped: int  # identities left out because they have one image
    cameras: np.ndarray | None = None  # int64 [N] of each row, UNKNOWN where nobody knows; None: nobody asked
    told: np.ndarray | None = None  # int64 [N], pid of each row, for statistics that people read; no training may look

    @property
    def classes(self) -> int:
        return len(self.pids)

    @property
    def sentence(self) -> str:
        """For the terminal."""
        whose = f"of {self.classes} identities" if self.classes else "without labels"
        return f"{len(self.rows)} images {whose}"


def _usable(pids: np.ndarray, counts: np.ndarray, config: IdentitiesConfig) -> np.ndarray:
    """Which identities may be trained on, bool [C]. counts: images of each that the limit leaves."""
    single = counts == 1
    if config.singletons == "repeat" or not single.any():
        return np.ones(len(pids), bool)
    if config.singletons == "error" or single.all():
        rest = single.sum() - 1
        also = f", and so have {rest} other identities" if rest else ""
        limit = " (identities.images_per_identity=1)" if config.images_per_identity == 1 else ""
        drop = "" if single.all() else " or identities.singletons=drop to leave it out"
        raise UserError(
            f"identity {pids[single][0]} has only one training image{limit}{also}; no pair can be formed from it: set "
            f"identities.singletons=repeat to use it several times{drop}"
        )
    return ~single


def _draw_images(rows: np.ndarray, pid: int, config: IdentitiesConfig) -> np.ndarray:
    """At most images_per_identity of the rows of one identity; a smaller limit gives a subset of a larger one's."""
    if config.images_per_identity is None or len(rows) <= config.images_per_identity:
        return rows
    return generator(config.seed, "identities.images", pid).permutation(rows)[: config.images_per_identity]


def _unlabelled(config: IdentitiesConfig, pids: np.ndarray, camids: np.ndarray | None) -> Identities:
    """All rows. The pids are passed on for reading only."""
    if config.max_identities is not None or config.images_per_identity is not None:
        raise UserError(
            "identities.labels = none trains on all images, so identities.max_identities and images_per_identity have "
            "nothing to choose by; leave them away"
        )
    rows, nobody = np.arange(len(pids)), np.full(len(pids), UNKNOWN, np.int64)
    return Identities(rows, nobody, np.empty(0, np.int64), 0, 0, camids, pids)


def select_identities(config: IdentitiesConfig, pids: np.ndarray, camids: np.ndarray | None = None) -> Identities:
    """Choose the images to train on and number their identities 0..C-1 in ascending order of pid.

    pids, camids: int64 [N] of a training split. A smaller max_identities gives a subset of a larger one's identities.
    """
    if config.labels == "none":
        return _unlabelled(config, pids, camids)
    named = pids > 0
    unique, counts = np.unique(pids[named], return_counts=True)
    ignored = int((~named).sum())
    if not len(unique):
        raise UserError(
            f"none of the {len(pids)} training images has an identity label (pid > 0); "
            "fine-tuning needs a labelled training split"
        )
    if len(unique) < 2:
        raise UserError(
            f"the training split has one identity only ({unique[0]}); telling people apart needs two or more"
        )
    limit = config.images_per_identity or counts.max()
    chosen = unique[_usable(unique, np.minimum(counts, limit), config)]
    dropped = len(unique) - len(chosen)
    if config.max_identities is not None:
        if config.max_identities > len(chosen):
            raise UserError(
                f"identities.max_identities = {config.max_identities}, but the training split has {len(chosen)} "
                f"usable identities; set it to at most {len(chosen)}"
            )
        order = generator(config.seed, "identities").permutation(len(chosen))
        chosen = np.sort(chosen[order[: config.max_identities]])

    by_pid = np.argsort(pids, kind="stable")
    first, end = (np.searchsorted(pids[by_pid], chosen, side) for side in ("left", "right"))
    groups = [_draw_images(by_pid[a:b], pid, config) for a, b, pid in zip(first, end, chosen.tolist(), strict=True)]
    rows = np.sort(np.concatenate(groups))
    labels, cameras = np.searchsorted(chosen, pids[rows]), None if camids is None else camids[rows]
    return Identities(rows, labels, chosen, ignored, dropped, cameras, pids[rows])
