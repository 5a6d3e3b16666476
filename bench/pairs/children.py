"""Objects that live in processes of their own and are asked over a pipe.

Two ways of doing the same work in one process share its allocator: the second finds the memory of the first, and the
peak is that of both. Here each way has a process, which does nothing while the other is asked.
"""

import contextlib
import gc
import multiprocessing
import resource
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# OpenMP's threads look for more work for a while before they sleep: GNU's some ms, Intel's 0.2 s
SETTLE_S = 0.25


def memory_mb(field: str) -> float:
    """MiB of this process. field: "VmHWM" the most that was resident so far, "VmRSS" what is now.

    Not ru_maxrss, which on Linux begins with what the parent had.
    """
    status = Path("/proc/self/status")
    if not status.is_file():  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 1024)
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def _serve(pipe: Connection, method: str, build: Callable[..., Any], given: tuple) -> None:
    """The child: build the object, then answer until the pipe closes."""
    # a spawned process would spawn its own, too, and a loader's workers would import torch anew at every start
    multiprocessing.set_start_method(method, force=True)
    try:
        thing = build(*given)
        pipe.send((True, None))
        while True:
            name, arguments = pipe.recv()
            pipe.send((True, getattr(thing, name)(*arguments)))
            gc.collect()  # between the questions, not while the clock runs
    except EOFError:
        return
    except Exception:
        with contextlib.suppress(BrokenPipeError):
            pipe.send((False, traceback.format_exc()))


class Child:
    """`build(*given)` in a fresh process; `ask` calls its methods. build and given must be picklable."""

    def __init__(self, what: str, build: Callable[..., Any], *given: Any):
        """what: for messages. Returns at once; the first `ask` waits until the child is ready."""
        self.what, self.ready = what, False
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        # no daemon, which could not start the workers of a loader: use a Child in `with`, else it outlives its user
        self.process = context.Process(target=_serve, args=(other, multiprocessing.get_start_method(), build, given))
        self.process.start()
        other.close()

    def wait(self) -> None:
        """Until the object is built."""
        if not self.ready:
            self._answer()
            self.ready = True

    def ask(self, name: str, *arguments: Any) -> Any:
        """What the method returns there. RuntimeError with its traceback if it raised, or if the process died."""
        self.wait()
        time.sleep(SETTLE_S)
        self.pipe.send((name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            good, answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            more = "; it was killed, perhaps for want of memory" if code == -9 else ""
            raise RuntimeError(f"the process of {self.what} ended with exit code {code}{more}") from None
        if not good:
            raise RuntimeError(f"in the process of {self.what}:\n{answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
