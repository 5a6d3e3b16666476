"""How long a training stands still for a save: written beside it, written in it, and as the textbook writes.

    python bench/checkpoint.py                          ViT-B/16 with heads of 65,536 prototypes, on the CPU
    python bench/checkpoint.py --device cuda --batch 32 --precision bf16 --folder /scratch
    python bench/checkpoint.py --small                  a network of a few MB, to see that it works

One training with real steps (bench/textbook_step/ours.py), in which three ways of saving take turns. Each turn has some
steps without a save, the save, and steps until the file is in place.

* asynchronous: pretrain/keeping.py as it is by default. `ours` is its stall: seconds until the loop can go on with its
  next step, on a GPU until the device can. The first save, which may find no memory yet, is told apart.
* synchronous: the same with `checkpoint.asynchronous: false`. The same files, checksums and flushes to the disk.
* textbook: torch.save of the state dicts over the last file, as published code and accelerate's `save_state` do it.
  Nothing is flushed, and a kill meanwhile leaves half a file.

`share_of_synchronous` is the stall of the first over that of the second. A write beside the training takes time from
its steps, too: `step_s` has the steps without a write and those during one, and `cost_s` is all that a save costs, the
stall and what the steps during its write took longer. Between two turns the system writes all that it holds to the
disk, outside of the clock. Peak memory is what came on top of the imports.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pairs
import torch
from pairs.children import memory_mb
from textbook_step.ours import Crops, OurStep, build_student, draw_batch

from pretrain import checkpoint
from pretrain.backbone import BackboneConfig
from pretrain.checkpoint import CheckpointConfig
from pretrain.heads import HeadsConfig
from pretrain.keeping import Keeper

WAYS = ("asynchronous", "synchronous", "textbook")
NEVER = 10**9  # steps


class Turn(NamedTuple):
    """Seconds of one turn."""

    quiet: list[float]  # of each step before the save
    stall: pairs.Seconds
    written: float  # from the call of the save until the file is in place
    during: list[float]  # of each step that began before that, one at least


class Training:
    """Networks, optimiser and batches. `step()` is one step of training."""

    def __init__(self, model: str, crops: Crops, out_dim: int, bf16: bool, device: str):
        student = build_student(BackboneConfig(name=model), HeadsConfig(out_dim=out_dim), crops.global_size)
        self.crops, self.grid, self.places = crops, student.backbone.grid, len(student.backbone.drops)
        self.ours, self.device, self.done = OurStep(student, bf16=bf16, device=device), torch.device(device), 0
        parts = {"student": self.ours.student, "teacher": self.ours.teacher, "centres": self.ours.centres}
        self.modules: Mapping[str, torch.nn.Module] = parts
        self.optimizer = self.ours.optimizer

    def settle(self) -> None:
        """Until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self) -> float:
        """One step; its seconds."""
        batch = draw_batch(self.crops, self.grid, self.places, self.done)
        self.done += 1
        begin = time.perf_counter()
        self.ours(batch.to(self.device))
        self.settle()
        return time.perf_counter() - begin

    def state_mb(self) -> float:
        """Size of the state, MiB."""
        state = checkpoint.state_tensors(self.modules, (self.modules["student"], [self.optimizer]))
        return sum(tensor.nbytes for tensor in state.values()) / 2**20


class OurSave:
    """Saves through `Keeper`, as the loop of pretrain/run.py calls it."""

    def __init__(self, training: Training, folder: Path, asynchronous: bool):
        self.training, self.steps = training, 0
        config = CheckpointConfig(asynchronous=asynchronous, teacher_every_epochs=NEVER)
        self.keeper = Keeper(folder, config, NEVER, 2.0, 1)  # two steps are an epoch, at whose end a save is due

    def _after(self) -> None:
        self.steps += 1
        self.keeper.after(self.steps, self.training.modules, self.training.optimizer, {})

    def before(self) -> None:
        """What a step costs at whose end no save is due."""
        self._after()

    def save(self) -> threading.Thread | None:
        """The save; the thread that still writes it."""
        self._after()
        return self.keeper.writer.thread

    def check(self) -> None:
        """What is in place is sound. UserError where it is not."""
        self.keeper.close()
        state = checkpoint.states(self.keeper.out / "checkpoints")[-1]
        assert checkpoint.check_state(state)["samples"] == self.steps


class TextbookSave:
    """torch.save over the last file."""

    def __init__(self, training: Training, folder: Path):
        folder.mkdir()
        self.training, self.path = training, folder / "checkpoint.pth"

    def before(self) -> None:
        """Nothing."""

    def save(self) -> None:
        """The whole state in one file."""
        state = {name: module.state_dict() for name, module in self.training.modules.items()}
        torch.save({**state, "optimizer": self.training.optimizer.state_dict()}, self.path)

    def check(self) -> None:
        """The file can be read."""
        torch.load(self.path, map_location="meta", mmap=True, weights_only=True)


