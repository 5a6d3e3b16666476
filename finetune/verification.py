"""Same person or not, from the cosine: ROC, equal error rate, open-set identification, a calibrated threshold.

A ranking needs no threshold, a deployment does. Pairs of a query and a gallery image are those of the ranking
(metrics.Protocol), of which both identities are known: pid > 0 for the query, pid >= 0 for the entry (a distractor is
nobody's match). A pair is accepted when its cosine is at least the threshold. FAR, the false accept rate, is the share
of pairs of different people that are accepted; TAR, the true accept rate, that of pairs of one person; EER is the error
where FAR = 1 - TAR.

The counts are those of pair_counts.py, the open set that of open_set.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from finetune.metrics import CHUNK_BYTES, DISTRACTOR, GalleryLabels, Protocol, check_tables, own_rows, score_parts
from finetune.open_set import ENOUGH, OpenSet, Point, take_out
from finetune.pair_counts import CELLS, LAST, LEFT_OUT, Pairs, cells
from recipes.errors import UserError
from recipes.load import Section
from recipes.progress import Meter
from shards.embeddings import EmbeddingTable

FARS = (1e-1, 1e-2, 1e-3, 1e-4)  # at which TAR is reported
OPEN_FARS = (1e-1, 1e-2)  # at which DIR is reported; queries are fewer than pairs


def _rates(points: dict[float, Point | None], name: str) -> dict[str, Any]:
    return {
        f"{far:g}": point and {name: point.rate, "far": point.far, "threshold": point.threshold}
        for far, point in points.items()
    }


@dataclass(frozen=True, eq=False)
class Verification:
    """What `verify` found."""

    pairs: Pairs
    open_set: OpenSet

    def numbers(self) -> dict[str, Any]:
        """For a report; a rate is null where there were too few pairs or queries for it."""
        pairs, found = self.pairs, self.open_set
        error, threshold = pairs.equal_error()
        return {
            "same_pairs": int(pairs.same.sum()),
            "different_pairs": int(pairs.different.sum()),
            "eer": error,
            "eer_threshold": threshold,
            "tar": _rates({far: pairs.at(far) for far in FARS}, "tar"),
            "open_set": {
                "share": found.share,
                "seed": found.seed,
                "known_queries": len(found.best),
                "unknown_queries": len(found.alone),
                "dir": _rates({far: found.at(far) for far in OPEN_FARS}, "dir"),
            },
            "roc": pairs.curve(),
        }


def _cosines_only(query: EmbeddingTable, gallery: EmbeddingTable) -> None:
    for name, table in (("query", query), ("gallery", gallery)):
        lengths = np.sqrt(np.einsum("nd,nd->n", table.features, table.features, dtype=np.float32))
        wrong = (np.abs(lengths - 1) > 2e-3) & (lengths > 0)  # float16 features are off by up to 1e-3
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(
                f"the {name} feature of {table.keys[row]!r} has length {lengths[row]:.4g}; a threshold is one of the "
                "cosine: L2-normalise the features"
            )


def verify(
    query: EmbeddingTable,
    gallery: EmbeddingTable,
    protocol: Protocol | None = None,
    share: float = 0.5,
    seed: int = 0,
    chunk: int | None = None,
    meter: Meter | None = None,
) -> Verification:
    """Count all pairs, and search the gallery without some of its people. Features must have length 1.

    share: 0..1, of the queries' identities that are taken out of the gallery for the open set. seed: which. chunk,
    meter: see metrics.evaluate. Raises UserError where there are no pairs of one person or none of different people.
    """
    protocol = protocol or Protocol()
    check_tables(query, gallery, protocol)
    _cosines_only(query, gallery)
    labels = GalleryLabels(gallery.pids, gallery.camids, protocol)
    own = own_rows(query, gallery) if labels.keep else np.full(len(query), -1)
    unknown = np.flatnonzero(gallery.pids < DISTRACTOR)  # junk and unlabelled
    removed = take_out(query.pids, share, seed)
    staying = np.flatnonzero(~np.isin(gallery.pids, removed))
    same, different = (np.zeros(LAST + 1, np.int64) for _ in range(2))
    answers: dict[str, list] = {"best": [], "right": [], "alone": []}
    # a quarter of the default: for a moment the cells of a part need three times the memory of its scores
    chunk = chunk or max(1, CHUNK_BYTES // 4 // (4 * len(gallery)))
    for part, cosines in score_parts(query, gallery, chunk):
        np.clip(cosines, -1, 1, out=cosines)  # rounding leaves the range by 1e-7
        right_pairs = []
        for row, asked in zip(cosines, range(part.start, part.stop), strict=True):
            pid = query.pids[asked]
            if pid <= 0:
                row[:] = LEFT_OUT
                continue
            matches, hidden = labels.split(pid, query.camids[asked], own[asked])
            row[unknown] = row[hidden] = LEFT_OUT
            right_pairs.append(row[matches])
            seen = row[staying]
            if len(seen) and seen.max() >= -1:
                first = int(np.argmax(seen))  # of equals the lowest row, as in the ranking
                if len(matches) and pid not in removed:
                    answers["best"].append(seen[first])
                    answers["right"].append(gallery.pids[staying[first]] == pid)
                else:
                    answers["alone"].append(seen[first])
            row[matches] = LEFT_OUT
        if right_pairs:
            same += np.bincount(cells(np.concatenate(right_pairs)), minlength=LAST + 1)
        different += np.bincount(cells(cosines).ravel(), minlength=LAST + 1)
        if meter:
            meter.advance(part.stop - part.start)
    different[0] = 0
    for counts, what in ((same, "one person"), (different, "different people")):
        if not counts.any():
            raise UserError(f"query and gallery hold no pair of {what} under this protocol ({protocol.rules()})")
    types = {"best": np.float32, "right": bool, "alone": np.float32}
    found = {name: np.array(values, types[name]) for name, values in answers.items()}
    return Verification(Pairs(same, different), OpenSet(share, seed, **found))


class Calibration(Section):
    """When two images show the same person: what a model's cosine means, as measured on one set."""

    threshold: float  # cosine from which on two images are called the same person
    far: float = Field(ge=0, le=1)  # the false accept rate of this threshold, of pairs of different people
    tar: float = Field(ge=0, le=1)  # the true accept rate of this threshold, of pairs of one person
    asked_far: float = Field(gt=0, lt=1)  # the rate that was asked for; `far` is at most this
    # P(same person | cosine) = sigmoid(slope cosine + intercept) where a pair is of one person with probability prior
    slope: float = Field(gt=0)
    intercept: float
    prior: float = Field(0.5, gt=0, lt=1)
    same_pairs: int = Field(ge=1)  # what it was measured on
    different_pairs: int = Field(ge=1)
    title: str  # the set that it was measured on
    protocol: Protocol

    def same(self, cosine: float | np.ndarray) -> bool | np.ndarray:
        """Whether the threshold is reached."""
        return cosine >= self.threshold

    def probability(self, cosine: float | np.ndarray, prior: float | None = None) -> float | np.ndarray:
        """P(same person), 0..1. prior: share of pairs of one person where the model is used; else that of the fit."""
        shift = 0.0 if prior is None else _logit(prior) - _logit(self.prior)
        return _sigmoid(self.slope * np.asarray(cosine, np.float64) + self.intercept + shift)[()]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(x / 2)) / 2  # without overflow


