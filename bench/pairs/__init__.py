"""Two ways of doing the same work, timed in turns in one process, and the line of JSON that every bench ends with."""

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from recipes.record import environment


def peak_mb() -> float:
    """Largest resident memory of this process so far, MiB; over 500 of it are the imports of torch."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Seconds(NamedTuple):
    """Time of one call."""

    wall: float
    cpu: float  # of all threads of this process; it does not grow when others use the machine


def seconds(work: Callable[[], Any]) -> Seconds:
    """Time one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


class Pair:
    """Times of ours and of the textbook way, in turns (ABAB), so that a busy neighbour slows both."""

    def __init__(self, ours: Callable[[], Any], textbook: Callable[[], Any], rounds: int, warm: bool = True):
        """warm: one call of each before the clock runs."""
        self.ours: list[Seconds] = []
        self.textbook: list[Seconds] = []
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

    def numbers(self, scale: float) -> dict[str, Any]:
        """Medians of wall-clock time, each times `scale` to the unit of the bench, and textbook / ours.

        ratios: of each round. cpu_ratio: of the medians of CPU time, to be read where the machine was shared.
        """
        ours, textbook = (statistics.median(t.wall for t in times) for times in (self.ours, self.textbook))
        cpu = [statistics.median(t.cpu for t in times) for times in (self.ours, self.textbook)]
        return {
            "ratio": round(textbook / ours, 3),
            "ours": round(ours * scale, 4),
            "textbook": round(textbook * scale, 4),
            "ratios": [round(b.wall / a.wall, 3) for a, b in zip(self.ours, self.textbook, strict=True)],
            "cpu_ratio": round(cpu[1] / cpu[0], 3),
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
