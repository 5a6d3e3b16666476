"""Which process of a run holds up the others, from the times of the last steps."""

import statistics
from collections import deque

import torch
from torch import Tensor

PHASES = ("data", "compute", "checkpoint")


class Slowness:
    """A process is slow in a phase if its time there is above the median of the others by a share of the step.

    The times are means over the last steps without their longest one, which may be a pause. The waiting for others, in
    the collectives of the backward, is in no phase, so the quick ones are not blamed; and a time that all need alike
    is no difference. It is no longer slow below half of that share, so one that wavers is told once.
    """

    def __init__(self, share: float, steps: int, hosts: list[str]):
        """share: of a step, above 0. steps: over which is judged, 2 or more. hosts: of each process, two or more."""
        self.share, self.steps, self.hosts = share, steps, hosts
        self.seen: deque[Tensor] = deque(maxlen=steps)
        self.ringing: set[tuple[int, str]] = set()

    def see(self, times: Tensor) -> list[str]:
        """times: float64 [R, 4], seconds of a step in each of PHASES and in all, for each process.

        Returns sentences about who begins to be slow.
        """
        self.seen.append(times)
        if len(self.seen) < self.steps:
            return []
        window = torch.stack(tuple(self.seen))  # [W, R, 4]
        mean = (window.sum(0) - window.amax(0)) / (len(window) - 1)
        # a host that runs ahead of its GPU counts only its own share of a step in "all"
        step = float(torch.maximum(mean[:, -1], mean[:, :-1].sum(1)).max())
        told, now = [], set()
        for column, phase in enumerate(PHASES):
            seconds = mean[:, column].tolist()
            for rank, own in enumerate(seconds):
                others = statistics.median(seconds[:rank] + seconds[rank + 1 :])
                rings = (rank, phase) in self.ringing
                if own - others > self.share * step * (0.5 if rings else 1):
                    now.add((rank, phase))
                    if not rings:
                        told.append(
                            f"rank {rank} on {self.hosts[rank]} is slow in phase {phase}: {own:.3g} s a step, the "
                            f"others {others:.3g} s, of steps of {step:.3g} s (docs/several_machines.md)"
                        )
        self.ringing = now
        return told
