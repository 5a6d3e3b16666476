"""A request to stop, SIGTERM or SIGUSR1: noted while a state can be saved, an end with exit code 75 otherwise.

Launchers and job systems send it to all processes of a group, and torch's loader workers would die of it, and the
training process of their death, before it could save. So workers that are started inside the block leave it to their
parent.
"""

import os
import signal
import threading
from types import FrameType

from recipes.errors import Exit

REQUEUE = 75  # EX_TEMPFAIL: stopped, not failed; the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = "stopped.json"  # in the run folder, from a stop until the next start


class Stops:
    """`with Stops() as stops:` in the main thread; elsewhere signals cannot be caught, and stay as they were."""

    active: "Stops | None" = None  # of this process
    watching_forks = False

    def __init__(self) -> None:
        self.asked = 0  # the first signal that came
        self.deferred = False  # only noted in `asked`: somebody looks there, and a state is saved
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Stops":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
            if not Stops.watching_forks:  # for ever: it cannot be taken back
                os.register_at_fork(after_in_child=_leave_it_to_the_parent)
                Stops.watching_forks = True
            Stops.active = self
        return self

    def leave(self, for_good: bool = False) -> None:
        """The end of the block. After a signal, or for_good, the process is on its way out, and no signal cuts it."""
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.asked or for_good else handler)
        Stops.active = None

    def __exit__(self, *_: object) -> None:
        self.leave()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if not self.asked:  # a second one changes nothing, above all not the way out
            self.asked = number
            if not self.deferred:
                raise self.ended()

    def ended(self) -> Exit:
        """What to raise where nothing is to be saved."""
        return Exit(f"stopped by {signal.Signals(self.asked).name}; the same command goes on", REQUEUE)


def _leave_it_to_the_parent() -> None:
    """In a forked child: ignore these signals, unless they come from the parent or the parent is gone.

    SIG_IGN would not do: multiprocessing sends SIGTERM to workers at the end, and waits for them.
    """
    if Stops.active is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # also in the threads to come
        threading.Thread(target=_wait_for_the_parent, args=(os.getppid(),), name="stops", daemon=True).start()


def _wait_for_the_parent(parent: int) -> None:
    while True:
        sender = signal.sigwaitinfo(SIGNALS).si_pid
        if sender == parent or os.getppid() != parent:
            os._exit(0)
