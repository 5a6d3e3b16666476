"""From teacher logits to targets: running centre (DINO) or Sinkhorn-Knopp (SwAV, DINOv2). Once, for both losses."""

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from pretrain.losses import Logits
from pretrain.student_teacher import Seen
from recipes.load import Section


class CenteringConfig(Section):
    """What keeps the teacher from collapsing."""

    kind: Literal["centre", "sinkhorn", "none"] = "centre"  # none: for studies of collapse
    momentum: float = Field(0.9, ge=0, lt=1)  # of the running centre
    iterations: int = Field(3, ge=1)  # of Sinkhorn-Knopp


def all_reduce(value: Tensor, how: Literal["sum", "mean", "max"]) -> Tensor:
    """The value over all processes; itself when there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    value = value.clone()
    dist.all_reduce(value, op=dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
    return value / dist.get_world_size() if how == "mean" else value


class Centering(nn.Module):
    """Targets of one kind of token; its running centre is part of the training state."""

    centre: Tensor

    def __init__(self, out_dim: int, config: CenteringConfig):
        super().__init__()
        self.config = config
        self.register_buffer("centre", torch.zeros(out_dim))
        self.seen: list[Tensor] = []  # mean logits of the micro-batches of this step

    def targets(self, logits: Tensor, temperature: float) -> Tensor:
        """logits [..., K] -> probabilities [..., K], float32. The centre is that of the steps before."""
        if self.config.kind == "centre":
            return torch.softmax((logits.float() - self.centre).div_(temperature), dim=-1)
        if self.config.kind == "none":
            return torch.softmax(logits.float() / temperature, dim=-1)
        return sinkhorn(logits.float().flatten(0, -2) / temperature, self.config.iterations).view(logits.shape)

    def collect(self, mean_logits: Tensor) -> None:
        """Note the mean logits [K] of one micro-batch of this process."""
        self.seen.append(mean_logits.float())

    def end_step(self, finite: Tensor | None = None) -> None:
        """centre <- m * centre + (1 - m) * mean logits over the step's micro-batches and all processes.

        finite: bool [], the centre stays as it is where it is False.
        """
        if self.config.kind == "centre":
            mean = all_reduce(torch.stack(self.seen).mean(0), "mean")
            moved = self.centre.lerp(mean, 1 - self.config.momentum)
            self.centre.copy_(moved if finite is None else torch.where(finite, moved, self.centre))
        self.seen.clear()


def teacher_targets(centres: nn.ModuleDict, seen: Seen, temperature: float) -> Logits:
    """Probabilities of both kinds of token for the losses; notes the mean logits for the centres' end_step."""
    cls = centres["cls"].targets(seen.logits.cls, temperature)
    centres["cls"].collect(seen.cls_mean)
    if seen.logits.patches is None:
        return Logits(cls, None)
    patches = centres["patches"].targets(seen.logits.patches, temperature)
    centres["patches"].collect(seen.patch_mean)
    return Logits(cls, patches)


def sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """Probabilities [B, K] whose columns carry equal mass over the batch of all processes and whose rows sum to 1.

    scores [B, K]: logits / temperature. Sinkhorn-Knopp as in SwAV, arXiv 2006.09882, section 3.1.
    """
    largest = scores.max() if scores.numel() else torch.tensor(-torch.inf, device=scores.device)
    q = torch.exp(scores - all_reduce(largest, "max"))  # the common factor drops out; without it exp overflows
    for _ in range(iterations):
        q = q / (all_reduce(q.sum(0), "sum") * q.shape[1]).clamp(min=1e-30)
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30)
    return q
