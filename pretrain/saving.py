"""Writing to disk while the next steps run.

A save copies the tensors to the host's memory and returns; a thread writes them. The copy is kept between the saves, so
it takes the memory of one full state more. On a GPU the copies stand in the queue of the device before the next step,
so they hold what was there when the save was called, and the host does not wait for them.
"""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from recipes.errors import UserError

Job = Callable[[], None]


class Writer:
    """Runs the writing of saves, one after the other, in a thread if asynchronous.

    A disk that refuses is told on the screen and tried again with the next save; UserError after `max_failed` in a row.
    Every other error comes out of the next call.
    """

    def __init__(self, asynchronous: bool, max_failed: int):
        self.asynchronous, self.max_failed = asynchronous, max_failed
        self.buffers: dict[str, Tensor] = {}  # the host's copies, by the name of the tensor
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.title, self.needed = "", False  # of the save under way; whether the run cannot go on without it
        self.failed = 0  # in a row

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, in the host's memory; good until the next call. Waits for the save before."""
        self.wait()
        if not self.asynchronous:
            return dict(tensors)
        self._make_room(tensors)
        copies = {name: self.buffers[name] for name in tensors}
        with torch.no_grad():
            host = [name for name, tensor in tensors.items() if tensor.device.type == "cpu"]
            torch._foreach_copy_([copies[name] for name in host], [tensors[name].detach() for name in host])
            for name in tensors.keys() - set(host):
                copies[name].copy_(tensors[name].detach(), non_blocking=True)
        return copies

    def _make_room(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            have = self.buffers.get(name)
            if have is None or have.shape != tensor.shape or have.dtype != tensor.dtype:
                pinned = tensor.device.type == "cuda"  # else the host would wait for each copy
                self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Get the memory for `copy` of such tensors in the background: fresh memory takes longer than the copy."""
        if self.asynchronous and not self.busy:
            like = dict(tensors)

            def touch() -> None:
                self._make_room(like)
                for buffer in self.buffers.values():
                    buffer.zero_()

            self._start(touch)

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self.thread is not None and self.thread.is_alive()

    def submit(self, title: str, jobs: Sequence[Job], now: bool = False) -> None:
        """Run the jobs, in the background unless `now`; then no later save makes up for them, and a disk that refuses
        is a UserError. title: what is saved, for the errors.

        Their tensors come from `copy`, or nothing changes them until `wait`.
        """
        self.wait()
        self.title, self.needed = title, now
        done = _copied()

        def work() -> None:
            done()
            for job in jobs:
                job()

        if now or not self.asynchronous:
            self._guarded(work)
            self.wait()
        else:
            self._start(work)

    def _start(self, work: Job) -> None:
        # no daemon: an interpreter that ends waits until the state is in place
        self.thread = threading.Thread(target=self._guarded, args=(work,), name="checkpoint")
        self.thread.start()

    def _guarded(self, work: Job) -> None:
        try:
            work()
        except BaseException as error:  # it belongs to the thread that trains
            self.error = error

    def poll(self) -> None:
        """Tell what came of a save that has ended; costs nothing while one is under way."""
        if self.thread is not None and not self.thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the save under way is on disk, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error, title, self.title = self.error, None, self.title, ""
        if error is None:
            self.failed = 0 if title else self.failed
        elif isinstance(error, OSError):
            self._refused(error, title)
        else:
            raise error

    def _refused(self, error: OSError, title: str) -> None:
        self.failed += 1
        told = f"{title} could not be saved ({error.strerror or error}: {error.filename})"
        if self.needed or self.failed >= self.max_failed:
            times = "" if self.needed else f", the last of {self.failed} saves in a row that failed"
            raise UserError(
                f"{told}{times}; make room or mend the disk, then the same command goes on from the last checkpoint"
            ) from error
        print(
            f"warning: {told}; the checkpoints before are as they were. The run goes on and tries again at the next "
            f"save; it stops after {self.max_failed} in a row",
            file=sys.stderr,
            flush=True,
        )


def _copied() -> Callable[[], None]:
    """Waits until all that the current stream of a GPU has in its queue now is done; nothing without a GPU."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
