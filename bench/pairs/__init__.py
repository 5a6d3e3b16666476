"""Two ways of doing the same work, timed in turns in one process, and the line of JSON that every bench ends with."""

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.record import environment


def peak_mb() -> float:
    """Largest resident memory of this process so far, MiB; over 500 of it are the imports of torch."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(work: Callable[[], Any]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Pair:
    """Times of ours and of the textbook way, in turns (ABAB), so that a busy neighbour slows both."""

    def __init__(self, ours: Callable[[], Any], textbook: Callable[[], Any], rounds: int, warm: bool = True):
        """warm: one call of each before the clock runs."""
        self.ours: list[float] = []
        self.textbook: list[float] = []
        if warm:
            ours()
        self.peak_mb = peak_mb()  # with warm: of ours, before the textbook way has run
        if warm:
            textbook()
        for _ in range(rounds):
            self.ours.append(seconds(ours))
            self.textbook.append(seconds(textbook))
        if not warm:
            self.peak_mb = peak_mb()

    @property
    def ratio(self) -> float:
        """Median textbook time / median time of ours; above 1 ours is faster."""
        return statistics.median(self.textbook) / statistics.median(self.ours)

    def numbers(self, scale: float) -> dict[str, Any]:
        """Rounded medians, each multiplied by `scale` to the unit of the bench, and the ratio of each round."""
        each = [theirs / ours for ours, theirs in zip(self.ours, self.textbook, strict=True)]
        return {
            "ratio": round(self.ratio, 3),
            "ours": round(statistics.median(self.ours) * scale, 4),
            "textbook": round(statistics.median(self.textbook) * scale, 4),
            "ratios": [round(ratio, 3) for ratio in each],
        }


def machine(threads: int) -> dict[str, Any]:
    """What the times were taken on. threads: that the work may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    load = round(os.getloadavg()[0], 2)  # above `threads`: others were busy
    return {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "threads": threads, "load": load}


def report(name: str, numbers: dict[str, Any], unit: str, peak: float, threads: int, **more: Any) -> None:
    """Print the line: name, ratio, ours, textbook, unit, peak_mb, machine, versions, and what a bench adds."""
    facts = {"unit": unit, "peak_mb": round(peak), **more}
    told = environment()
    where = {
        "machine": machine(threads),
        "commit": told["commit"],
        "versions": {"python": told["python"], **told["versions"]},
    }
    print(json.dumps({"name": name, **numbers, **facts, **where}))
