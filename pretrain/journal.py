"""What a run tells while it goes: progress on the screen, metrics.jsonl, trackers."""

import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from pretrain.batch import Batch
from recipes.errors import UserError
from recipes.progress import Meter
from recipes.record import RunFolder


class BadSamples:
    """Counts the damaged samples that were replaced, and stops a run that meets too many.

    The share is taken of the samples since the start of this process, and of an epoch at least.
    """

    def __init__(self, most: float, epoch: int):
        """most: share in 0..1. epoch: samples of an epoch."""
        self.most, self.epoch, self.found, self.seen = most, epoch, 0, 0

    def add(self, found: int, seen: int) -> None:
        """Count a step over all processes. UserError above the share."""
        self.found, self.seen = self.found + found, self.seen + seen
        if self.found > self.most * max(self.seen, self.epoch):
            raise UserError(
                f"{self.found} damaged samples among {self.seen}: more than loader.max_bad = {self.most} of the "
                f"{max(self.seen, self.epoch)} allowed for; see which with shards/check.py, or raise loader.max_bad"
            )


class Journal:
    """Collects the values of a step and writes every `every`-th one. Rates are means since the last written step."""

    def __init__(
        self, folder: RunFolder, accelerator: Accelerator, meter: Meter, every: tuple[int, int], bad: BadSamples
    ):
        """every: steps between two lines, images of a (global) step."""
        self.folder, self.accelerator, self.meter = folder, accelerator, meter
        (self.every, self.batch), self.bad = every, bad
        self.replaced = 0
        self.since, self.steps, self.waited = time.monotonic(), 0, 0.0
        self.losses: dict[str, Tensor] = {}
        self.health: dict[str, Tensor] = {}

    def waited_for(self, batches: Iterator[Batch], accumulation: int) -> Iterator[Batch]:
        """The next `accumulation` micro-batches on the device; the time until each arrives counts as waiting."""
        self.losses, self.health, self.replaced = {}, {}, 0
        for _ in range(accumulation):
            start = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - start
            self.replaced += int((batch.replaced >= 0).sum())  # on the host, before the batch goes to the device
            yield batch.to(self.accelerator.device)

    def collect(self, losses: dict[str, Tensor], health: dict[str, Tensor], share: float) -> None:
        """Add the values of a micro-batch that makes up `share` of the step."""
        for sums, values in ((self.losses, losses), (self.health, health)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach() * share

    def check(self, step: int) -> None:
        """Average over the processes; stop all of them when a loss is not finite or too many samples are damaged."""
        names = sorted(self.losses)
        replaced = torch.tensor(float(self.replaced), device=self.accelerator.device)
        means = self.accelerator.reduce(torch.stack([*(self.losses[name] for name in names), replaced]), "mean")
        *_, bad = means.tolist()
        self.bad.add(round(bad * self.accelerator.num_processes), self.batch)
        means = means[:-1]
        self.losses = dict(zip(names, means.unbind(), strict=True))
        if not torch.isfinite(means).all():
            found = ", ".join(f"{name} = {float(value)}" for name, value in self.losses.items())
            raise UserError(
                f"step {step}: the loss is not finite ({found}); lower schedules.lr, set heads.norm_last_layer=true or "
                "schedules.teacher_temperature=0.04, and start the run again"
            )

    def record(self, step: int, values: dict[str, float | Tensor]) -> None:
        """End of step `step`, counted from 0. values: of this process, beside the collected ones."""
        self.steps += 1
        note = ""
        if step % self.every == 0:
            now = time.monotonic()
            seconds = max(now - self.since, 1e-9)
            line = {"step": step, "samples": (step + 1) * self.batch}
            line |= {name: float(value) for name, value in {**self.losses, **values, **self.health}.items()}
            line |= {"bad_samples": self.bad.found}
            line |= {"images_per_s": self.steps * self.batch / seconds, "data_wait": self.waited / seconds}
            self.folder.log(line)
            self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)
            self.since, self.steps, self.waited = now, 0, 0.0
            note = f"loss {line['loss']:.4f}  data wait {line['data_wait']:.0%}"
        self.meter.advance(self.batch, note)
