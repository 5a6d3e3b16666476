"""Pictures of what the teacher sees while it learns: of the same images, each time that one of its snapshots is kept.

They go to OUT/pictures/epoch-<epochs> and to TensorBoard, the matching accuracy also into metrics.jsonl. Nothing of the
training changes by it: the images and views are a function of the seed, and the teacher is only looked at.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from accelerate import Accelerator
from pydantic import Field

from pretrain import comparing, looking
from pretrain.backbone import Backbone
from pretrain.chosen_crops import of_reader, shuffled, sound
from pretrain.grids import encoded, write_file
from pretrain.looking import Eye, Seen
from pretrain.packing import run_block
from pretrain.photometric import PhotometricConfig
from pretrain.scalars import Scalars
from pretrain.student_teacher import Teacher
from pretrain.views import ViewsConfig
from recipes.errors import UserError, disk_sentence
from recipes.load import Section
from recipes.whole import write_json
from shards.reader import ShardReader

Phase = Callable[[str], contextlib.AbstractContextManager]
FOLDER = "pictures"  # of the run folder
LOGGED = ("matching_accuracy", "matching_near")  # in metrics.jsonl


class PicturesConfig(Section):
    """What the teacher sees, drawn whenever a teacher is exported that is kept for ever, and at the end."""

    images: int = Field(6, ge=0, le=64)  # of the training set that are drawn; 0: no pictures, no matching accuracy
    matched: int = Field(32, ge=1, le=4096)  # images on which the matching accuracy is counted


class Recipe(Protocol):
    """The sections that are read here."""

    seed: int
    views: ViewsConfig
    photometric: PhotometricConfig
    pictures: PicturesConfig


@contextlib.contextmanager
def still(backbone: Backbone) -> Iterator[None]:
    """Without batch statistics, and not compiled: the shapes here would be compiled anew. As before afterwards."""
    modes, block = {module: module.training for module in backbone.modules()}, backbone.run_block
    backbone.eval()
    backbone.run_block = run_block
    try:
        yield
    finally:
        backbone.run_block = block
        for module, mode in modes.items():
            module.training = mode


class Showing:
    """Draws on the main process; the others learn only which steps are drawn."""

    def __init__(
        self,
        out: Path,
        config: Recipe,
        snapshot: Callable[[int], str | None],
        reader: ShardReader,
        accelerator: Accelerator,
        phase: Phase = contextlib.nullcontext,
    ):
        """snapshot: name of the snapshot of the teacher that is kept after so many steps; None where none is. phase:
        `with phase("pictures"):` tells the other processes, who wait, what this one does."""
        self.out, self.config, self.snapshot, self.accelerator = out / FOLDER, config, snapshot, accelerator
        self.reader, self.phase = reader, phase

    def due(self, step: int) -> bool:
        """Whether there will be pictures after `step` steps; the same on all processes."""
        return self.config.pictures.images > 0 and self.snapshot(step) is not None

    def after(self, step: int, teacher: Teacher) -> dict[str, float]:
        """`step` steps are done. Draws if that is due; returns the numbers for metrics.jsonl then, else {}.

        Images that cannot be read and a disk that refuses cost the pictures and a warning, never the run.
        """
        if not (self.due(step) and self.accelerator.is_main_process):
            return {}
        numbers: dict[str, float] = {}
        try:
            with self.phase(FOLDER):  # not one that slowness.py compares: it comes now and then, and on one process
                seen = self._look(teacher.backbone)
                numbers = {name: seen["correspondence"].numbers[name] for name in LOGGED}
                self._write(step, seen)
        except UserError as error:
            self._warn(step, str(error))
        except OSError as error:
            if (told := disk_sentence(error)) is None:
                raise
            self._warn(step, told)
        return numbers

    @staticmethod
    def _warn(step: int, told: str) -> None:
        print(f"warning: no pictures after step {step}: {told}; the run goes on", file=sys.stderr, flush=True)

    def _images(self) -> dict[int, np.ndarray]:
        """The same ones each time, by row. They are read each time, nothing has to be kept for it."""
        crops = of_reader(self.reader, "the training set", labels=False)
        count = max(self.config.pictures.images, self.config.pictures.matched)
        try:
            return sound(crops, shuffled(crops, count, self.config.seed), count)
        finally:
            self.reader.close()  # what reads in this process opens its files again, and workers have their own

    def _look(self, backbone: Backbone) -> dict[str, Seen]:
        """The pictures by their names."""
        pictures, images = self.config.pictures, self._images()
        photometric, size = self.config.photometric, self.config.views.global_size
        eye = Eye(backbone, photometric.mean, photometric.std, size)
        drawn, matched = (dict(list(images.items())[:count]) for count in (pictures.images, pictures.matched))
        with still(backbone):
            looked = eye.look_at(drawn)
            return {
                "attention": looking.attention(looked),
                "components": looking.components(looked),
                "correspondence": comparing.correspondence(eye, matched, pictures.images, self.config.seed),
            }

    def _write(self, step: int, seen: dict[str, Seen]) -> None:
        folder = self.out / str(self.snapshot(step))
        files = {kind: encoded(each.image) for kind, each in seen.items()}
        for kind, data in files.items():
            write_file(folder / f"{kind}.png", data)
        write_json(folder / "numbers.json", {kind: s.numbers | {"sentence": s.sentence} for kind, s in seen.items()})
        for tracker in self.accelerator.trackers:
            if isinstance(tracker, Scalars):
                tracker.log_images({f"{FOLDER}/{kind}": data for kind, data in files.items()}, step=step - 1)
