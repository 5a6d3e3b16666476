"""metrics.jsonl as columns, for curves: read line by line, so that a long run takes the memory of its numbers only."""

import json
import math
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from finetune.page_results import Notes

LONGEST = 1 << 20  # bytes of a line
MOST_KEYS = 200  # columns
LARGEST = 1e100  # what is beyond is not drawn, as nan and inf: differences would overflow


class Column(NamedTuple):
    """A value over the steps, float64 [n] both; NaN where the line has null."""

    steps: np.ndarray
    values: np.ndarray

    def against(self, other: "Column | None") -> "Column":
        """With the values of another column as the steps, where both have a line."""
        if other is None:
            return Column(np.empty(0), np.empty(0))
        _, own, theirs = np.intersect1d(self.steps, other.steps, return_indices=True)
        return Column(other.values[theirs], self.values[own])

    def known(self) -> np.ndarray:
        """The values that are there, float64 [m]."""
        return self.values[np.isfinite(self.values)]


class Alarm(NamedTuple):
    """An alarm from the first to the last line that has it."""

    name: str
    first: int
    last: int


class Metrics:
    """What the lines hold."""

    def __init__(self) -> None:
        self.columns: dict[str, Column] = {}
        self.terms: list[str] = []  # keys that stood on a line together with `loss`
        self.lines = self.damaged = 0
        self.last_step: int | None = None
        self.alarms: list[Alarm] = []
        self.spikes: list[int] = []  # first step of each
        self.skipped: list[int] = []  # steps whose line tells of steps that were not taken

    def of(self, key: str) -> Column:
        """A column, empty where there is none."""
        return self.columns.get(key) or Column(np.empty(0), np.empty(0))

    def last(self, key: str) -> float | None:
        """The last known value."""
        known = self.of(key).known()
        return float(known[-1]) if len(known) else None


class _Reading:
    """The columns while they grow."""

    def __init__(self) -> None:
        self.found, self.terms = Metrics(), dict[str, None]()
        self.steps, self.values = dict[str, array](), dict[str, array]()
        self.ringing: dict[str, tuple[int, int]] = {}
        self.left_out: set[str] = set()
        self.not_taken = 0

    def take(self, line: Mapping[str, Any]) -> None:
        """The next line. ValueError where it has no step."""
        step = line.get("step")
        if type(step) is not int or abs(step) > 1 << 53:
            raise ValueError("no step")
        self.found.last_step = max(step, self.found.last_step or 0)
        for key, value in line.items():
            if key != "step" and (value is None or type(value) in (int, float)):
                self._put(key, step, value)
                if "loss" in line:
                    self.terms[key] = None
        self._events(step, line)

    def _put(self, key: str, step: int, value: float | None) -> None:
        if key not in self.values:
            if len(self.values) >= MOST_KEYS:
                if len(self.left_out) < MOST_KEYS:
                    self.left_out.add(key)
                return
            self.steps[key], self.values[key] = array("d"), array("d")
        known = value is not None and abs(value) < LARGEST  # false for nan
        self.steps[key].append(step)
        self.values[key].append(value if known else math.nan)

    def _events(self, step: int, line: Mapping[str, Any]) -> None:
        names = line.get("alarms")
        names = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
        for name in [name for name in self.ringing if name not in names]:
            self.found.alarms.append(Alarm(name, *self.ringing.pop(name)))
        for name in sorted(names):
            self.ringing[name] = self.ringing.get(name, (step, step))[0], step
        spike = line.get("spike")
        if isinstance(spike, dict) and type(spike.get("first")) is int:
            self.found.spikes.append(spike["first"])
        count = line.get("skipped_steps")
        if type(count) is int:
            if count > self.not_taken:
                self.found.skipped.append(step)
            self.not_taken = count

    def done(self) -> Metrics:
        """The columns, in the order of the steps."""
        for key, values in self.values.items():
            steps = np.frombuffer(self.steps[key], np.float64)
            order = np.argsort(steps, kind="stable")
            self.found.columns[key] = Column(steps[order], np.frombuffer(values, np.float64)[order])
        self.found.alarms += [Alarm(name, *span) for name, span in self.ringing.items()]
        self.found.alarms.sort(key=lambda alarm: (alarm.first, alarm.name))
        self.found.terms = list(self.terms)
        return self.found


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The whole lines, in pieces where one is too long; one without its end is being written, and left out."""
    while line := file.readline(LONGEST):
        if line.endswith(b"\n") or len(line) == LONGEST:
            yield line


def read(path: Path, notes: Notes) -> Metrics:
    """The numbers of a run, none where there is no file; lines that cannot be read are noted."""
    reading = _Reading()
    found = reading.found
    try:
        with open(path, "rb") as file:
            for line in _lines(file):
                found.lines += 1
                try:
                    tree = json.loads(line)
                    reading.take(tree if isinstance(tree, dict) else {})
                except (ValueError, RecursionError):
                    found.damaged += 1
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
    if found.damaged:
        notes.append(f"{found.damaged:,} of the {found.lines:,} lines of {path.name} are damaged, and left out.")
    if reading.left_out:
        notes.append(f"{path.name} has more than {MOST_KEYS} different keys; the others are left out.")
    return reading.done()
