"""Progress that people can read: rate and time left, on a terminal as a bar, elsewhere as a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
LINE_EVERY_S = 5.0  # seconds between lines when the output is not a terminal


def clock(seconds: float) -> str:
    """Seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Meter:
    """Counts `unit`s towards `total`; shows rate, time left and a short note. A silent meter shows nothing.

    total: None where it is not known, then there is no time left.
    """

    def __init__(self, total: int | None, label: str, unit: str = "images", start: int = 0, silent: bool = False):
        self.total, self.label, self.unit, self.done, self.first = total, label, unit, start, start
        self.note = ""
        self.began = self.spoke = time.monotonic()
        self.silent = silent
        self.bar: Progress | None = None
        if not silent and sys.stderr.isatty():
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[info]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), transient=False)
            self.task = self.bar.add_task(label, total=total, completed=start, info="")

    def __enter__(self) -> "Meter":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
        elif not self.silent and self.done > self.first:
            self._line(time.monotonic())

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more; `note` (loss, for example) is shown beside the rate."""
        self.done += units
        self.note = note or self.note
        if self.silent:
            return
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=self.done, info=f"{self.rate:.0f} {self.unit}/s {self.note}")
        elif now - self.spoke >= LINE_EVERY_S:
            self._line(now)

    def _line(self, now: float) -> None:
        self.spoke = now
        count, left = f"{self.done}", ""
        if self.total is not None:
            count = f"{self.done}/{self.total}"
            left = f"{clock((self.total - self.done) / max(self.rate, 1e-9))} left  "
        text = f"{self.label} {count}  {self.rate:.0f} {self.unit}/s  {left}{self.note}"
        print(text.rstrip(), file=sys.stderr, flush=True)


def track(iterable: Iterable[T], total: int, label: str, unit: str = "images") -> Iterator[T]:
    """Iterate and show progress, one unit an item."""
    with Meter(total, label, unit) as meter:
        for item in iterable:
            yield item
            meter.advance()
