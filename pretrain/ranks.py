"""The processes of a run look after each other: one stop for all, and the slow and the lost ones named.

After each step the processes exchange a few numbers over a group of their own on the CPU, in the background: whether
somebody was asked to stop, and how long each waited and computed. What a step reads is the exchange of the step before,
so nobody waits for it and no device is asked, and all come to the same decision at the same step.
"""

import contextlib
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from pretrain.heartbeats import Heartbeats, Sign
from recipes.errors import Exit
from recipes.load import Section
from recipes.whole import write_json

T = TypeVar("T")
REQUEUE = 75  # EX_TEMPFAIL: stopped, not failed; the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = "stopped.json"
PHASES = ("data", "compute", "checkpoint")
EVALUATION = "evaluation"  # a phase that may take longer than any step


class RanksConfig(Section):
    """How the processes of a run look after each other."""

    timeout_s: float = Field(600.0, gt=0)  # without a finished step, after which a run of several processes is given up
    beat_s: float = Field(1.0, gt=0)  # seconds between two signs of life
    slow_share: float = Field(0.15, gt=0, le=1)  # of a step that a process may take longer than the others
    slow_steps: int = Field(10, ge=2)  # steps over which that is judged


class Slowness:
    """Which process holds up the others, from the times of the last steps."""

    def __init__(self, config: RanksConfig, hosts: list[str]):
        self.config, self.hosts = config, hosts
        self.seen: deque[Tensor] = deque(maxlen=config.slow_steps)
        self.ringing: set[tuple[int, str]] = set()

    def see(self, times: Tensor) -> list[str]:
        """times: float64 [R, 4], seconds of a step in each of PHASES and in all; returns sentences about who begins to
        be slow.

        A process is slow in a phase if its time there, a mean over the last steps without their longest one (a pause),
        is above the median of the others by a share of the step. The waiting for others, in the collectives of the
        backward, is in no phase, so the quick ones are not blamed.
        """
        self.seen.append(times)
        if len(self.seen) < self.config.slow_steps:
            return []
        window = torch.stack(tuple(self.seen))  # [W, R, 4]
        mean = (window.sum(0) - window.amax(0)) / (len(window) - 1)
        step, told, now = float(mean[:, -1].max()), [], set()
        for column, phase in enumerate(PHASES):
            for rank, own in enumerate(mean[:, column].tolist()):
                others = statistics.median(float(t) for r, t in enumerate(mean[:, column]) if r != rank)
                if own - others > self.config.slow_share * step:
                    now.add((rank, phase))
                    if (rank, phase) not in self.ringing:
                        told.append(
                            f"rank {rank} on {self.hosts[rank]} is slow in phase {phase}: {own:.3g} s a step, the "
                            f"others {others:.3g} s, of steps of {step:.3g} s (docs/several_machines.md)"
                        )
        self.ringing = now
        return told


