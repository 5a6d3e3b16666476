"""Files that grow by whole pieces, lines of JSON mostly, and survive a kill, a power cut and a full disk.

A piece that the disk does not take waits in memory and is written with the next one that it takes, so a disk that is
full for an hour costs no number. Only one process may write.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from recipes.errors import UserError, disk_sentence, naming
from recipes.whole import write_text


class Appended:
    """Appends to `path`, which is made where there is none."""

    def __init__(self, path: Path, durable: bool = True):
        """durable: each piece shall be there after a power cut."""
        self.path, self.durable = path, durable
        self.waiting: list[bytes] = []
        self.end: int | None = None  # size of the file by what was written here; what lies behind is half a piece

    def add(self, piece: bytes) -> None:
        """Append a piece. It is in the file when this returns, or waits and the user is told once.

        UserError where the folder has vanished.
        """
        outage = bool(self.waiting)
        self.waiting.append(piece)
        try:
            self.flush()
        except OSError as error:
            if disk_sentence(error) is None:
                raise
            if not outage:
                print(
                    f"warning: {self.path} cannot be written ({error.strerror}); what belongs there waits in memory",
                    file=sys.stderr,
                    flush=True,
                )
        else:
            if outage:
                print(f"{self.path} can be written again, nothing is missing there", file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Write what waits; OSError where it goes on waiting."""
        if not self.waiting:
            return
        try:
            with naming(self.path):
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    self._write(descriptor, b"".join(self.waiting))
                finally:
                    os.close(descriptor)
        except FileNotFoundError as error:
            raise UserError(f"{self.path.parent} has vanished while it was being written to") from error
        self.waiting.clear()

    def _write(self, descriptor: int, data: bytes) -> None:
        """All of the data or nothing."""
        size = os.fstat(descriptor).st_size
        end = size if self.end is None else min(size, self.end)
        try:
            os.ftruncate(descriptor, end)
            rest, at = memoryview(data), end
            while rest:
                written = os.pwrite(descriptor, rest, at)
                rest, at = rest[written:], at + written
            if self.durable:
                os.fsync(descriptor)
        except OSError:
            self.end = end
            with contextlib.suppress(OSError):  # then it is cut off before the next writing
                os.ftruncate(descriptor, end)
            raise
        self.end = at

    def close(self) -> None:
        """Write what still waits; UserError where the disk does not take it."""
        try:
            self.flush()
        except OSError as error:
            raise UserError(
                f"{len(self.waiting)} entries of {self.path} could not be written ({error.strerror}); make room, then "
                "run the same command again"
            ) from error


class Lines(Appended):
    """The lines of a JSON Lines file."""

    def keep(self, last: float) -> None:
        """Keep the lines with step <= last and those without a step; a half-written last line goes."""
        self.waiting = [line for line in self.waiting if self._stays(line, last, f"a line for {self.path}")]
        self.end = None
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        *lines, _ = data.split(b"\n")  # what has no end was being written when the process was killed
        numbered = enumerate(lines, start=1)
        kept = b"".join(
            line + b"\n" for number, line in numbered if self._stays(line, last, f"{self.path} line {number}")
        )
        if kept == data:
            return
        if data.startswith(kept):  # mostly so; it needs no room on the disk and cannot be half done
            with naming(self.path), open(self.path, "r+b") as file:
                file.truncate(len(kept))
                os.fsync(file.fileno())
        else:
            write_text(self.path, kept.decode())

    @staticmethod
    def _stays(line: bytes, last: float, told: str) -> bool:
        try:
            step = json.loads(line).get("step")
            return step is None or step <= last
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{told} is not a JSON object; mend or remove that line") from error
