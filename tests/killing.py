"""Kills of every kind, one after the other, until runs are through; and what then differs from an undisturbed one."""

import collections
import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import small
import torch
from forked import PATIENCE_S, Prepare, Run, Server
from safetensors.torch import load_file

from pretrain.ranks import REQUEUE

Line = Callable[[Path], list[str]]  # run folder -> command


def newest(out: Path) -> str:
    """Name of the newest state in place; empty without one."""
    return max((path.name for path in out.glob("checkpoints/samples-*") if path.name.count("-") == 1), default="")


@dataclass(frozen=True)
class Kill:
    """One way to end a run: what is prepared in it, and what is done from outside while it goes."""

    name: str  # kills of a name are counted together
    prepare: Prepare = ()
    act: Callable[[Run, Path], None] = lambda run, _: None
    status: int = -signal.SIGKILL  # with which the run ends


def until(run: Run, true: Callable[[], bool]) -> bool:
    """Wait for something while the run goes; False when it ended before."""
    end = time.monotonic() + PATIENCE_S
    while run.poll() is None:
        if true():
            return True
        assert time.monotonic() < end, run.told()
        time.sleep(0.001)
    return False


def _new_state(run: Run, out: Path, before: str) -> bool:
    return until(run, lambda: newest(out) != before)


def any_time(seconds: float, workers: bool = True) -> Kill:
    """So long after the first new state. workers: its loader processes are killed with it."""

    def act(run: Run, out: Path) -> None:
        if _new_state(run, out, newest(out)):
            time.sleep(seconds)
            run.kill(workers)

    return Kill("at any time" if workers else "without its workers", act=act)


def while_writing(seconds: float) -> Kill:
    """So long after the folder of a half-written state is seen; a new state is in place before."""

    def act(run: Run, out: Path) -> None:
        written = _new_state(run, out, newest(out))
        if written and until(run, lambda: any(out.glob("checkpoints/.samples-*.partial"))):
            time.sleep(seconds)
            run.kill()

    return Kill("a .partial folder seen", act=act)


def after_an_epoch(steps: int) -> Kill:
    """As soon as the last step of an epoch of so many steps is written down; a new state is in place before."""

    def act(run: Run, out: Path) -> None:
        if _new_state(run, out, newest(out)):
            last = (len(small.complete_lines(out)) // steps + 1) * steps
            if until(run, lambda: len(small.complete_lines(out)) >= last):
                run.kill()

    return Kill("an epoch's end", act=act)


def stopped(number: int, seconds: float) -> Kill:
    """Asked to stop by a signal, so long after the first new state; it saves, and may be started again."""

    def act(run: Run, out: Path) -> None:
        if _new_state(run, out, newest(out)):
            time.sleep(seconds)
            run.send(number)

    return Kill(f"by {signal.Signals(number).name}", act=act, status=REQUEUE)


def at_point(name: str, begin: int | str, number: int, when: str, trace: Path) -> Kill:
    """At operation `number` of a save; see kill_points.arm."""
    given = {"file": str(trace), "begin": begin, "number": number, "when": when}
    return Kill(name, [("kill_points", "arm", given)], lambda run, _: run.wait() and None)


def points(operations: Sequence[str], begin: int | str, trace: Path) -> list[Kill]:
    """Before and after each operation of a save, and half-way through those that write or delete files."""
    found = []
    for number, operation in enumerate(operations):
        whens = ["before", "after", *(["half"] if operation.split()[1] in ("save", "rmtree") else [])]
        found += [at_point("inside a save", begin, number, when, trace) for when in whens]
    return found


def operations_of(trace: Path, saves: int = 1) -> list[str]:
    """The lines of the first saves in a file that kill_points.arm wrote."""
    lines = trace.read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.split()[1] == "save"]
    return lines[: starts[saves]] if saves < len(starts) else lines


LATE = (-signal.SIGTERM, -signal.SIGUSR1)


