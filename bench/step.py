"""One training step of the method: ours against the textbook's.

    python bench/step.py                               ViT-S/16 in float32 on the CPU
    python bench/step.py --precision bf16 --profile
    python bench/step.py --device cuda --batch 128 --precision bf16 --compile --json bench/results/step.json

The textbook step is bench/textbook_step: what published code of DINO and iBOT does. Both start from the same weights
and see the same batches (2 crops of 256 x 128 and 8 of 96 x 64, masks as the recipes draw them, the same draws of drop
path), and the losses of all steps must agree: in float32 by 1e-5. Each way lives in a process of its own, so that its
peak memory is its own; they take turns, and the other one sleeps. Every step has a batch of its own, because the shapes
in our step change with what is masked and dropped. The step moves it to the device, as both programs do: ours bytes,
which it normalises there; the textbook normalised floats, as published loaders give them.

Beside them the rate of a matrix product is measured in each round; `share` is what a step reaches of the rate of its
precision, by the products that it really computes (`gflop_per_image`). In bf16 the textbook is the published one, all
of the head in bf16; `--textbook same` keeps float32 where ours does. Peak memory is what came on top of the imports;
on a GPU, of tensors.
"""

import argparse
import contextlib
import gc
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pairs
import torch
from pairs import gauge, kinds
from pairs.children import Child, memory_mb
from textbook_step import Images, Settings, TextbookStep
from textbook_step.ours import Crops, OurStep, build_student, draw_batch, images_of, shape_of
from torch.utils.flop_counter import FlopCounterMode

from pretrain.backbone import BackboneConfig
from pretrain.batch import Batch
from pretrain.heads import HeadsConfig

# relative difference of the losses. bf16 keeps 8 bits, and what is divided by 0.04 in it loses more of them
CLOSE = {("float32", "same"): 1e-5, ("bf16", "same"): 5e-3, ("bf16", "published"): 1e-2}
COUNTED = 8  # images at most whose operations are counted


@dataclass(frozen=True)
class Work:
    """What is compared."""

    model: str
    crops: Crops
    out_dim: int
    drop_path: float
    bf16: bool
    textbook: Literal["published", "same"]
    compile: bool
    device: str