class Ranks:
    """`with Ranks(...) as ranks:` around the training. A collective that fails inside because another process is gone
    becomes an Exit that names it."""

    def __init__(self, config: RanksConfig, accelerator: Accelerator, out: Path):
        self.config, self.out = config, out
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.main, self.device = accelerator.is_main_process, accelerator.device
        self.asked = 0  # the signal that this process got
        self.training = False  # a state can be saved
        self.cause: tuple[int, int] | None = None  # rank and signal of the stop that all agreed on
        self.step, self.times = 0, dict.fromkeys(PHASES, 0.0)
        self.began = self.finished = time.monotonic()  # this step; the last one
        self.pending: tuple[Any, list[Tensor]] | None = None
        self.beats: Heartbeats | None = None
        self.forwards: list[Any] = []  # pairs of CUDA events that are not read yet
        self.hooks: list[Any] = []

    def __enter__(self) -> "Ranks":
        if self.main:
            (self.out / STOPPED).unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        if self.world > 1:
            self.beats = Heartbeats(self.rank, self.world, self.config.beat_s)
            self.beats.start()
            self.group = dist.new_group(backend="gloo")
            hosts: list[str] = [""] * self.world
            dist.all_gather_object(hosts, self.beats.host, group=self.group)
            self.slowness = Slowness(self.config, hosts)
            self.ended = threading.Event()
            self.watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.watchdog.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in getattr(self, "handlers", {}).items():
            signal.signal(number, handler)
        for hook in self.hooks:
            hook.remove()
        if self.beats is None:
            return
        self.ended.set()
        try:
            if isinstance(error, RuntimeError):
                gone, _ = self.beats.missing()
                if gone:
                    raise Exit(self._lost(gone), REQUEUE) from error
            elif self.pending and error is None:
                self.pending[0].wait()
        finally:
            self.beats.stop()

    def _lost(self, gone: list[str]) -> str:
        return (
            f"error: {'; '.join(gone)}. Rank {self.rank} stops; the same command goes on from the last checkpoint (a "
            "launcher with --max-restarts does it by itself)"
        )

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if not self.training:  # nothing to save yet, or no longer
            raise Exit(f"stopped by {signal.Signals(number).name}; the same command goes on", REQUEUE)
        self.asked = number

    def watch(self, *modules: nn.Module) -> None:
        """Time the forward passes of these: inside, not around what DDP makes of them, so without any waiting."""
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
        self.training, waiting = True, iter(batches)
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
            self.cause = (0, self.asked) if self.asked else None
            return self.cause is not None
        self._read_events()
        self.beats.step = step
        row = torch.tensor(
            [self.asked, *(self.times[phase] for phase in PHASES), now - self.began], dtype=torch.float64
        )
        self.began, self.times = now, dict.fromkeys(PHASES, 0.0)
        if self.pending:
            self.pending[0].wait()
            rows = torch.stack(self.pending[1])
            for told in self.slowness.see(rows[:, 1:]):
                if self.main:
                    print(f"warning: step {step}: {told}", file=sys.stderr, flush=True)
            for rank, number in enumerate(rows[:, 0].int().tolist()):
                if number:
                    self.pending, self.cause = None, (rank, number)
                    return True
        rows = [torch.empty_like(row) for _ in range(self.world)]
        self.pending = dist.all_gather(rows, row, group=self.group, async_op=True), rows
        return False

    def stopped(self) -> Exit:
        """After `stop_after` said so and this process has saved what it saves: waits for the others; what to raise."""
        assert self.cause is not None
        if self.world > 1:
            dist.barrier(group=self.group)
        rank, name = self.cause[0], signal.Signals(self.cause[1]).name
        where = f"rank {rank} on {self.slowness.hosts[rank]}" if self.world > 1 else f"process {os.getpid()}"
        if self.main:
            told = {"signal": name, "rank": rank, "where": where, "step": self.step}
            write_json(self.out / STOPPED, {**told, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        text = f"stopped after step {self.step} by {name} to {where}; its state is saved, the same command goes on"
        return Exit(text, REQUEUE)

    def done(self) -> None:
        """The training is over: a signal ends the process at once from here on, and steps are not waited for."""
        self.training = False
        if self.beats:
            if self.pending:
                self.pending[0].wait()
                self.pending = None
            self.ended.set()

    def _watch(self) -> None:
        """Give up when no step is finished for too long: no collective of NCCL does that by itself."""
        while not self.ended.wait(min(1.0, self.config.timeout_s / 10)):
            if not self.training or time.monotonic() - self.finished < self.config.timeout_s:
                continue
            gone, alive = self.beats.missing()
            if not gone and any(sign.phase == EVALUATION for sign in alive):
                continue
            if self.ended.is_set():
                return
            print(
                self._lost(gone or [_behind(alive)]).replace(
                    "error: ", f"error: no step for {self.config.timeout_s:g} s: "
                ),
                file=sys.stderr,
                flush=True,
            )
            os._exit(REQUEUE)  # the thread that trains waits in a call that nothing else ends


def _behind(alive: list[Sign]) -> str:
    """Who is the furthest behind of processes that live."""
    order = {"start": 0, "data": 1, "compute": 2, "checkpoint": 3}
    places = [(sign.step, order.get(sign.phase, 2)) for sign in alive]
    behind = [sign for sign, place in zip(alive, places, strict=True) if place == min(places)]
    if len(behind) == len(alive):
        return f"all processes live and wait {alive[0].place}: look at the network"
    return "; ".join(f"{sign} lives and is behind the others, {sign.place}" for sign in behind)
