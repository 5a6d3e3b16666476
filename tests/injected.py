"""Values that are not finite, or too large, put into a pretraining at certain places; and what it makes of them.

`arm`, `spoil` and `note` are called before the script starts: in a fork (forked.py), or here with monkeypatch.setattr.
"""

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pretrain import checkpoint, committed, gaps, losses, student_teacher
from pretrain.batch import Batch
from pretrain.gaps import Gaps
from pretrain.journal import Journal
from pretrain.keeping import Keeper
from pretrain.losses import Guessed, Logits
from pretrain.student_teacher import Seen, Student, Teacher

Patch = Callable[[Any, str, Any], None]
# where a value becomes nan or inf, and what the line of that step must call not finite
ALL = ["loss", "loss_cls", "loss_patch", "grad_norm"]
PLACES = {
    "loss": ALL,
    "gradient": ["grad_norm"],  # the loss stays finite
    "teacher": ALL,
    "patches without a mask": ["teacher"],  # they enter the centre of the teacher, and not the loss
    "one image": [*ALL, "teacher"],
}
IMAGE = 5  # of the batch


def rank() -> int:
    """Of this process."""
    return int(os.environ.get("RANK", "0"))


class Steps:
    """Which step a call belongs to, by counting the batches that come."""

    def __init__(self, bad: Iterable[int], patch: Patch):
        self.bad, self.step, begun = set(bad), -1, Journal.waited_for
        steps = self

        def waited_for(journal: Journal, *given: Any) -> Any:
            steps.step = journal.step
            yield from begun(journal, *given)

        patch(Journal, "waited_for", waited_for)

    @property
    def now(self) -> bool:
        """Whether this step is to be spoilt."""
        return self.step in self.bad


def arm(place: str, steps: list[int], ranks: tuple[int, ...] = (0, 1), patch: Patch = setattr) -> None:
    """Make a value at `place` (of PLACES) not finite in these steps, on these processes."""
    at = Steps(steps if rank() in ranks else (), patch)
    named, teach, scaled = losses.named_losses, Teacher.forward, student_teacher.normalize

    def named_losses(*given: Any) -> dict[str, Tensor]:
        found = named(*given)
        if at.now and place == "loss":
            return {name: value * torch.nan for name, value in found.items()}
        if at.now and place == "gradient":
            found["loss"].register_hook(lambda slope: slope * torch.inf)
        return found

    def forward(teacher: Teacher, batch: Batch) -> Seen:
        seen = teach(teacher, batch)
        if at.now and place == "patches without a mask":
            return seen._replace(patch_mean=seen.patch_mean * torch.nan)
        if at.now and place == "teacher":
            return seen._replace(logits=Logits(*(part * torch.nan for part in seen.logits)))
        return seen

    def normalize(*given: Any) -> Tensor:
        images = scaled(*given)
        if at.now and place == "one image":
            images[IMAGE] = torch.nan
        return images

    assert place in PLACES
    patch(losses, "named_losses", named_losses)
    patch(Teacher, "forward", forward)
    patch(student_teacher, "normalize", normalize)


def spoil(batches: list[list[int]], factor: float, patch: Patch = setattr) -> None:
    """Multiply the student's logits for CLS where a batch holds rows of one of these lists: the loss and the gradient
    become large, and stay finite."""
    bad, real = [set(rows) for rows in batches], Student.forward

    def forward(student: Student, batch: Batch) -> Guessed:
        guessed, rows = real(student, batch), set(batch.rows.tolist())
        return guessed._replace(cls=guessed.cls * factor) if any(rows <= each for each in bad) else guessed

    patch(Student, "forward", forward)


def leave_out(spans: list[list[int]]) -> None:
    """These batches were left out before the first step, whatever the run folder tells."""
    known = Gaps([{"batches": span} for span in spans])
    Gaps.read = staticmethod(lambda out: known)


def die_in_roll_back(call: int) -> None:
    """SIGKILL on the main process in its first roll-back: 0 before states are deleted, 1 between that and the list of
    what is left out, 2 after it is written."""
    real, parts = gaps.roll_back, [(committed, "discard", 0), (Gaps, "write", 1), (gaps, "_on_main", 2)]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def roll_back(*given: Any) -> None:
        owner, name, number = parts[call]
        act = getattr(owner, name)

        def acting(*inner: Any) -> Any:
            if number < 2:
                die()
            act(*inner)
            die()

        setattr(owner, name, acting)
        real(*given)

    if rank() == 0:
        gaps.roll_back = roll_back


def states(show: Callable[[int, dict[str, Tensor]], None], patch: Patch = setattr) -> None:
    """Call `show` with the number of steps done and the whole state after each, but for the count of skipped steps."""
    real = Keeper.after

    def after(keeper: Keeper, step: int, modules: dict, optimizer: torch.optim.Optimizer, *given: Any) -> None:
        kept = {name: module for name, module in modules.items() if name != "skipped"}
        show(step, checkpoint.state_tensors(kept, (modules["student"], [optimizer])))
        real(keeper, step, modules, optimizer, *given)

    patch(Keeper, "after", after)


def note(file: str) -> None:
    """Append a line after each step: a hash of all bits of each part of the state; one file a process."""

    def show(step: int, tensors: dict[str, Tensor]) -> None:
        parts: dict[str, Any] = {}
        for name in sorted(tensors):
            digest = parts.setdefault(name.partition(".")[0], hashlib.sha256())
            digest.update(tensors[name].numpy().tobytes())
        sums = {part: digest.hexdigest() for part, digest in parts.items()}
        with open(f"{file}{rank()}", "a") as lines:
            lines.write(json.dumps({"step": step - 1, "sums": sums}) + "\n")

    states(show)