class Campaign:
    """Starts one command again and again, in new run folders when a run is through, until all kills are spent."""

    def __init__(self, forks: Server, line: Line, folder: Path, variants: Sequence[list[str]] = ((),)):
        """folder: run folders are made in it. variants: settings for the starts, in turn, that change no result."""
        self.forks, self.line, self.folder = forks, line, folder
        self.variants = itertools.cycle(variants)
        self.counts: collections.Counter[str] = collections.Counter()
        self.outs: list[Path] = []
        self.starts: list[Run] = []

    def stream(self, out: Path) -> Path:
        """The file that streams.stream writes."""
        return out.with_name(f"{out.name}-stream.jsonl")

    def start(self, out: Path, prepare: Prepare = ()) -> Run:
        """One start of the command; it writes its stream."""
        line = [*self.line(out), *next(self.variants)]
        kind = "stream" if "pretrain/run.py" in line[0] else "finetune_stream"
        stream = ("streams", kind, {"file": str(self.stream(out))})
        self.starts.append(self.forks.start(line, [*prepare, stream]))
        return self.starts[-1]

    def fresh(self) -> Path:
        """The next run folder."""
        self.outs.append(self.folder / f"run-{len(self.outs)}")
        return self.outs[-1]

    def spend(self, kills: Sequence[Kill]) -> None:
        """Kill as the list says; then let the run end. A kill for which the run was too quick is tried on the next."""
        left, out, tries = list(kills), self.fresh(), 0
        while left:
            run = self.start(out, left[0].prepare)
            left[0].act(run, out)
            # a signal may come behind the last line, when the interpreter is on its way out
            if (status := run.wait()) == 0 or (status in LATE and "teacher: " in run.told()):
                tries += 1
                assert tries <= len(kills), f"{left[0].name}: runs are through before it"
                out = self.fresh()
                continue
            assert status == left[0].status, f"{status}: {run.told()}"
            self.counts[left.pop(0).name] += 1
        run = self.start(out)
        assert run.wait() == 0, run.told()
        assert all(one.gone() for one in self.starts), "loader workers outlived their run"

    def against(self, alone: Path, files: Sequence[str]) -> tuple[int, int]:
        """How many lines, samples and files are lost, and how many differ, in all runs against an undisturbed one."""
        found = [compare(out, alone, files) for out in self.outs]
        found += [compare_streams(self.stream(out), self.stream(alone)) for out in self.outs]
        return sum(lost for lost, _ in found), sum(wrong for _, wrong in found)

    def told(self) -> str:
        """The counts in a few words."""
        kinds = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"{kinds}; {len(self.outs)} runs in all"


def compare(out: Path, alone: Path, files: Sequence[str]) -> tuple[int, int]:
    """Lines and files that `out` has not though `alone` has them, and lines and tensors that differ."""
    ours, theirs = ({line["step"]: line for line in small.repeatable(small.metrics(run))} for run in (out, alone))
    lost, wrong = len(theirs.keys() - ours.keys()), sum(ours[step] != theirs.get(step) for step in ours)
    wrong += len(small.metrics(out)) - len(ours)  # a step written twice
    for file in files:
        if not (out / file).is_file():
            lost += 1
            continue
        own, other = load_file(out / file), load_file(alone / file)
        wrong += len(own.keys() ^ other.keys())
        wrong += sum(not torch.equal(own[name], other[name]) for name in own.keys() & other.keys())
    return lost, wrong


def _streamed(file: Path) -> Iterator[dict]:
    """The lines of streams.stream; half a line is what a kill left."""
    text = file.read_text() if file.is_file() else ""
    for line in text.split("\n"):
        if line.endswith("}"):
            yield json.loads(line)


def compare_streams(file: Path, alone: Path) -> tuple[int, int]:
    """Samples that were never given, and steps whose samples, crops or masks were others, however often they ran."""
    expected, seen, wrong = {line["step"]: line for line in _streamed(alone)}, set(), 0
    for line in _streamed(file):
        seen.add(line["step"])
        wrong += line != expected.get(line["step"])
    return sum(len(line["rows"]) for step, line in expected.items() if step not in seen), wrong
