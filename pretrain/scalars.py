"""The numbers of a run as TensorBoard reads them; a full disk delays them and does not end the run.

TensorBoard's own writer dies in its thread when the disk refuses, and takes the training with it at the next call.
"""

import contextlib
import io
import os
import socket
import struct
import time
from pathlib import Path

from accelerate.tracking import GeneralTracker, on_main_process
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from recipes.lines import Appended

VERSION = "brain.Event:2"  # of the format; the first record tells it
RGB = 3  # TensorBoard's number for three channels


def _record(event: Event) -> bytes:
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


class Scalars(GeneralTracker):
    """A tracker for `Accelerator(log_with=...)`: one event file a launch."""

    name, requires_logging_directory = "scalars", False

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = Path(folder)
        self.file: Appended | None = None

    @property
    def tracker(self) -> Appended | None:
        """What writes; None before the first values."""
        return self.file

    def _begin(self) -> Appended:
        now = time.time()
        self.folder.mkdir(parents=True, exist_ok=True)
        # the names are read in their order, also those of two launches within a second
        name = f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        file = Appended(self.folder / name, durable=False)
        file.add(_record(Event(wall_time=now, file_version=VERSION)))
        return file

    @on_main_process
    def start(self) -> None:
        """The run begins."""
        self.file = self._begin()

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
        """One point on the curve of each name."""
        self._add([Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()], step)

    def _add(self, points: list[Summary.Value], step: int | None) -> None:
        self.file = self.file or self._begin()
        self.file.add(_record(Event(wall_time=time.time(), step=step or 0, summary=Summary(value=points))))

    @on_main_process
    def log_images(self, values: dict[str, bytes], step: int | None = None, **_: object) -> None:
        """Pictures by their names, each as a whole PNG file."""
        points = []
        for name, data in values.items():
            width, height = struct.unpack(">II", data[16:24])  # of the header that opens every PNG
            picture = Summary.Image(height=height, width=width, colorspace=RGB, encoded_image_string=data)
            points.append(Summary.Value(tag=name, image=picture))
        self._add(points, step)

    @on_main_process
    def finish(self) -> None:
        """Write what waits. What the disk still refuses is in metrics.jsonl as well, which insists."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.flush()
