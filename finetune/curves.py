"""Curves as SVG: where lines, ticks and marks lie, in units of the picture; the template of the page writes them down.

Drawn here and not by matplotlib: colours are classes of the page's style sheet, so one picture serves light and dark;
text stays text, at a size that can be read on a phone, because each picture is small and the page sets them side by
side; equal numbers give equal bytes; and a page with forty of them stays below a megabyte.

A long line is thinned by buckets of equal width: the mean of a bucket is drawn as the line, its least and its largest
value as a band around it, so no spike is lost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 360, 196  # of a picture; one unit is about one CSS pixel
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 8, 34  # margins; the right one also holds the letters of lines
LETTERS = 12
BUCKETS = 150  # of a thinned line
STYLES = 8  # kinds of lines that the style sheet tells apart: colour and dashes
MARKS = 60  # of one kind in a picture; more would be a wall
LOG_RATIO = 40.0  # largest over median value from which a picture is logarithmic, so that one spike hides nothing
MOST_POINTS = 24  # of a line whose points are shown as dots


class Line(NamedTuple):
    """Values over x; both float64 [n], x ascending, NaN in y where nothing is known."""

    label: str
    x: np.ndarray
    y: np.ndarray
    style: int = 0  # 0..STYLES - 1
    letter: str = ""  # written at its end
    ends: np.ndarray | None = None  # float64 [n, 2], an interval for each value


class Level(NamedTuple):
    """A line across, a threshold for example."""

    value: float
    text: str


class Mark(NamedTuple):
    """A line from top to bottom."""

    x: float
    kind: str  # class of the style sheet: skip, spike, back, alarm


@dataclass(frozen=True)
class Chart:
    """What is to be drawn."""

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    note: str = ""  # how to read it
    levels: Sequence[Level] = ()
    marks: Sequence[Mark] = ()
    zero: bool = False  # the axis begins at 0
    log: bool = False  # logarithmic where the values ask for it
    percent: bool = False  # shares are written in per cent
    ring: tuple[float, float] | None = None  # a point to be ringed


class Thin(NamedTuple):
    """A line for drawing, float64 [m] each; NaN breaks it."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Text(NamedTuple):
    """A label at a place of an axis."""

    at: float
    text: str


class Path(NamedTuple):
    """A drawn line."""

    label: str
    style: int
    letter: str
    line: str  # `d` of the path
    band: str  # `d` of the area from least to largest; empty where nothing was thinned
    whiskers: str
    dots: list[tuple[str, str]]
    end: tuple[float, float]  # of its letter


@dataclass(frozen=True)
class Drawn:
    """A chart for the template; lengths are in units of the picture."""

    chart: Chart
    paths: list[Path]
    x_ticks: list[Text]
    y_ticks: list[Text]
    levels: list[Text]
    marks: list[tuple[str, str]]  # kind and `d`
    summary: str  # in words
    axes: str  # for the script: x0 x1 y0 y1 of the data, and whether y is logarithmic
    ring: tuple[str, str] | None = None
    legend: list[tuple[int, str, str]] = field(default_factory=list)  # style, letter and label, where there are several


def thinned(x: np.ndarray, y: np.ndarray, buckets: int = BUCKETS) -> Thin:
    """At most `buckets` points, of as many equal parts of the x that are there; a part of NaN alone is NaN.

    x float64 [n] ascending, y float64 [n]. A line of up to 2 * buckets points stays as it is.
    """
    if len(x) <= 2 * buckets or x[0] == x[-1]:
        return Thin(x, y, y, y)
    part = np.minimum((x - x[0]) / (x[-1] - x[0]) * buckets, buckets - 1).astype(np.int64)
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    known = np.isfinite(y)
    count = np.add.reduceat(known.astype(np.float64), starts)
    empty = count == 0

    def over(ufunc: np.ufunc, neutral: float) -> np.ndarray:
        found = ufunc.reduceat(np.where(known, y, neutral), starts)
        return np.where(empty, np.nan, found)

    mean = over(np.add, 0.0) / np.maximum(count, 1)
    return Thin(np.add.reduceat(x, starts) / np.diff(starts, append=len(x)), mean, over(np.minimum, np.inf),
                over(np.maximum, -np.inf))  # fmt: skip


