"""What an evaluation leaves behind: a table to read, a row for every query, pictures.

Everything here is made from the tree that benchmark.py writes as results.json, so a number in a table or under a
picture is the number in that file. Pictures can be read without colour: hatching, line styles and written numbers say
the same.
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recipes.record import write_text

COLUMNS = {"mAP": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mINP": "mINP"}
BLUE, ORANGE, GREY = "#4477aa", "#cc6633", "#555555"
# second stages of a search, see rescoring.py
SECOND = {"local": "aligned stripes", "both": "global feature and aligned stripes", "unaligned": "stripes as they lie"}
BARS = 120  # of the histograms in distances.png
WRITTEN, LARGEST = 20, 16  # cameras.png: cameras up to which the numbers are written; inches of a side


class Histogram(NamedTuple):
    """Pairs of a query and a gallery image by their cosine."""

    edges: np.ndarray  # float64 [B + 1], ascending
    positive: np.ndarray  # int64 [B], pairs of the same person
    negative: np.ndarray  # int64 [B], pairs of two persons


def percent(value: float | None, digits: int = 1) -> str:
    """0.123 -> 12.3; a dash where there is no number."""
    return "–" if value is None or not np.isfinite(value) else f"{100 * value:.{digits}f}"


def sentence(told: Mapping[str, Any]) -> str:
    """The result of one set in a few lines: what was searched by which rule, the numbers in per cent."""
    lines = [f"{where(told)}; {told['protocol']['rules']}"]
    for label, numbers in states(told):
        values = "  ".join(f"{title} {percent(numbers[key])}" for key, title in COLUMNS.items() if key != "rank10")
        lines.append(f"{label}: {values}  ({told['valid']} queries, {told['skipped']} without a match)")
    return "\n".join(lines)


def where(told: Mapping[str, Any]) -> str:
    """Data set, its version and the splits."""
    return f"{' + '.join(told['data'])} ({told['version']}), query in gallery"


def states(told: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The numbers as searched and, where that was done, after re-ranking."""
    found = [("plain", told)]
    if told.get("reranked"):
        settings = told["reranked"]["rerank"]
        found.append((f"re-ranked (k1={settings['k1']}, k2={settings['k2']}, λ={settings['lam']})", told["reranked"]))
    for second in told.get("rescored", ()):
        found.append((f"first {second['candidates']:,} by {SECOND[second['distance']]}", second))
    return found


def _cell(numbers: Mapping[str, Any], key: str) -> str:
    low_high = (numbers.get("intervals") or {}).get(key)
    return percent(numbers[key]) + (f" [{percent(low_high[0])}, {percent(low_high[1])}]" if low_high else "")


def _counts(split: Mapping[str, int]) -> str:
    rest = [f"{split[name]:,} {title}" for name, title in (("distractors", "distractors"), ("junk", "junk images"))
            if split[name]]  # fmt: skip
    inside = f" ({', '.join(rest)} among them)" if rest else ""
    return f"{split['images']:,} images{inside} of {split['identities']:,} identities, {split['cameras']:,} cameras"


def _paragraphs(told: Mapping[str, Any]) -> list[str]:
    """What stands below the table for one set."""
    facts = [
        f"* data: {' + '.join(told['data'])}, `{told['shards']}`, version `{told['version']}`",
        f"* query: {_counts(told['splits']['query'])}; gallery: {_counts(told['splits']['gallery'])}",
        f"* protocol: {told['protocol']['rules']}; {told['valid']:,} queries count, {told['skipped']:,} have no match",
        f"* model: `{told['title']}`; features {told['dim']}-dimensional{', with flip averaging' * told['flip']}",
    ]
    return facts + _same_or_not(told)


