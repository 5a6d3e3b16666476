"""Two ways of doing the same work, timed in turns in one process, and the line of JSON that every bench ends with."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pairs.children import memory_mb
from recipes.record import environment


def peak_mb() -> float:
    """Largest resident memory of this process so far, MiB; over 500 of it are the imports of torch."""
    return memory_mb("VmHWM")


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
        """See `compare`."""
        return compare(self.ours, self.textbook, scale)


def compare(ours: list[Seconds], textbook: list[Seconds], scale: float) -> dict[str, Any]:
    """Medians of wall-clock time, each times `scale` to the unit of the bench, and textbook / ours.

    ratios: of each round. cpu_ratio: of the medians of CPU time, to be read where the machine was shared.
    """
    wall = [statistics.median(t.wall for t in times) for times in (ours, textbook)]
    cpu = [statistics.median(t.cpu for t in times) for times in (ours, textbook)]
    return {
        "ratio": round(wall[1] / wall[0], 3),
        "ours": round(wall[0] * scale, 4),
        "textbook": round(wall[1] * scale, 4),
        "ratios": [round(b.wall / a.wall, 3) for a, b in zip(ours, textbook, strict=True)],
        "cpu_ratio": round(cpu[1] / cpu[0], 3),
    }


def machine(threads: int, gpu: str | None = None) -> dict[str, Any]:
    """What the times were taken on. threads: that the work may use. gpu: its name, where one did the work."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    load = round(os.getloadavg()[0], 2)  # above `threads`: others were busy
    cpu = {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "threads": threads, "load": load}
    return cpu if gpu is None else {"gpu": gpu, **cpu}


def report(
    name: str,
    numbers: dict[str, Any],
    unit: str,
    peak: float,
    threads: int,
    gpu: str | None = None,
    file: Path | None = None,
    **more: Any,
) -> None:
    """Print the line: name, ratio, ours, textbook, unit, peak_mb, machine, versions, and what a bench adds.

    file: where the line is written, too.
    """
    facts = {"unit": unit, "peak_mb": round(peak), **more}
    told = environment()
    where = {
        "machine": machine(threads, gpu),
        "commit": told["commit"],
        "uncommitted_changes": told["uncommitted_changes"],
        "versions": {"python": told["python"], **told["versions"]},
    }
    line = json.dumps({"name": name, **numbers, **facts, **where})
    print(line)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(line + "\n", encoding="utf-8")
