"""Signs of life: each process of a run tells where it is, so that the others can say who is missing.

A thread writes step and phase into the store in which the processes of the launch met, which lives on the host of rank
0. Whoever wants to know reads twice: a sign that did not change meanwhile is of a process that is dead, stopped or cut
off. So no clocks of different hosts are compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

ENDED, FAILED = "ended", "failed"  # phases of a process that left, without and with an error
READ_S = 3.0  # seconds that the store may take to answer


class Sign(NamedTuple):
    """What a process told last."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    count: int  # signs so far

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    @property
    def place(self) -> str:
        """How far it was."""
        return f"at step {self.step}, phase {self.phase}"


class Missing(NamedTuple):
    """Who is there, and who is not."""

    gone: list[str]  # sentences about those without a sign of life, or that left with an error
    alive: list[Sign]  # the last signs of the others, without those that ended well
    failed: bool = False  # somebody told that it left with an error


class Heartbeats:
    """The signs of all processes of the launch. The thread runs between `start` and `stop`."""

    def __init__(self, rank: int, world: int, every_s: float):
        self.rank, self.world, self.every_s = rank, world, every_s
        self.host, self.step, self.phase, self.count = socket.gethostname(), 0, "start", 0
        # its own connections: no call of another thread is waited for. The launch (torchrun may restart within one
        # store) is in the name
        launch = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.stores = [dist.PrefixStore(f"life/{launch}", _get_default_store().clone()) for _ in range(2)]
        for store in self.stores:
            store.set_timeout(timedelta(seconds=READ_S))
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Tell the first sign, then one every `every_s` seconds."""
        self._tell()
        self.thread.start()

    def stop(self, failed: bool = False) -> None:
        """No more signs; this process leaves on its own, failed: with an error."""
        self.ending.set()
        self.thread.join(READ_S)
        self.phase = FAILED if failed else ENDED
        self._tell()

    def _run(self) -> None:
        while not self.ending.wait(self.every_s):
            self._tell()

    def _tell(self) -> None:
        self.count += 1
        sign = Sign(self.rank, self.host, os.getpid(), self.step, self.phase, self.count)
        try:
            self.stores[0].set(str(self.rank), json.dumps(sign))
        except RuntimeError:  # the store is gone with its host: whoever reads will say so
            self.ending.set()

    def _read(self) -> list[Sign | None]:
        """The newest sign of each rank, None of one that has told nothing. RuntimeError when the store is gone."""
        found: list[Sign | None] = []
        for rank in range(self.world):
            there = self.stores[1].check([str(rank)])
            found.append(Sign(*json.loads(self.stores[1].get(str(rank)))) if there else None)
        return found

    def _read_soon(self) -> list[Sign | None] | None:
        """`_read`, or None when the store is gone or does not answer in time: a host that was switched off does not
        even close its connections, and the store's own timeout is only for keys that are not there yet."""
        answer: list[list[Sign | None]] = []

        def read() -> None:
            with contextlib.suppress(RuntimeError):
                answer.append(self._read())

        reader = threading.Thread(target=read, name="life", daemon=True)
        reader.start()
        reader.join(READ_S)
        return answer[0] if answer else None

    def missing(self) -> Missing:
        """Who of all processes is gone or without a sign. Takes three beats, or READ_S where the store is gone."""
        after = before = self._read_soon()
        if before:
            time.sleep(3 * self.every_s)
            after = self._read_soon()
        if not after:
            return Missing(["rank 0, in whose process or on whose host the processes met, is gone"], [])
        gone, alive, failed = [], [], False
        for rank, (old, new) in enumerate(zip(before, after, strict=True)):
            if rank == self.rank:
                alive.append(new)
            elif new is None:
                gone.append(f"rank {rank} never gave a sign of life")
            elif new.phase == FAILED:
                gone.append(f"{new} left with an error after step {new.step}: its message says why")
                failed = True
            elif new.phase != ENDED and old is not None and old.count == new.count:
                gone.append(f"{new} gives no sign of life, the last was {new.place}")
            elif new.phase != ENDED:
                alive.append(new)
        return Missing(gone, alive, failed)
