"""What a fine-tune tells while it runs: the progress bar and the lines of metrics.jsonl."""

from collections.abc import Mapping

import numpy as np
import torch
from accelerate import Accelerator

from recipes.errors import UserError
from recipes.progress import Meter
from recipes.record import RunFolder


class Journal:
    """One line every `every` steps, and the progress of all processes."""

    def __init__(self, folder: RunFolder, accelerator: Accelerator, meter: Meter, every: int):
        self.folder, self.accelerator, self.meter, self.every = folder, accelerator, meter, every

    def record(self, step: int, epoch: float, losses: Mapping[str, torch.Tensor], rate: float, last: bool) -> None:
        """Log the losses, averaged over the processes, when the step is due, and at the `last` step of an epoch, so
        that no state is saved whose loss is not finite. losses: "loss" first."""
        if step % self.every and not last:
            return
        stacked = torch.stack([value.detach().float() for value in losses.values()])
        means = self.accelerator.reduce(stacked, "mean").tolist()
        if not np.isfinite(means).all():
            raise UserError(f"step {step}: the loss is not finite; lower optim.lr (now {rate:.2g}) or set precision=no")
        self.folder.log({"step": step, "epoch": epoch, "lr": rate, **dict(zip(losses, means, strict=True))})
        self.meter.advance(0, f"loss {means[0]:.3f}")