def short(value: float) -> str:
    """A number in a few characters."""
    size = abs(value)
    for unit, letter, least in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if least <= size < 1e13:
            return f"{value / unit:.4g}{letter}"
    if size and (size < 1e-3 or size >= 1e13):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+", "e")
    return f"{value:.4g}"


def told(value: float, percent: bool) -> str:
    """A number of a chart for people."""
    return f"{short(100 * value)} %" if percent else short(value)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values from low to high, about `most` of them: 1, 2, 2.5 or 5 times a power of ten apart."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, and below two decades also 2 and 5 times these."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, -(-(last - first) // most))
    found = [float(f"{factor}e{power}") for power in range(first, last + 1, every) for factor in factors]
    return [value for value in found if low <= value <= high]


class _Axis:
    """From data to the picture."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        """low, high: of the data, low < high. start, end: where they lie."""
        self.low, self.high, self.log = low, high, log
        self.edges = (math.log10(low), math.log10(high)) if log else (low, high)
        self.start, self.end = start, end

    def at(self, value: np.ndarray | float) -> np.ndarray:
        """Places of values; what lies outside goes to the edge."""
        with np.errstate(invalid="ignore", divide="ignore"):
            value = np.clip(np.asarray(value, np.float64), self.low, self.high)
            value = np.log10(value) if self.log else value
        share = (value - self.edges[0]) / (self.edges[1] - self.edges[0])
        return self.start + share * (self.end - self.start)


def _runs(y: np.ndarray) -> list[np.ndarray]:
    """Indices of each stretch without a NaN."""
    known = np.flatnonzero(np.isfinite(y))
    return np.split(known, np.flatnonzero(np.diff(known) > 1) + 1) if len(known) else []


def _d(x: np.ndarray, y: np.ndarray, close: bool = False) -> str:
    """The `d` of a path through points; a single one is drawn as a dot by its round ends."""
    points = "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
    return f"M{points}" + ("Z" if close else "h0" if len(x) == 1 else "")


def _path(line: Line, thin: Thin, across: _Axis, up: _Axis) -> Path:
    x, y = across.at(thin.x), up.at(thin.mean)
    runs = _runs(thin.mean)
    drawn = "".join(_d(x[run], y[run]) for run in runs)
    band = ""
    if thin.low is not thin.mean:
        low, high = up.at(thin.low), up.at(thin.high)
        band = "".join(
            _d(np.concatenate([x[run], x[run][::-1]]), np.concatenate([high[run], low[run][::-1]]), close=True)
            for run in runs
        )
    whiskers, dots = "", []
    if len(thin.x) <= MOST_POINTS:
        dots = [(f"{a:.1f}", f"{b:.1f}") for a, b in zip(x, y, strict=True) if np.isfinite(b)]
        if line.ends is not None:
            ends = up.at(line.ends)
            whiskers = "".join(f"M{a:.1f} {low:.1f}V{high:.1f}" for a, (low, high) in zip(x, ends, strict=True)
                               if np.isfinite((low, high)).all())  # fmt: skip
    last = runs[-1][-1]
    return Path(line.label, line.style, line.letter, drawn, band, whiskers, dots, (float(x[last]), float(y[last])))


def _apart(paths: list[Path]) -> list[Path]:
    """With the letters at the ends moved so that none covers another."""
    order = sorted(range(len(paths)), key=lambda i: paths[i].end[1])
    lowest, places = HEIGHT - BOTTOM - 2.0, dict[int, float]()
    room = max(4.0, min(11.0, (lowest - TOP) / max(1, len(paths))))
    for rank, i in enumerate(order):
        least = places[order[rank - 1]] + room if rank else TOP + 4.0
        places[i] = max(least, paths[i].end[1])
    for rank, i in enumerate(reversed(order)):
        most = places[order[-rank]] - room if rank else lowest
        places[i] = min(places[i], most)
    return [path._replace(end=(path.end[0], round(places[i], 1))) for i, path in enumerate(paths)]


def _span(values: np.ndarray, chart: Chart) -> tuple[float, float, bool]:
    """Low and high of the y axis and whether it is logarithmic. values: float64 [n], finite, at least one."""
    low, high = float(values.min()), float(values.max())
    if chart.log and low > 0 and high > LOG_RATIO * float(np.median(values)):
        return low / 1.2, high * 1.2, True
    low, high = (min(low, 0.0), max(high, 0.0)) if chart.zero else (low, high)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - (0 if chart.zero and low == 0 else room), high + room, False


def _words(line: Line, percent: bool) -> str:
    known = np.isfinite(line.y)
    x, y = line.x[known], line.y[known]
    name = f"{line.letter} {line.label}".strip()
    if len(y) == 1:
        return f"{name}: {told(y[0], percent)} at {short(x[0])}"
    return (f"{name}: from {told(y[0], percent)} at {short(x[0])} to {told(y[-1], percent)} at {short(x[-1])}, least "
            f"{told(y.min(), percent)}, largest {told(y.max(), percent)}")  # fmt: skip


def _marks(marks: Sequence[Mark], across: _Axis) -> list[tuple[str, str]]:
    """One path a kind; marks that would lie on each other are one."""
    found = []
    for kind in dict.fromkeys(mark.kind for mark in marks):
        places = across.at([mark.x for mark in marks if mark.kind == kind if across.low <= mark.x <= across.high])
        slots = np.unique(np.round((places - LEFT) / (WIDTH - LEFT - RIGHT) * MARKS))
        places = LEFT + slots / MARKS * (WIDTH - LEFT - RIGHT) if len(places) > MARKS else places
        if len(places):
            found.append((kind, "".join(f"M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" for x in np.unique(np.round(places, 1)))))
    return found


def draw(chart: Chart) -> Drawn | None:
    """The places of everything; None where no value of any line is known."""
    lines = [line for line in chart.lines if np.isfinite(line.y).any()]
    if not lines:
        return None
    thin = [thinned(line.x, line.y) for line in lines]
    parts = [part for each in thin for part in (each.low, each.high)]
    parts += [line.ends.ravel() for line in lines if line.ends is not None]
    values = np.concatenate([*parts, [level.value for level in chart.levels]])
    low, high, log = _span(values[np.isfinite(values)], chart)
    every_x = np.concatenate([line.x for line in lines])
    first, last = float(every_x.min()), float(every_x.max())
    last = last if last > first else first + 1
    right = WIDTH - RIGHT - (LETTERS if any(line.letter for line in lines) else 0)
    across, up = _Axis(first, last, LEFT, right), _Axis(low, high, HEIGHT - BOTTOM, TOP, log)
    paths = [_path(line, each, across, up) for line, each in zip(lines, thin, strict=True)]
    scale = [Text(round(float(up.at(value)), 1), told(value, chart.percent))
             for value in (log_ticks if log else ticks)(low, high, 4)]  # fmt: skip
    steps = [Text(round(float(across.at(value)), 1), short(value)) for value in ticks(first, last, 5)]
    return Drawn(
        chart, _apart(paths) if any(line.letter for line in lines) else paths, steps, scale,
        [Text(round(float(up.at(level.value)), 1), level.text) for level in chart.levels],
        _marks(chart.marks, across),
        f"Curve over {chart.x_label}. " + "; ".join(_words(line, chart.percent) for line in lines) + ".",
        f"{first:.10g} {last:.10g} {low:.10g} {high:.10g} {int(log)}",
        (f"{float(across.at(chart.ring[0])):.1f}", f"{float(up.at(chart.ring[1])):.1f}") if chart.ring else None,
        [(line.style, line.letter, line.label) for line in lines] if len(lines) > 1 else [],
    )  # fmt: skip
