"""Where a forked run dies: it is told before its script starts. See forked.py.

An operation is what a save does to the disk: `save` the tensors, `fsync`, `rename`, `rmtree`, of paths in a run's
checkpoints, teachers or models. `arm` numbers those that follow a certain `save`, writes them down, and ends the whole
group of processes with SIGKILL at one of them.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain import committed

KEPT = ("checkpoints", "teachers", "teacher", "model", "best")  # folders of a run that saves go to


def _kept(path: Path) -> bool:
    """Whether a save owns the path, by the names of hidden folders as well."""
    return any(part.lstrip(".").partition(".")[0] in KEPT for part in path.parts[-3:])


def _die() -> None:
    os.killpg(0, signal.SIGKILL)
    signal.pause()  # until it arrives


class Points:
    """Counts operations and dies at one of them."""

    def __init__(self, file: str, begin: int | str, number: int, when: str):
        self.file, self.begin, self.number, self.when = file, begin, number, when
        self.saves, self.counted = 0, -1  # saves so far; the last operation, -1 before the first that counts

    def around(self, kind: str, path: Path, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Do `act`, an operation on `path`. half: leaves it half done."""
        if not _kept(path):
            return act()
        if kind == "save":
            self.saves += 1
        if self.counted < 0:
            named = isinstance(self.begin, str) and self.begin in str(path)
            if kind != "save" or not (named or self.saves == self.begin):
                return act()
        self.counted += 1
        with open(self.file, "a") as file:
            file.write(f"{self.counted} {kind} {path.parent.name}/{path.name}\n")
        here = self.counted == self.number
        if here and self.when == "half" and half is not None:
            half()
            _die()
        if here and self.when == "before":
            _die()
        done = act()
        if here:
            _die()
        return done


def arm(file: str, begin: int | str, number: int = -1, when: str = "before") -> None:
    """Die at operation `number`, counted from 0; -1: only write the operations to `file`.

    begin: the `save` that is operation 0: the n-th of this process, or the first whose path contains a text. when:
    "before", "after", or "half", where half of a file is written.
    """
    points = Points(file, begin, number, when)
    fsync, rename, rmtree, save = os.fsync, Path.rename, shutil.rmtree, committed.save_file

    def saving(tensors: Any, path: Path, *more: Any) -> None:
        def half() -> None:
            save(tensors, path, *more)
            os.truncate(path, os.path.getsize(path) // 2)

        points.around("save", Path(path), lambda: save(tensors, path, *more), half)

    def removing(path: Any, *more: Any, **named: Any) -> None:
        if not Path(path).is_dir():
            return rmtree(path, *more, **named)

        def half() -> None:
            os.unlink(next(entry.path for entry in os.scandir(path)))

        return points.around("rmtree", Path(path), lambda: rmtree(path, *more, **named), half)

    def syncing(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        points.around("fsync", path, lambda: fsync(handle))

    committed.save_file, shutil.rmtree, os.fsync = saving, removing, syncing
    Path.rename = lambda path, target: points.around("rename", path, lambda: rename(path, target))