def turn(training: Training, way: OurSave | TextbookSave, steps: int) -> Turn:
    """Steps, a save, steps until its file is in place."""
    way.before()
    quiet = [training.step() for _ in range(steps)]
    done: list[float] = []
    threads: list[threading.Thread | None] = []

    def save() -> None:
        threads.append(way.save())
        training.settle()

    begin = time.perf_counter()
    stall = pairs.seconds(save)
    (thread,) = threads

    def watch() -> None:
        if thread is not None:
            thread.join()
        done.append(time.perf_counter())

    watcher = threading.Thread(target=watch)
    watcher.start()
    during: list[float] = []
    while thread is not None and not (done and during):
        during.append(training.step())
    watcher.join()
    os.sync()
    return Turn(quiet, stall, done[0] - begin, during)


def cost_of(one: Turn, quiet: float) -> float:
    """Seconds that a save took from the training: its stall, and what the steps during its write took longer."""
    return one.stall.wall + sum(step - quiet for step in one.during)


def measure(training: Training, folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """All numbers."""
    ways: dict[str, OurSave | TextbookSave] = {
        "asynchronous": OurSave(training, folder / "asynchronous", True),
        "synchronous": OurSave(training, folder / "synchronous", False),
        "textbook": TextbookSave(training, folder / "textbook"),
    }
    training.step()  # the optimiser gets its moments
    turns: dict[str, list[Turn]] = {name: [] for name in WAYS}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            turns[name].append(turn(training, way, steps))
    for way in ways.values():
        way.check()
    first = {name: found[0].stall.wall for name, found in turns.items()}
    turns = {name: found[1:] for name, found in turns.items()}
    stalls = {name: [one.stall for one in found] for name, found in turns.items()}
    quiet = statistics.median(step for found in turns.values() for one in found for step in one.quiet)
    during = [step for one in turns["asynchronous"] for step in one.during]

    def median(of: Callable[[Turn], float]) -> dict[str, float]:
        return {name: round(statistics.median(map(of, found)), 4) for name, found in turns.items()}

    shares = [a.wall / b.wall for a, b in zip(stalls["asynchronous"], stalls["synchronous"], strict=True)]
    stall = median(lambda one: one.stall.wall)
    return {
        **pairs.compare(stalls["asynchronous"], stalls["textbook"], 1.0),
        "share_of_synchronous": round(stall["asynchronous"] / stall["synchronous"], 4),
        "shares": [round(share, 4) for share in shares],
        "stall_s": stall,
        "first_stall_s": {name: round(value, 4) for name, value in first.items()},
        "written_s": median(lambda one: one.written),
        "cost_s": median(lambda one: cost_of(one, quiet)),
        "step_s": {"without": round(quiet, 4), "during": round(statistics.median(during), 4)},
        "steps_during": [len(one.during) for one in turns["asynchronous"]],
    }


def show(found: dict[str, Any], state_mb: float) -> None:
    """The numbers for people."""
    print(f"state of {state_mb:,.0f} MB; a step takes {found['step_s']['without']} s")
    print(f"{'':14}{'stall, s':>12}{'the first':>12}{'in place':>12}{'cost, s':>12}")
    for name in WAYS:
        row = (found[key][name] for key in ("stall_s", "first_stall_s", "written_s", "cost_s"))
        print(f"{name:14}" + "".join(f"{value:12.3f}" for value in row))
    print(
        f"the asynchronous stall is {found['share_of_synchronous']:.1%} of the synchronous one "
        f"({min(found['shares']):.1%} to {max(found['shares']):.1%}); a step during the write takes "
        f"{found['step_s']['during']} s"
    )


def main() -> None:
    """Train, save in turns, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="name in timm")
    parser.add_argument("--out-dim", type=int, default=65536, help="K, prototypes")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--locals", type=int, default=2, help="local crops of an image")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way, after a first one")
    parser.add_argument("--steps", type=int, default=2, help="of a turn, before its save")
    parser.add_argument("--folder", type=Path, help="disk to write to; default: that of temporary files")
    parser.add_argument("--small", action="store_true", help="a network of a few MB, two rounds")
    parser.add_argument("--json", type=Path, help="write the line to this file, too")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if given.small:
        given.model, given.out_dim, given.rounds, given.steps = "vit_tiny_patch16_224", 256, 2, 1
    imported = memory_mb("VmRSS")
    crops = Crops(given.batch, given.locals)
    training = Training(given.model, crops, given.out_dim, given.precision == "bf16", given.device)
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="bench-checkpoint-") as folder:
        found = measure(training, Path(folder), given.rounds, given.steps)
    show(found, training.state_mb())
    told = {name: getattr(given, name) for name in ("model", "batch", "out_dim", "precision", "rounds", "steps")}
    gpu = torch.cuda.get_device_name() if given.device == "cuda" else None
    place = (torch.get_num_threads(), gpu, given.json)
    peak = memory_mb("VmHWM") - imported
    pairs.report("checkpoint", found, "s/save", peak, *place, state_mb=round(training.state_mb()), **told)


if __name__ == "__main__":
    main()
