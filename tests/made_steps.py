"""A journal that is shown steps with made-up values."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pretrain.centering import Centering, CenteringConfig
from pretrain.health import HealthConfig
from pretrain.journal import BadSamples, Journal, Skipped
from pretrain.losses import Guessed, Logits
from pretrain.spikes import Spikes
from pretrain.student_teacher import Seen
from recipes.progress import Meter
from recipes.record import RunFolder

K, D, B, STEPS = 16, 8, 6, 128


class Replaced:
    """A batch of the rows from `row` on, of which `count` samples were damaged."""

    def __init__(self, count: int, row: int):
        self.rows, self.masked = torch.arange(row, row + B), torch.zeros(0)
        self.replaced = torch.full((B,), -1)
        self.replaced[:count] = 5

    def to(self, device: torch.device) -> "Replaced":
        return self


class Divides(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows / (rows - 13)


class Network(nn.Module):
    """Not finite for row 13 of the set, in the part `second`; `third` gets it from there."""

    def __init__(self, sound: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.first, self.second, self.third = nn.Identity(), nn.Identity() if sound else Divides(), nn.Identity()

    def forward(self, batch: Replaced) -> tuple[Tensor, Tensor]:
        rows = self.first(batch.rows.float())
        return rows, self.third(self.second(rows))


class Run:
    """A journal and what it needs; steps whose values are made up."""

    def __init__(self, out: Path, every: int = 7, first: int = 0, most_bad: float = 0.5, rates=None, **health):
        self.modules = {"skipped": Skipped(), "spikes": Spikes(), "student": Network()}
        self.modules["teacher"] = Network(sound=True)
        self.skipped = self.modules["skipped"]
        centres = nn.ModuleDict({"cls": Centering(K, CenteringConfig())})
        meter = Meter(STEPS * B, "test", start=first * B, silent=True)
        self.out, self.config = out, HealthConfig(**health)
        self.journal = Journal(
            RunFolder.open(out, CenteringConfig(), main=True),
            Accelerator(cpu=True),
            meter,
            (every, B),
            BadSamples(most_bad, 100),
            self.modules | {"centres": centres},
            self.config,
            rates,
        )

    def step(self, step: int, loss: float = 2.0, norm: float = 1.0, teacher: float = 0.0, bad: int = 0) -> bool:
        """One step of two micro-batches; whether it was finite."""
        for half, _ in enumerate(self.journal.waited_for(iter([Replaced(bad, step), Replaced(0, step + B)]), 2)):
            made = torch.Generator().manual_seed(2 * step + half)
            targets = torch.softmax(torch.randn(2, B, K, generator=made), dim=-1)
            features = torch.randn(2, B, D, generator=made)
            seen = Seen(Logits(targets, None), torch.full((K,), 1 + teacher), None, features)
            losses = {"loss": torch.tensor(loss + half), "loss_cls": torch.tensor(1.0 + half)}
            forward = (Logits(targets, None), seen, Guessed(targets, None, None, features))
            self.journal.collect(losses, forward, 0.5)
        finite = self.journal.check(torch.tensor(norm))
        assert isinstance(finite, Tensor)
        assert (finite.shape, finite.dtype) == ((), torch.bool)
        self.journal.record(step, {"lr": 0.1, "teacher_temperature": 0.04, "grad_norm": torch.tensor(norm)})
        return bool(finite)

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