class Way:
    """One of the two, with its batches."""

    def __init__(self, who: Literal["ours", "textbook"], work: Work):
        self.imported = memory_mb("VmRSS")
        self.work, self.cuda = work, work.device == "cuda"
        config, head = BackboneConfig(name=work.model, drop_path=work.drop_path), HeadsConfig(out_dim=work.out_dim)
        student = build_student(config, head, work.crops.global_size, compiled=work.compile and who == "ours")
        self.places, self.grid, self.ours, self.done = (
            len(student.backbone.drops),
            student.backbone.grid,
            who == "ours",
            0,
        )
        self.step: OurStep | TextbookStep
        if self.ours:
            self.step = OurStep(student, Settings(), work.bf16, work.device)
        else:
            precision = work.textbook if work.bf16 else "float32"
            weights = student.state_dict()
            self.step = TextbookStep(weights, shape_of(student), work.drop_path, Settings(), precision, work.device)

    def _draw(self) -> Batch | Images:
        """The batch of the next step, on the host."""
        batch = draw_batch(self.work.crops, self.grid, self.places, self.done)
        self.done += 1
        if self.ours:
            return batch.pin_memory() if self.cuda else batch
        images = images_of(batch)
        return Images(*([part.pin_memory() for part in parts] for parts in images)) if self.cuda else images

    def _steps(self, batches: Iterable[Batch | Images]) -> list[dict[str, torch.Tensor]]:
        device = torch.device(self.work.device)
        found = [self.step(batch.to(device)) for batch in batches]
        if self.cuda:
            torch.cuda.synchronize()
        return found

    def run(self, count: int) -> tuple[pairs.Seconds, list[list[float]]]:
        """The next steps: the time of all, and the losses of each."""
        batches, found = [self._draw() for _ in range(count)], []
        took = pairs.seconds(lambda: found.extend(self._steps(batches)))
        return took, [[value.item() for value in losses.values()] for losses in found]

    def peak_mb(self) -> float:
        """Most memory so far, MiB."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.cuda else memory_mb("VmHWM") - self.imported

    def kinds(self) -> dict[str, float]:
        """ms of a step by kind of operation."""
        batches = [self._draw()]
        return kinds.by_kind(lambda: self._steps(batches), self.work.out_dim, self.cuda)


class Gauge:
    """The measures beside the times: products of matrices, and operations of a step."""

    def __init__(self, work: Work, rows: int, width: int):
        """rows, width: tokens of a batch, and their dimension."""
        self.work, self.rows, self.width = work, rows, width

    def rates(self) -> dict[str, float]:
        """FLOP/s of matrix products by precision."""
        types = {"float32": torch.float32, "bf16": torch.bfloat16}
        return {name: gauge.gemm_rate(kind, self.rows, self.width, self.work.device) for name, kind in types.items()}

    def flops(self, who: Literal["ours", "textbook"]) -> float:
        """Floating-point operations in matrix products of a step, per image; counted on the CPU, whose operations torch
        knows all."""
        small = self.work.crops._replace(size=min(self.work.crops.size, COUNTED))
        way = Way(who, Work(**{**vars(self.work), "crops": small, "device": "cpu", "compile": False}))
        if who == "ours":
            way.step.student.backbone.skips_samples = not self.work.compile  # a compiled block skips none
        with FlopCounterMode(display=False) as counter:
            way.run(1)
        del way
        gc.collect()
        return counter.get_total_flops() / small.size


def check_losses(ours: list[list[float]], textbook: list[list[float]], close: float) -> float:
    """The largest relative difference of the losses; AssertionError where it is above `close`."""
    np.testing.assert_allclose(ours, textbook, rtol=close)
    found, expected = np.array(ours), np.array(textbook)
    return float(np.max(np.abs(found - expected) / np.maximum(expected, 1e-9)))  # without a mask both have 0


def measure(work: Work, rounds: int, steps: int, profile: bool) -> dict[str, Any]:
    """All numbers. steps: of a turn."""
    student = build_student(BackboneConfig(name=work.model), HeadsConfig(out_dim=2), work.crops.global_size)
    rows, width = tokens(work.crops, student.backbone.vit.patch_embed.patch_size[0]), student.backbone.dim
    del student
    ways = ("ours", "textbook")
    with contextlib.ExitStack() as stack:
        children = {who: stack.enter_context(Child(f"the {who} step", Way, who, work)) for who in ways}
        beside = stack.enter_context(Child("the gauge", Gauge, work, rows, width))
        for child in (*children.values(), beside):
            child.wait()  # nothing is timed while another one is still importing
        times: dict[str, list[pairs.Seconds]] = {who: [] for who in ways}
        warm = max(steps, 5) if work.compile else steps  # new shapes are compiled anew
        losses = {who: children[who].ask("run", warm)[1] for who in ways}
        rates = []
        for _ in range(rounds):
            for who in ways:
                took, found = children[who].ask("run", steps)
                times[who].append(took)
                losses[who] += found
            rates.append(beside.ask("rates"))
        peak = {who: children[who].ask("peak_mb") for who in ways}
        spent = {who: children[who].ask("kinds") for who in ways} if profile else {}
        flops = {who: beside.ask("flops", who) for who in ways}
    close = CLOSE["bf16", work.textbook] if work.bf16 else CLOSE["float32", "same"]
    numbers = pairs.compare(times["ours"], times["textbook"], 1 / steps)
    apart = check_losses(losses["ours"], losses["textbook"], close)
    speed = {who: work.crops.size / numbers[who] for who in ways}
    gemm = {name: statistics.median(each[name] for each in rates) for name in rates[0]}
    now = gemm["bf16" if work.bf16 else "float32"]
    return {
        "numbers": numbers,
        "peak": peak,
        "images_per_s": {who: round(speed[who], 2) for who in ways},
        "gflop_per_image": {who: round(flops[who] / 1e9, 2) for who in ways},
        "gflops": {who: round(flops[who] * speed[who] / 1e9, 1) for who in ways},
        "share": {who: round(flops[who] * speed[who] / now, 3) for who in ways},
        "gemm_gflops": {name: round(rate / 1e9, 1) for name, rate in gemm.items()},
        "losses": {who: [round(each[0], 6) for each in losses[who]] for who in ways},
        "losses_apart": apart,
        "kinds_ms": {who: {kind: round(ms, 1) for kind, ms in own.items()} for who, own in spent.items()},
    }


def tokens(crops: Crops, patch: int) -> int:
    """Tokens of a batch in the student."""
    sides = ((2, crops.global_size), (crops.local_count, crops.local_size))
    return crops.size * sum(count * (1 + (size[0] // patch) * (size[1] // patch)) for count, size in sides)


def show(found: dict[str, Any], rounds: int) -> None:
    """The numbers for people."""
    for who in ("ours", "textbook"):
        print(
            f"{who:10}{found['images_per_s'][who]:10.2f} images/s{found['peak'][who]:10.0f} MB"
            f"{found['gflop_per_image'][who]:9.1f} GFLOP/image{found['gflops'][who]:10.0f} GFLOP/s, "
            f"{found['share'][who]:.0%} of the matrix product's rate"
        )
    gemm = ", ".join(f"{rate:.0f} in {name}" for name, rate in found["gemm_gflops"].items())
    numbers = found["numbers"]
    print(f"matrix product: {gemm} GFLOP/s")
    print(
        f"ratio {numbers['ratio']}, rounds {min(numbers['ratios'])} to {max(numbers['ratios'])} ({rounds}); "
        f"losses apart by {found['losses_apart']:.1e}"
    )
    if found["kinds_ms"]:
        print(kinds.table(found["kinds_ms"]))


def main() -> None:
    """Time both in turns, check the losses, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="name in timm")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--locals", type=int, default=8, help="local crops of an image")
    parser.add_argument("--out-dim", type=int, default=8192, help="K, prototypes")
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--textbook", choices=["published", "same"], default="published", help="its head in bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile, of ours only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a turn; default 1, on a GPU 10")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--json", type=Path, help="write the line to this file, too")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    steps = given.steps or (10 if given.device == "cuda" else 1)
    work = Work(
        model=given.model,
        crops=Crops(given.batch, given.locals),
        out_dim=given.out_dim,
        drop_path=given.drop_path,
        bf16=given.precision == "bf16",
        textbook=given.textbook,
        compile=given.compile,
        device=given.device,
    )
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # for the processes: torch's profiler would announce itself
    found = measure(work, given.rounds, steps, given.profile)
    show(found, given.rounds)
    told = {name: getattr(given, name) for name in ("model", "batch", "locals", "out_dim", "drop_path", "precision")}
    told |= {"textbook_precision": given.textbook if work.bf16 else "float32", "compile": given.compile, "steps": steps}
    peak = {f"{who}_peak_mb": round(value) for who, value in found.pop("peak").items()}
    numbers = found.pop("numbers")
    gpu = torch.cuda.get_device_name() if given.device == "cuda" else None
    place = (torch.get_num_threads(), gpu, given.json)
    pairs.report("step", numbers, "s/step", peak["ours_peak_mb"], *place, **peak, **told, **found)


if __name__ == "__main__":
    main()
