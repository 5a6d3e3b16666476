"""Work spread over processes: results in the order of the tasks, and never more than a few tasks in memory."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import TypeVar

from recipes.errors import UserError

T, R = TypeVar("T"), TypeVar("R")
AHEAD = 4  # tasks a process that are handed out before their turn


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle; a process whose parent was killed ends itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "only called in a child"

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def spread(work: Callable[[T], R], tasks: Iterable[T], workers: int | None, alone: int = 1) -> Iterator[R]:
    """`work(task)` of every task, in order.

    work: of module level, or a partial of such. workers: processes, None = one a core; 0 and 1 = in this one. alone:
    so many tasks one process does sooner than others have started. UserError if a process dies.
    """
    workers = cores() if workers is None else workers
    waiting = iter(tasks)
    first = list(islice(waiting, alone + 1))
    if workers <= 1 or len(first) <= alone:
        yield from map(work, chain(first, waiting))
        return
    waiting = chain(first, waiting)
    context = multiprocessing.get_context("spawn")  # forking a process with threads (progress bar, torch) may hang
    pool = ProcessPoolExecutor(workers, context, _start_worker)
    running: deque[Future[R]] = deque()
    try:
        while True:
            for task in islice(waiting, AHEAD * workers - len(running)):
                running.append(pool.submit(work, task))
            if not running:
                return
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a process died (out of memory?); try again with fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
