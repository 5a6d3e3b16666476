"""Spikes of the loss, found on the device.

A step is an outlier if its loss is far above the mean of the accepted ones; some outliers in a row are a spike. What is
rejected, and what is not finite, never enters mean and deviation: there one bad value would hide the next, or make all
later ones look bad.
"""

import torch
from torch import Tensor, nn

from pretrain.health import HealthConfig, Spike

NEW_LEVEL = 100  # outliers in a row after which the loss is no spike, but has a new level


class RollBack(Exception):
    """The batches of the steps `first` to `last` shall be left out; raised on all processes at the same step."""

    def __init__(self, first: int, last: int, spike: Spike):
        super().__init__(first, last, spike)
        self.first, self.last, self.spike = first, last, spike


class Spikes(nn.Module):
    """Mean and deviation of the accepted losses, and the row of outliers; a part of the training state, on the device.

    All processes hold the same numbers, as they are shown the mean of the losses over all of them.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor
    row: Tensor
    first: Tensor
    peak: Tensor
    found: Tensor
    found_peak: Tensor
    regime: Tensor
    gaps: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("mean", "variance", "peak", "found_peak"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # accepted losses
        self.register_buffer("row", torch.zeros((), dtype=torch.int64))  # outliers without an accepted loss between
        self.register_buffer("first", torch.full((), -1))  # step of the first of the row
        self.register_buffer("found", torch.full((2,), -1))  # first and last step of a spike that is not told yet
        self.register_buffer("regime", torch.full((), -1))  # the highest so far
        self.register_buffer("gaps", torch.zeros((), dtype=torch.int64))  # roll-backs before this state

    @torch.no_grad()
    def see(self, step: int, loss: Tensor, finite: Tensor, regime: Tensor, config: HealthConfig) -> None:
        """The loss [] of a step, a mean over all processes; finite: bool [], whether the step was taken.

        regime: int64 [], rises where the schedules make the loss jump; the statistics begin anew then. Nothing is read
        from the device. mean and variance are exponential ones over spike_window steps, plain ones before.
        """
        rises = finite & (regime > self.regime)
        self.regime.copy_(torch.where(rises, regime, self.regime))
        new = rises | (self.row >= NEW_LEVEL)
        count = torch.where(new, 0, self.count)
        row = torch.where(new, 0, self.row)
        margin = torch.maximum(config.spike_sigmas * self.variance.sqrt(), config.spike_share * self.mean.abs())
        outlier = finite & (count >= config.spike_warmup) & (loss > self.mean + margin)
        accepted = finite & ~outlier
        begins = outlier & (row == 0)
        self.first.copy_(torch.where(begins, step, self.first))
        self.peak.copy_(torch.where(outlier, torch.where(begins, loss, torch.maximum(self.peak, loss)), self.peak))
        # a step that was not taken is neither: the row goes on after it
        self.row.copy_(torch.where(outlier, row + 1, torch.where(accepted, 0, row)))
        spike = outlier & (self.row >= config.spike_steps)
        fresh = self.found[0] < 0
        largest = torch.where(fresh, self.peak, torch.maximum(self.peak, self.found_peak))
        self.found_peak.copy_(torch.where(spike, largest, self.found_peak))
        span = torch.stack([torch.where(fresh, self.first, self.found[0]), torch.full_like(self.first, step)])
        self.found.copy_(torch.where(spike, span, self.found))
        rate = torch.maximum(1 / (count + 1), torch.full_like(self.mean, 1 / config.spike_window))
        # nan and inf are put out before they are multiplied: 0 * nan is nan
        delta = torch.where(accepted, loss - self.mean, 0)
        self.mean.add_(delta * rate)
        spread = (1 - rate) * (self.variance + rate * delta * delta)
        self.variance.copy_(torch.where(accepted, spread, self.variance))
        self.count.copy_(torch.where(accepted, count + 1, count))

    def look(self) -> Spike | None:
        """The spike since the last look, if there was one. Here the host waits for the device."""
        numbers = torch.stack([self.found_peak, self.mean, self.variance.sqrt()])
        first, last = self.found.tolist()
        self.found.fill_(-1)
        return Spike(first, last, *numbers.tolist()) if first >= 0 else None
