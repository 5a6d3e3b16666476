"""The numbers of searches as tables: with intervals, with what belongs to them, and two models query by query."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from finetune.page_charts import Entry
from finetune.page_results import Numbers, Result
from finetune.page_run import Run, Searched
from finetune.reporting import COLUMNS, SECOND, percent
from pretrain.verdict import Interval, interval

LEVEL, RESAMPLES, SEED = 0.95, 1000, 0  # of the intervals of differences
MOST_QUERIES = 100_000  # of a set whose queries are compared one by one


class Cell(NamedTuple):
    """A number in per cent, and its interval."""

    value: str
    interval: str
    bar: tuple[float, float, float] | None  # low, value and high as shares of the largest in the column, times 100


class Line(NamedTuple):
    """A search of a set by one run."""

    letter: str
    style: int
    run: str
    data: str
    search: str
    cells: list[Cell]
    best: bool = False


class Difference(NamedTuple):
    """How far a run is below the best one, over the same queries."""

    letter: str
    style: int
    run: str
    text: str
    judged: str
    sure: bool


class Versus(NamedTuple):
    """The runs that searched the same set by the same rules."""

    data: str
    queries: int
    best: str
    others: list[Difference]


def states(result: Result) -> list[tuple[str, Numbers]]:
    """The numbers as searched and, where that was done, after re-ranking."""
    found: list[tuple[str, Numbers]] = [("plain", result)]
    if result.reranked is not None:
        chosen, keys = result.reranked.rerank, ("k1", "k2", "lam")
        told = ", ".join(f"{key} {chosen[key]}" for key in keys if isinstance(chosen.get(key), int | float))
        found.append((f"re-ranked ({told})" if told else "re-ranked", result.reranked))
    for second in result.rescored:
        label = SECOND.get(second.distance, second.distance[:40])
        found.append((f"first {second.candidates:,} by {label}", second))
    return found


def _low_high(numbers: Numbers, key: str) -> tuple[float, float] | None:
    return getattr(numbers.intervals, key, None)


def _cell(numbers: Numbers, key: str, largest: float) -> Cell:
    value, ends = getattr(numbers, key), _low_high(numbers, key)
    told = f"{percent(ends[0])} to {percent(ends[1])}" if ends else ""
    bar = None
    if value is not None and largest > 0:
        low, high = ends or (value, value)
        bar = tuple(round(100 * each / largest, 1) for each in (low, value, high))
    return Cell(percent(value), told, bar)


def results(entries: Sequence[Entry]) -> list[Line]:
    """A line for each run, set and kind of search; lines of one set follow on each other."""
    found = [(run, style, letter, searched.result, label, numbers)
             for run, style, letter in entries for searched in run.searched
             for label, numbers in states(searched.result)]  # fmt: skip
    order = list(dict.fromkeys((each[3].name, each[3].version) for each in found))
    found.sort(key=lambda each: (order.index((each[3].name, each[3].version)), each[4] != "plain"))
    largest, best = {}, {}
    for key in COLUMNS:
        every = [max([getattr(each[5], key) or 0, *(_low_high(each[5], key) or ())]) for each in found]
        largest[key] = max(every, default=0.0)
    for *_, result, label, numbers in found:
        place = (result.name, result.version, label)
        best[place] = max(best.get(place, 0.0), numbers.mAP or 0.0)
    several = len(entries) > 1
    return [
        Line(letter, style, run.name, result.name, label, [_cell(numbers, key, largest[key]) for key in COLUMNS],
             several and numbers.mAP is not None and numbers.mAP == best[(result.name, result.version, label)])
        for run, style, letter, result, label, numbers in found
    ]  # fmt: skip


def level_told(entries: Sequence[Entry]) -> str:
    """What the intervals mean; empty where there are none."""
    for run, _, _ in entries:
        for searched in run.searched:
            if found := searched.result.intervals:
                return (
                    f"Per cent. The second line of a cell is the {100 * found.level:g} % interval, a bootstrap over "
                    f"the queries ({found.resamples:,} resamples). It says how far a number may move with other "
                    "queries, not with another seed of the training."
                )
    return "Per cent."


def about(searched: Searched) -> list[str]:
    """What belongs to the numbers of a set, in sentences."""
    result = searched.result
    told = [f"{result.protocol.rules}; {result.valid:,} queries count, {result.skipped:,} have no match"]
    told += [f"features of {result.dim} numbers{', the mean of an image and its mirror image' * result.flip}"
             ] if result.dim else []  # fmt: skip
    pairs = result.verification
    if pairs:
        tar = ", ".join(f"{percent(point and point.tar)} % at {far}" for far, point in pairs.tar.items())
        told.append(f"same person or not, over all pairs: accepted of one person at a false accept rate: {tar}; equal "
                    f"error rate {percent(pairs.eer)} %")  # fmt: skip
    if pairs and pairs.open_set:
        found = ", ".join(f"{percent(point and point.dir)} % at {far}" for far, point in pairs.open_set.dir.items())
        told.append(f"people who are not in the gallery: found and accepted at a false alarm rate: {found} "
                    f"({pairs.open_set.known_queries:,} queries with, {pairs.open_set.unknown_queries:,} without their "
                    "person)")  # fmt: skip
    if one := result.calibration:
        told.append(f"threshold for “same person”: cosine {one.threshold:.5f}; it accepts {percent(one.tar)} % of the "
                    f"pairs of one person and {percent(one.far, 3)} % of the others")  # fmt: skip
    return [f"{text[0].upper()}{text[1:]}." for text in told if text] + [
        f"Not measured: {reason}." for reason in result.not_measured
    ]


def alike(entries: Sequence[Entry]) -> list[list[tuple[Entry, Searched]]]:
    """Runs that searched the same version of a set by the same rules: the same queries in the same order."""
    found: dict[tuple, list[tuple[Entry, Searched]]] = {}
    for entry in entries:
        for searched in entry[0].searched:
            result = searched.result
            if result.version and result.average_precision:
                key = (result.version, result.protocol.same_camera, len(result.average_precision))
                found.setdefault(key, []).append((entry, searched))
    return [group for group in found.values() if len(group) > 1]


def precisions(searched: Searched) -> np.ndarray:
    """Average precision of every query, float64 [M]; NaN for skipped ones."""
    return np.array(searched.result.average_precision, np.float64)


def _judged(gap: Interval) -> tuple[str, bool]:
    if gap.low > 0:
        return "worse than the best, beyond what these queries leave open", True
    return "as good by these queries: the interval holds 0", False


def versus(entries: Sequence[Entry]) -> list[Versus]:
    """For each set that several runs searched: how far each is below the best in mAP, query by query.

    A bootstrap over the queries of the difference in average precision (Efron 1979), as in finetune/curve.py.
    """
    found = []
    for group in alike(entries):
        ap = np.stack([precisions(searched) for _, searched in group])
        valid = np.isfinite(ap).all(axis=0)
        if not valid.any() or ap.shape[1] > MOST_QUERIES:
            continue
        means = ap[:, valid].mean(axis=1)
        top = int(means.argmax())
        others = []
        for i in np.argsort(-means, kind="stable"):
            if i == top:
                continue
            (run, style, letter), _ = group[i]
            gap = interval(ap[i][valid], ap[top][valid], LEVEL, RESAMPLES, SEED)
            text = f"{percent(gap.mean)} ({percent(gap.low)} to {percent(gap.high)})"
            others.append(Difference(letter, style, run.name, text, *_judged(gap)))
        (run, _, letter), searched = group[top]
        found.append(Versus(searched.result.name, int(valid.sum()), f"{letter} {run.name}".strip(), others))
    return found


def best_search(run: Run) -> Result | None:
    """The search that the head of the page speaks of: the first set."""
    return run.searched[0].result if run.searched else None
