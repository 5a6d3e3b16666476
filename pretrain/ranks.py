"""The processes of a run look after each other: one stop for all, and the slow and the lost ones named.

After each step the processes exchange a few numbers over a group of their own on the CPU, in the background: whether
somebody was asked to stop, and how long each waited and computed. What a step reads is the exchange of the step before,
so nobody waits for it and no device is asked, and all come to the same decision at the same step.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from pretrain.heartbeats import Heartbeats, Missing, Sign
from pretrain.processes import PATIENCE
from pretrain.slowness import PHASES, Slowness
from pretrain.stopping import REQUEUE, STOPPED, Stops
from recipes.errors import Exit
from recipes.load import Section
from recipes.whole import write_json

T = TypeVar("T")
EVALUATION = "evaluation"  # a phase that may take longer than any step
LEAVE_S = 60.0  # that the end of a process may take when another one is lost


class RanksConfig(Section):
    """How the processes of a run look after each other."""

    timeout_s: float = Field(600.0, gt=0)  # without a finished step, after which a run of several processes is given up
    beat_s: float = Field(1.0, gt=0)  # seconds between two signs of life
    slow_share: float = Field(0.15, gt=0, le=1)  # of a step that a process may take longer than the others
    slow_steps: int = Field(10, ge=2)  # steps over which that is judged


class Ranks:
    """`with Ranks(...) as ranks:` around the training. A collective that fails inside because another process is gone
    becomes an Exit that names it."""

    def __init__(self, config: RanksConfig, accelerator: Accelerator, out: Path):
        self.config, self.out = config, out
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.stops = Stops()
        self.cause: tuple[int, int] | None = None  # rank and signal of the stop that all agreed on
        self.step, self.times = 0, dict.fromkeys(PHASES, 0.0)
        self.began = self.finished = time.monotonic()  # this step; the last one
        self.pending: tuple[Any, list[Tensor]] | None = None
        self.beats: Heartbeats | None = None
        self.forwards: list[Any] = []  # pairs of CUDA events that are not read yet
        self.hooks: list[Any] = []

    def __enter__(self) -> "Ranks":
        self.stops.__enter__()
        if self.world > 1:
            self.beats = Heartbeats(self.rank, self.world, self.config.beat_s)
            self.beats.start()
            self.group = dist.new_group(timeout=PATIENCE, backend="gloo")
            hosts: list[str] = [""] * self.world
            dist.all_gather_object(hosts, self.beats.host, group=self.group)
            self.slowness = Slowness(self.config.slow_share, self.config.slow_steps, hosts)
            self.ended = threading.Event()
            self.watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.watchdog.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stops.deferred = True  # a launcher that sees another process die sends SIGTERM now
        lost = None
        if self.beats is not None:
            self.ended.set()
            if isinstance(error, RuntimeError):
                lost = self._lost_with(error)
            self.beats.stop(failed=error is not None)
        self._unwatch()
        self.stops.leave(for_good=lost is not None)
        if lost is not None:
            raise lost from error

    def _forget_stop(self) -> None:
        """The run goes on; not before, as the folder may be that of another process."""
        if self.main:
            (self.out / STOPPED).unlink(missing_ok=True)

    def _lost_with(self, error: RuntimeError) -> Exit | None:
        """What to raise in the place of an error that the loss of another process explains."""
        missing = self.beats.missing()
        if not missing.gone:
            return None
        told = self._lost(missing.gone, missing)
        first = (str(error).strip() or "no text").splitlines()[0]
        told += f" ({type(error).__name__} here: {first[:200]})"
        self._leave_soon(told)
        return Exit(told, REQUEUE)

    def _lost(self, gone: list[str], missing: Missing, why: str = "") -> str:
        """The sentence about what was lost. One of those that are left writes it into the run folder, too, unless
        somebody left after an error, which may be one that a person must mend."""
        told = "; ".join(gone)
        if not missing.failed and self.rank == min((sign.rank for sign in missing.alive), default=1):
            with contextlib.suppress(OSError):  # the folder may be gone with its host; the screen has the sentence
                self._note({"lost": told, "told_by": self.rank})
        return (
            f"error: {why}{told}. Rank {self.rank} stops; the same command goes on from the last checkpoint (a "
            "launcher with --max-restarts does it by itself)"
        )

    def _note(self, facts: dict[str, Any]) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        write_json(self.out / STOPPED, {**facts, "step": self.step, "time": now})

    def _leave_soon(self, told: str) -> None:
        """End the process should its end hang: CUDA waits for the kernels of a collective whose other side is gone."""

        def leave() -> None:
            print(told, file=sys.stderr, flush=True)
            os._exit(REQUEUE)

        if self.device.type == "cuda":
            timer = threading.Timer(LEAVE_S, leave)
            timer.daemon = True
            timer.start()

    def watch(self, *modules: nn.Module) -> None:
        """Time the forward passes of these, and of no earlier ones: inside, not around what DDP makes of them, so
        without any waiting."""
        self._unwatch()
        cuda = self.device.type == "cuda"
        starts: list[Any] = []

        def before(*_: Any) -> None:
            starts.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
            if cuda:
                starts[-1].record()

        def after(*_: Any) -> None:
            start = starts.pop()
            if not cuda:
                self.times["compute"] += time.perf_counter() - start
                return
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self.forwards.append((start, end))

        for module in modules if self.world > 1 else ():
            self.hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _unwatch(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.forwards = [], []

    def _read_events(self) -> None:
        """Add the forward passes that a GPU is through with; the host does not wait for the others."""
        while self.forwards and self.forwards[0][1].query():
            start, end = self.forwards.pop(0)
            self.times["compute"] += start.elapsed_time(end) / 1000

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Where this process is, for the others; the time counts if `name` is one of PHASES."""
        before, start = self.beats and self.beats.phase, time.perf_counter()
        if self.beats:
            self.beats.phase = name
        try:
            yield
        finally:
            if name in self.times:
                self.times[name] += time.perf_counter() - start
            if self.beats:
                self.beats.phase = before
            self.finished = time.monotonic()

    def waited_for(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; the time until each comes is phase `data`, that until the next one is asked for, `compute`."""
        self.began = self.finished = time.monotonic()  # whatever came before was no step
        self._forget_stop()
        self.stops.deferred, waiting = True, iter(batches)
        if self.beats:
            self.beats.phase = "compute"
        while True:
            try:
                with self.phase("data"):
                    batch = next(waiting)
            except StopIteration:
                return
            yield batch

    def stop_after(self, step: int) -> bool:
        """`step` is done. Whether it was the last one before a stop: the same answer on all processes."""
        now = time.monotonic()
        self.step, self.finished = step, now
        if self.world == 1:
            self.cause = (0, self.stops.asked) if self.stops.asked else None
            return self.cause is not None
        self._read_events()
        self.beats.step = step
        times = [self.times[phase] for phase in PHASES]
        row = torch.tensor([self.stops.asked, *times, now - self.began], dtype=torch.float64)
        self.began, self.times = now, dict.fromkeys(PHASES, 0.0)
        if self._read_exchange():
            return True
        rows = [torch.empty_like(row) for _ in range(self.world)]
        self.pending = dist.all_gather(rows, row, group=self.group, async_op=True), rows
        return False

    def _read_exchange(self) -> bool:
        """Read the exchange that is under way, if any, and tell who is slow; whether somebody was asked to stop."""
        if self.pending is None:
            return False
        (work, gathered), self.pending = self.pending, None
        work.wait()
        rows = torch.stack(gathered)
        for told in self.slowness.see(rows[:, 1:]):
            if self.main:
                print(f"warning: step {self.step}: {told}", file=sys.stderr, flush=True)
        asked = [(rank, number) for rank, number in enumerate(rows[:, 0].int().tolist()) if number]
        self.cause = asked[0] if asked else None
        return self.cause is not None

    def stopped(self) -> Exit:
        """After `stop_after` said so and this process has saved what it saves: waits for the others; what to raise."""
        assert self.cause is not None
        if self.world > 1:
            dist.barrier(group=self.group)
        rank, name = self.cause[0], signal.Signals(self.cause[1]).name
        where = f"rank {rank} on {self.slowness.hosts[rank]}" if self.world > 1 else f"process {os.getpid()}"
        if self.main:
            self._note({"signal": name, "rank": rank, "where": where})
        text = f"stopped after step {self.step} by {name} to {where}; its state is saved, the same command goes on"
        return Exit(text, REQUEUE)

    def done(self) -> None:
        """The training is over, its last state saved: steps are not waited for any more, and a signal ends the process.

        Raises what `stopped` and a signal raise, if one came in the last steps.
        """
        if self._read_exchange():
            raise self.stopped()
        self._forget_stop()
        if self.beats:
            self.ended.set()
        self.stops.deferred = False
        if self.stops.asked:
            raise self.stops.ended()

    def _watch(self) -> None:
        """Give up when no step is finished for too long: no collective of NCCL does that by itself."""
        while not self.ended.wait(min(1.0, self.config.timeout_s / 10)):
            if not self._late():
                continue
            missing = self.beats.missing()
            gone, alive = missing.gone, missing.alive
            if not gone and any(sign.phase == EVALUATION for sign in alive):
                self.finished = time.monotonic()  # the others get their whole time when it is over
            elif self._late() and not self.ended.is_set():
                why = f"no step for {self.config.timeout_s:g} s: "
                print(self._lost(gone or [_behind(alive)], missing, why), file=sys.stderr, flush=True)
                os._exit(REQUEUE)  # the thread that trains waits in a call that nothing else ends

    def _late(self) -> bool:
        return self.stops.deferred and time.monotonic() - self.finished > self.config.timeout_s


def _behind(alive: list[Sign]) -> str:
    """Who is the furthest behind of processes that live."""
    order = {"start": 0, "data": 1, "compute": 2, "checkpoint": 3}
    places = [(sign.step, order.get(sign.phase, 2)) for sign in alive]
    behind = [sign for sign, place in zip(alive, places, strict=True) if place == min(places)]
    if len(behind) == len(alive):
        return f"all processes live and wait {alive[0].place}: look at the network"
    return "; ".join(f"{sign} lives and is behind the others, {sign.place}" for sign in behind)