def _same_or_not(told: Mapping[str, Any]) -> list[str]:
    """Verification, open-set identification and the calibrated threshold; or why they are missing."""
    facts = []
    found, calibration = told["verification"], told["calibration"]
    if found:
        tar = ", ".join(f"{percent(point and point['tar'])} % at FAR {far}" for far, point in found["tar"].items())
        facts.append(f"* same person or not, over all pairs: TAR {tar}; equal error rate {percent(found['eer'])} %")
        one = found["open_set"]
        dir_ = ", ".join(f"{percent(point and point['dir'])} % at FAR {far}" for far, point in one["dir"].items())
        facts.append(
            f"* open set, {one['unknown_queries']:,} queries without and {one['known_queries']:,} with their person in "
            f"the gallery: DIR {dir_}"
        )
    if calibration:
        facts.append(
            f"* threshold for `same person`: cosine {calibration['threshold']:.5f}; it accepts "
            f"{percent(calibration['tar'])} % of the pairs of one person, "
            f"{percent(calibration['far'], 3)} % of the others"
        )
    return facts + [f"* not measured: {reason}" for reason in told["not_measured"]]


def table(
    title: str,
    sets: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, str],
    pages: Mapping[str, str] | None = None,
) -> str:
    """results.json of one or several sets as Markdown.

    pictures: file name -> what it shows, for those who cannot see it. pages: file -> name of a table of one set.
    """
    level = next((told["intervals"] for told in sets if told.get("intervals")), None)
    lines = [
        f"# {title}",
        "",
        f"| data | search | {' | '.join(COLUMNS.values())} |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for told in sets:
        for label, numbers in states(told):
            cells = " | ".join(_cell(numbers, key) for key in COLUMNS)
            lines.append(f"| {' + '.join(told['data'])} | {label} | {cells} |")
    lines += ["", "Per cent."]
    if level:
        lines[-1] += (
            f" In brackets: {100 * level['level']:g} % interval, bootstrap over the queries ({level['resamples']:,} "
            "resamples). It says how far a number may move with other queries, not with another seed of the training."
        )
    for told in sets:
        lines += ["", f"## {' + '.join(told['data'])}", "", *_paragraphs(told)]
    if pages:
        lines += ["", f"More: {', '.join(f'[{name}]({page})' for page, name in pages.items())}."]
    for name, shown in pictures.items():
        lines += ["", f"![{shown}]({name})"]
    return "\n".join(lines) + "\n"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with commas; floats in their shortest exact form, an empty field where there is no number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow("" if value is None or value != value else value for value in row)
    write_text(path, text.getvalue())


def save_figure(path: Path, figure: Figure) -> None:
    """Write a picture completely or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        FigureCanvasAgg(figure).print_png(draft, metadata={"Software": None})
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def distance(cosine: float) -> str:
    """1 - cosine with three digits that tell something: of some models all cosines lie between 0.99 and 1."""
    apart = max(0.0, 1 - cosine)
    return f"{apart:.3f}" if apart >= 0.1 or not apart else f"{apart:.3g}"


def _drawn_part(pairs: Histogram) -> Histogram:
    """BARS bars or a few less over the range where pairs are."""
    used = np.flatnonzero(pairs.positive + pairs.negative)
    first, width = used[0], -(-(used[-1] + 1 - used[0]) // BARS)
    starts = np.arange(first, used[-1] + 1, width)
    counted = (np.add.reduceat(counts[: used[-1] + 1], starts) for counts in pairs[1:])
    ends = np.append(starts, min(starts[-1] + width, len(pairs.edges) - 1))
    return Histogram(pairs.edges[ends], *counted)


def _draw_histogram(axes: Axes, pairs: Histogram, thresholds: Mapping[str, float]) -> None:
    shown = _drawn_part(pairs)
    for counts, label, colour, line, hatch in (
        (shown.positive, "one person", BLUE, "-", "///"),
        (shown.negative, "two people", ORANGE, "--", None),
    ):
        density = counts / (max(1, counts.sum()) * np.diff(shown.edges))
        style = {"edgecolor": colour, "linestyle": line, "hatch": hatch, "linewidth": 1.5, "facecolor": "none"}
        axes.stairs(
            density[::-1], (1 - shown.edges)[::-1], fill=True, label=f"{label} ({counts.sum():,} pairs)", **style
        )
    for (label, cosine), line in zip(thresholds.items(), (":", "-."), strict=False):
        axes.axvline(1 - cosine, color=GREY, linestyle=line, label=f"{label}: {distance(cosine)}")
    axes.set(xlabel="distance, 1 - cosine", ylabel="density of pairs")
    axes.secondary_xaxis("top", functions=(lambda d: 1 - d, lambda c: 1 - c)).set_xlabel("cosine")
    axes.legend(frameon=False)


def draw_distances(
    path: Path, pairs: Histogram, thresholds: Mapping[str, float], roc: Sequence[Sequence[float]]
) -> str:
    """Distances of pairs of one person and of two, and beside them the ROC; returns the description.

    thresholds: name -> cosine, two at most. roc: [threshold, FAR, TAR] of each point.
    """
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_histogram(left, pairs, thresholds)
    _, far, tar = np.array(roc).T
    least = min(0.1, max(1 / pairs.negative.sum(), 1e-6))  # the axis has no 0
    right.plot(np.maximum(far, least), tar, color=BLUE, linewidth=1.5)
    right.set(xscale="log", xlabel="accepted pairs of two people (FAR)", ylabel="accepted pairs of one person (TAR)")
    right.set(ylim=(0, 1.02), xlim=(least, 1))
    right.grid(alpha=0.4)
    save_figure(path, figure)
    middles = (pairs.edges[1:] + pairs.edges[:-1]) / 2
    one, two = (f"{counts.sum():,} pairs of {label} (mean {distance(np.average(middles, weights=counts))})"
                for counts, label in ((pairs.positive, "one person"), (pairs.negative, "two people")))  # fmt: skip
    marks = ", ".join(f"{label} {distance(cosine)}" for label, cosine in thresholds.items())
    return (
        f"Left: distances of {one} and of {two}; threshold: {marks}. Right: ROC, the accepted share of the pairs "
        "of one person over that of the pairs of two."
    )


def draw_cameras(path: Path, cameras: Sequence[Mapping[str, Any]]) -> str:
    """mAP of each pair of cameras as squares, in per cent; returns the description.

    cameras: of each pair "query" and "gallery" (camera numbers) and "mAP".
    """
    rows, columns = (sorted({pair[side] for pair in cameras}) for side in ("query", "gallery"))
    grid = np.full((len(rows), len(columns)), np.nan)
    for pair in cameras:
        grid[rows.index(pair["query"]), columns.index(pair["gallery"])] = 100 * pair["mAP"]
    width, height = (min(0.5 * len(side), LARGEST) for side in (columns, rows))
    figure = Figure(figsize=(2.6 + width, 1.8 + height), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(grid, cmap="gray", vmin=0, vmax=100)  # light is good, also in print
    axes.patch.set(facecolor="white", edgecolor=BLUE, hatch="xx")  # seen where there is no number
    axes.set(xlabel="camera of the gallery image", ylabel="camera of the query", title="mAP, %; crossed: no match")
    axes.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > WRITTEN else 0)
    axes.set_yticks(range(len(rows)), rows)
    if max(len(rows), len(columns)) <= WRITTEN:
        for row, column in np.argwhere(~np.isnan(grid)):
            colour = "white" if grid[row, column] < 50 else "black"
            axes.text(column, row, f"{grid[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(picture)
    save_figure(path, figure)
    worst, best = min(cameras, key=lambda pair: pair["mAP"]), max(cameras, key=lambda pair: pair["mAP"])
    return (
        f"mAP of {len(cameras)} pairs of cameras: best {percent(best['mAP'])} % (query camera {best['query']}, gallery "
        f"camera {best['gallery']}), worst {percent(worst['mAP'])} % ({worst['query']}, {worst['gallery']})."
    )