def _logit(p: float) -> float:
    return float(np.log(p) - np.log1p(-p))


def fit_logistic(pairs: Pairs, prior: float) -> tuple[float, float]:
    """Slope and intercept of P(same | cosine) = sigmoid(slope cosine + intercept) by maximum likelihood.

    Pairs of one person weigh `prior` together, the others 1 - prior. Platt, "Probabilistic outputs for support vector
    machines", 1999: targets are (n + 1) / (n + 2) of n pairs of one person and 1 / (n + 2) of n others, so the fit is
    finite even where the two are apart. Newton's method with a line search; all pairs of a cell are at its middle.
    """
    used = np.flatnonzero(pairs.same + pairs.different)
    middle = (used - 0.5) / CELLS - 1
    same, different = pairs.same[used] * 1.0, pairs.different[used] * 1.0
    n, m = same.sum(), different.sum()
    right, wrong = prior * same / n, (1 - prior) * different / m
    weight, target = right + wrong, right * (n + 1) / (n + 2) + wrong / (m + 2)  # target: weight times its mean
    centre = weight @ middle
    spread = max(float(np.sqrt(weight @ (middle - centre) ** 2)), 1 / CELLS)
    design = np.stack([(middle - centre) / spread, np.ones_like(middle)])

    def loss(found: np.ndarray) -> float:
        logit = found @ design
        return float(weight @ np.logaddexp(0, logit) - target @ logit)

    found = np.array([0.0, _logit(prior)])
    for _ in range(100):
        p = _sigmoid(found @ design)
        gradient = design @ (weight * p - target)
        if np.abs(gradient).max() < 1e-12:
            break
        hessian = (design * (weight * p * (1 - p))) @ design.T + 1e-14 * np.eye(2)
        step, length = np.linalg.solve(hessian, gradient), 1.0
        while length > 1e-10 and loss(found - length * step) > loss(found) - 1e-4 * length * (gradient @ step):
            length /= 2
        found = found - length * step
    return float(found[0] / spread), float(found[1] - found[0] * centre / spread)


def calibration_of(
    pairs: Pairs, title: str, protocol: Protocol | None = None, far: float = 1e-3, prior: float = 0.5
) -> Calibration:
    """See `calibrate`; for pairs that `verify` has counted already."""
    point = pairs.at(far)
    same, different = int(pairs.same.sum()), int(pairs.different.sum())
    if point is None:
        raise UserError(
            f"{title} has {different} pairs of different people, too few for a threshold at a false accept rate of "
            f"{far:g}; use a set with {int(np.ceil(ENOUGH / far))}, or ask for a rate of at least "
            f"{ENOUGH / different:.2g}"
        )
    slope, intercept = fit_logistic(pairs, prior)
    if slope <= 0:
        raise UserError(
            f"on {title} images of one person are no nearer to each other than images of different people; there is "
            "nothing to calibrate: train the model, or check the labels"
        )
    measured = {"threshold": point.threshold, "far": point.far, "tar": point.rate, "asked_far": far}
    fitted = {"slope": slope, "intercept": intercept, "prior": prior}
    where = {"same_pairs": same, "different_pairs": different, "title": title, "protocol": protocol or Protocol()}
    return Calibration(**measured, **fitted, **where)


def calibrate(
    query: EmbeddingTable,
    gallery: EmbeddingTable,
    protocol: Protocol | None = None,
    far: float = 1e-3,
    title: str = "",
    prior: float = 0.5,
    meter: Meter | None = None,
) -> Calibration:
    """Threshold at a false accept rate and probabilities from all pairs of query and gallery.

    far: the rate that the threshold may have at most. title: of the set. prior: of a pair to be of one person, for the
    probabilities. Raises UserError where the set has too few pairs, see also `verify`.
    """
    return calibration_of(verify(query, gallery, protocol, 0.0, meter=meter).pairs, title, protocol, far, prior)
