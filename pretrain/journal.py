"""What a run tells while it goes: progress on the screen, metrics.jsonl, trackers, alarms.

The host waits for the device on the steps that are written only; what has to be known of the others stays there.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from pretrain import dumps
from pretrain.batch import Batch
from pretrain.health import SKIPS, SPIKE, HealthConfig, Spike, Watch, effective_rank, signals
from pretrain.losses import Guessed, Logits
from pretrain.showing import Showing
from pretrain.spikes import RollBack, Spikes
from pretrain.student_teacher import Seen
from recipes.errors import UserError
from recipes.progress import Meter
from recipes.record import METRICS, RunFolder

# the start of a run is watched more closely than `log_every` may ask for: collapse is quick
START, START_EVERY = 50, 10  # steps


class BadSamples:
    """Counts the damaged samples that were replaced, and stops a run that meets too many.

    The share is taken of the samples since the start of this process, and of an epoch at least.
    """

    def __init__(self, most: float, epoch: int):
        """most: share in 0..1. epoch: samples of an epoch."""
        self.most, self.epoch, self.found, self.seen = most, epoch, 0, 0

    def add(self, found: int, seen: int) -> None:
        """Count `found` of `seen` samples of all processes."""
        self.found, self.seen = self.found + found, self.seen + seen

    def check(self) -> None:
        """UserError above the share."""
        if self.found > self.most * max(self.seen, self.epoch):
            raise UserError(
                f"{self.found} damaged samples among {self.seen}: more than loader.max_bad = {self.most} of the "
                f"{max(self.seen, self.epoch)} allowed for; see which with shards/check.py, or raise loader.max_bad"
            )


class Skipped(nn.Module):
    """How many steps were not taken because something was not finite; a part of the training state, on the device."""

    total: Tensor
    row: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))  # since the start of the run
        self.register_buffer("row", torch.zeros((), dtype=torch.int64))  # without a finite step between them

    def count(self, finite: Tensor) -> None:
        """One more step; finite: bool []."""
        self.total += ~finite
        self.row.copy_((self.row + 1) * ~finite)


class Journal:
    """Collects the values of a step and writes those of every `every`-th one, and of the last.

    Rates are means since the last written step. The health signals are those of the first micro-batch of the step, as
    a mean over the processes; all processes come to the same decisions. The alarms need no state of their own: they
    follow from the lines, which a run that goes on reads again.
    """

    def __init__(
        self,
        folder: RunFolder,
        accelerator: Accelerator,
        meter: Meter,
        every: tuple[int, int],
        bad: BadSamples,
        modules: dict[str, nn.Module],
        config: HealthConfig,
        rates: tuple[float, float | None] | None = None,
        showing: Showing | None = None,
    ):
        """meter: counts images; its total must be known. every: steps between two lines, images of a (global) step.

        modules: the training state, by name. rates: FLOPs of an image, forward and backward, and the
        peak FLOP/s of all devices together, where it is known; the share of it that is used is told as `mfu`. showing:
        draws pictures; the steps after which it does are written in any case.
        """
        self.folder, self.accelerator, self.meter, self.bad, self.rates = folder, accelerator, meter, bad, rates
        (self.every, self.batch), self.config, self.showing = every, config, showing
        self.modules, self.skipped = modules, modules["skipped"]
        self.spikes: Spikes = modules["spikes"]
        # Sinkhorn-Knopp needs no centre; without centring it stays 0, which is a signal
        self.centres = {kind: c.centre for kind, c in modules["centres"].items() if c.config.kind != "sinkhorn"}
        self.watch = Watch(config, len(modules["centres"]["cls"].centre), bad.epoch / self.batch)
        if accelerator.is_main_process and (folder.path / METRICS).is_file():
            for line in (folder.path / METRICS).read_text(encoding="utf-8").splitlines():
                self.watch.see(json.loads(line))
        self.replaced = 0  # damaged samples of this process since the last line
        self.since, self.steps, self.waited = time.monotonic(), 0, 0.0
        self.losses: dict[str, Tensor] = {}
        self.health: dict[str, Tensor] = {}
        self.features = self.outputs = torch.zeros(0)  # of the teacher: for the rank; their sum, whether it is finite
        self.means: dict[str, Tensor] = {}  # of this step's terms over the processes
        self.faults: Tensor | None = None  # which of them were not finite since the last line
        self.finite = self.own = torch.zeros(0)  # whether the step is taken; the terms of this process
        self.gradients: dict[str, Tensor] = {}  # norm of each parameter's in this step; clip_gradients puts it there
        self.recent, self.rows = dumps.recent(), list[Tensor]()
        self.last: Batch | None = None  # micro-batch of this process

    @property
    def step(self) -> int:
        """The step that is under way, counted from 0."""
        return self.meter.done // self.batch

    @property
    def due(self) -> bool:
        """Whether this step is written."""
        last = self.meter.done + self.batch >= self.meter.total
        early = self.step < START and self.step % START_EVERY == 0
        shown = self.showing is not None and self.showing.due(self.step + 1)
        return last or early or shown or self.step % self.every == 0

    def waited_for(self, batches: Iterator[Batch], accumulation: int) -> Iterator[Batch]:
        """The next `accumulation` micro-batches on the device; the time until each arrives counts as waiting."""
        self.losses, self.health, self.rows = {}, {}, []
        self.outputs = torch.zeros((), device=self.accelerator.device)
        for _ in range(accumulation):
            start = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - start
            self.replaced += int((batch.replaced >= 0).sum())  # on the host, before the batch goes to the device
            self.rows.append(batch.rows.clone())  # what a worker sent would keep a file open
            self.last = batch.to(self.accelerator.device)
            yield self.last

    def collect(self, losses: dict[str, Tensor], forward: tuple[Logits, Seen, Guessed], share: float) -> None:
        """Add a micro-batch that makes up `share` of the step. forward: targets, what teacher and student gave."""
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0) + value.detach().float() * share
        targets, seen, guessed = forward
        # patches without a mask enter the centre and not the loss: a nan in them must be seen as well
        for mean in (seen.cls_mean, seen.patch_mean):
            if mean is not None:
                self.outputs = self.outputs + mean.sum()
        if self.due and not self.health:
            self.health = signals(targets, seen, guessed, self.centres)
            self.features = seen.features[0].clone()

    def check(self, norm: Tensor) -> Tensor:
        """Whether losses, gradient and teacher are finite on all processes: bool [], on the device, equal everywhere.

        norm: of the gradient. Nothing is read here. A step of which this is False must not be taken.
        """
        names = [*self.losses, "grad_norm", "teacher"]
        own = torch.stack([*self.losses.values(), norm.detach().float(), self.outputs])
        means = self.accelerator.reduce(own, "mean")  # nan and inf pass through a sum
        fine = torch.isfinite(means)
        self.own, self.means = own, dict(zip(names, means.unbind(), strict=True))
        self.faults = ~fine if self.faults is None else self.faults | ~fine
        self.finite = fine.all()
        self.skipped.count(self.finite)
        return self.finite

    def record(self, step: int, values: dict[str, float | Tensor]) -> None:
        """End of step `step`, counted from 0. values: of this process, beside the collected ones. UserError: stop.

        RollBack where the loss has spiked and health.on_spike asks for it.
        """
        assert step == self.step
        self.steps += 1
        means = torch.stack(tuple(self.means.values()))
        self.recent.append(dumps.Step(step, self.rows, tuple(self.means), self.own, means))
        # a term that begins, and prototypes that begin to learn, move the loss at once
        terms = torch.stack([mean > 0 for name, mean in self.means.items() if name in self.losses]).sum()
        regime = terms + (not values.get("freeze_last_layer"))
        self.spikes.see(step, self.means["loss"], self.finite, regime, self.config)
        note = ""
        if self.due:
            pictured = self.showing.after(step + 1, self.modules["teacher"]) if self.showing else {}
            line, spike = self._read(step, values | pictured), self._spike()
            line |= {"spike": spike._asdict()} if spike else {}
            collapse = self._alarms(line)
            note = self._note(line)
            self.folder.log(line)
            numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
            self.accelerator.log(numbers, step=step)
            self._stop(step, collapse, spike, values)
            self.since, self.steps, self.waited, self.faults = time.monotonic(), 0, 0.0, None
        self.meter.advance(self.batch, note)

    def _spike(self) -> Spike | None:
        """What `spikes` has found since the last line."""
        return None if self.config.on_spike == "ignore" else self.spikes.look()

    def _over_processes(self) -> tuple[dict[str, float], int]:
        """Mean of each health signal over the processes that know it (nan: none does); damaged samples of all."""
        device = self.accelerator.device
        own = {**self.health, "effective_rank": torch.tensor(effective_rank(self.features), device=device)}
        signal = torch.stack([value.float() for value in own.values()])
        known = torch.isfinite(signal)
        replaced = torch.tensor([float(self.replaced)], device=device)
        sums = self.accelerator.reduce(torch.cat([torch.where(known, signal, 0), known, replaced]), "sum").tolist()
        pairs = zip(own, sums[: len(own)], sums[len(own) : -1], strict=True)
        return {name: total / count if count else math.nan for name, total, count in pairs}, round(sums[-1])

    def _read(self, step: int, values: dict[str, float | Tensor]) -> dict[str, Any]:
        """The line of this step. Here the host waits for the device, so the clock is read after that."""
        health, replaced = self._over_processes()
        means = {name: float(value) for name, value in self.means.items()}
        numbers = {name: means[name] for name in self.losses}
        numbers |= {name: float(value) for name, value in values.items()} | health
        line: dict[str, Any] = {"step": step, "samples": (step + 1) * self.batch}
        # JSON has no nan; None now, so that the alarms see what they would read from the file
        line |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        line |= {"not_finite": wrong} if wrong else {}
        self.bad.add(replaced, self.steps * self.batch)
        self.replaced = 0
        line |= {"skipped_steps": int(self.skipped.total), "bad_samples": self.bad.found}
        seconds = max(time.monotonic() - self.since, 1e-9)
        line |= {"images_per_s": self.steps * self.batch / seconds, "data_wait": self.waited / seconds}
        if self.rates and self.rates[1]:
            line["mfu"] = line["images_per_s"] * self.rates[0] / self.rates[1]
        return line

    def _note(self, line: dict[str, Any]) -> str:
        """The line in a few words for the screen."""
        terms = [f"{name.removeprefix('loss_')} {line[name]:.4f}" for name in self.losses if line[name] is not None]
        told = "  ".join(terms) if "not_finite" not in line else "not finite: step skipped"
        told += f"  data wait {line['data_wait']:.0%}"
        told += f"  MFU {line['mfu']:.0%}" if "mfu" in line else ""
        return told + (f"  ALARM {', '.join(line['alarms'])}" if "alarms" in line else "")

    def _alarms(self, line: dict[str, Any]) -> str:
        """Add the alarms that ring to the line and tell those that begin; returns the text of the first collapse."""
        if not self.accelerator.is_main_process:
            return ""
        begun, ringing = self.watch.see(line), self.watch.ringing
        line |= {"alarms": list(ringing)} if ringing else {}
        for name in begun:
            print(f"alarm {name} at step {line['step']}: {ringing[name]} (docs/health.md)", file=sys.stderr, flush=True)
        return next((f"{name}: {text}" for name, text in ringing.items() if name not in (SKIPS, SPIKE)), "")

    def _stop(self, step: int, collapse: str, spike: Spike | None, values: dict[str, float | Tensor]) -> None:
        """UserError or RollBack on all processes where the run must not go on. collapse: what the main process found.

        spike, values: of this step's line.
        """
        self.bad.check()
        if (row := int(self.skipped.row)) > self.config.max_skipped:
            wrong = [name for name, fault in zip(self.means, self.faults.tolist(), strict=True) if fault]
            raise UserError(
                f"step {step}: {row} steps in a row were skipped, more than health.max_skipped = "
                f"{self.config.max_skipped}, because of values that are not finite ({', '.join(wrong)}); "
                f"{self._dump(values)}. Begin a new run with a lower schedules.lr, heads.norm_last_layer=true or "
                f"schedules.teacher_temperature=0.04, from scratch or from --ckpt {self.folder.path}"
            )
        if spike and self.config.on_spike == "roll_back":
            raise RollBack(max(0, spike.first - self.config.spike_before), spike.last, spike)
        if self.config.on_collapse == "stop":
            told = [collapse]
            if self.accelerator.num_processes > 1:
                broadcast_object_list(told)
            if told[0]:
                raise UserError(f"step {step}: {told[0]} (it stops here because health.on_collapse=stop)")

    def _dump(self, values: dict[str, float | Tensor]) -> str:
        """Write down what is known of the last steps, on each process; where it is, for people."""
        networks = {name: self.modules[name] for name in ("teacher", "student")}
        with self.accelerator.autocast():
            broken = {name: dumps.first_broken(network, self.last) for name, network in networks.items()}
        rank, scheduled = self.accelerator.process_index, {k: v for k, v in values.items() if k != "grad_norm"}
        given = self.recent, scheduled, self.gradients, self.modules, broken
        try:
            path = dumps.write(self.folder.path, rank, *given)
        except OSError as error:  # it is no reason to hide why the run stops
            return f"what is known of them could not be written ({error.strerror})"
        return f"their samples, gradients and the parts at fault are in {path}"
