"""Pretrain a Vision Transformer on unlabeled person crops: DINO + masked image modelling (PersonViT, arXiv 2408.05398).

    accelerate launch pretrain/run.py                                       the smoke recipe, on drawn figures
    accelerate launch pretrain/run.py --recipe recipes/pretrain/demo.yaml --out runs/demo/pretrain
    accelerate launch --config_file recipes/accelerate/gpu8.yaml pretrain/run.py --recipe ... loader.batch=1024
    accelerate launch pretrain/run.py --ckpt runs/source ...                continue its teacher, on other images say

The same command on a run folder that holds a checkpoint goes on from it. The teacher comes out as OUT/teacher.
"""

import argparse
import contextlib
import functools
import json
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from pretrain import gaps, keeping, optim, processes, schedules, verdict
from pretrain.centering import teacher_targets
from pretrain.config import PretrainConfig
from pretrain.journal import BadSamples, Journal
from pretrain.loader import build_batches
from pretrain.losses import named_losses
from pretrain.modules import build_modules
from pretrain.planning import micro_batch_parts, plan
from pretrain.ranks import Ranks
from pretrain.scalars import Scalars
from pretrain.showing import Showing
from pretrain.starting import start_from
from pretrain.student_teacher import put_back, running_statistics, update_teacher
from recipes.errors import plain_errors
from recipes.load import load, recipe_path
from recipes.progress import Meter
from recipes.record import RunFolder
from shards.on_demand import ensure_sets
from shards.order import Order, check_ranks
from shards.reader import ShardReader

# may differ when a run is continued: they do not change what it computes
FREE_KEYS = ("cache", "log_every", "health", "pictures", "planning", "ranks", "verdict")
FREE_KEYS += ("checkpoint.asynchronous", "checkpoint.max_failed", "loader.workers", "loader.prefetch", "loader.max_bad")


def arguments() -> tuple[PretrainConfig, Path]:
    """The resolved recipe and the run folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(recipe_path("pretrain/smoke.yaml")), help="YAML file; default: smoke")
    parser.add_argument("--out", type=Path, help="run folder; default: runs/<name of the recipe>")
    parser.add_argument("--ckpt", help="start: run folder, teacher, a file of others, timm:NAME (docs/checkpoints.md)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a key of the recipe")
    given = parser.parse_intermixed_args()  # an override may stand before and after an option
    given.overrides += [f"ckpt={json.dumps(given.ckpt)}"] if given.ckpt else []
    config = load(PretrainConfig, given.recipe, given.overrides)
    return config, given.out or Path("runs") / Path(given.recipe).stem


def train(config: PretrainConfig, out: Path, accelerator: Accelerator, reader: ShardReader, ranks: Ranks) -> None:
    """Build the parts, then the loop, which is the method."""
    batch_size, world = config.loader.batch, accelerator.num_processes
    modules = build_modules(config, accelerator.device, world)
    planned = plan(config, modules, reader, (world, accelerator.device), out, start_from(config.ckpt, modules))
    accelerator.print(planned)
    if config.dry_run:
        return
    steps, steps_per_epoch, accumulation = planned.steps, planned.steps_per_epoch, batch_size // world // planned.micro
    free = (*FREE_KEYS, *(() if micro_batch_parts(config) else ("loader.batch_per_device",)))
    folder = RunFolder.open(out, config, accelerator.is_main_process, may_differ=free, facts={"processes": world})
    accelerator.init_trackers("tensorboard")
    plain = optim.build_optimizer(modules["student"], config.optim)
    recipe, trained = (config.model_dump(mode="json"), free), (modules["student"], [plain])
    found = keeping.resume(out / "checkpoints", modules, trained, recipe, config.checkpoint.keep, accelerator)
    first = found["samples"] // batch_size if found else 0
    folder.rewind(first - 1)
    student, optimizer = processes.prepare(accelerator, modules["student"], plain, static=accumulation == 1)
    ranks.watch(modules["teacher"], modules["student"])
    span, left_out = (first, steps), gaps.begin(out, modules["spikes"], accelerator)
    made = build_batches(config, reader, modules["student"].backbone, span, accelerator, left_out)
    keeper = keeping.Keeper(out, config.checkpoint, steps, steps_per_epoch, batch_size, recipe[0])
    facts = {"normalize": {"mean": config.photometric.mean, "std": config.photometric.std}, "seed": config.seed}
    meter = Meter(steps * batch_size, "pretrain", start=first * batch_size, silent=not accelerator.is_main_process)
    every, bad = (config.log_every, batch_size), BadSamples(config.loader.max_bad, len(reader))
    rates = (planned.flops_per_image, planned.peak and planned.peak * world)
    showing = Showing(out, config, keeper.snapshot, reader, accelerator, ranks.phase)
    journal = Journal(folder, accelerator, meter, every, bad, modules, config.health, rates, showing)
    batches = ranks.waited_for(made)
    with meter, folder, keeper:
        for step in range(first, steps):
            now = schedules.at(step, steps, steps_per_epoch, batch_size, config.schedules)
            optim.set_values(optimizer, now.lr, now.weight_decay)
            statistics = running_statistics(nn.ModuleDict(modules))
            for micro, batch in enumerate(journal.waited_for(batches, accumulation), start=1):
                with contextlib.nullcontext() if micro == accumulation else accelerator.no_sync(student):
                    with accelerator.autocast():
                        seen, guessed = modules["teacher"](batch), student(batch)
                    targets = teacher_targets(modules["centres"], seen, now.teacher_temperature)
                    losses = named_losses(guessed, targets, batch.mask_weights, config.losses)
                    accelerator.backward(losses["loss"] / accumulation)
                journal.collect(losses, (targets, seen, guessed), 1 / accumulation)
            if now.freeze_last_layer:
                optim.freeze_last_layer(student)
            norm = optim.clip_gradients(student, config.optim, journal.gradients)
            finite = journal.check(norm)  # where it is False, nothing below changes a bit of the state
            optim.step(optimizer, finite)
            update_teacher(modules["teacher"], modules["student"], now.momentum, finite)
            for centre in modules["centres"].values():
                centre.end_step(finite)
            put_back(statistics, finite)
            journal.record(step, {**now._asdict(), "grad_norm": norm})
            stop = ranks.stop_after(step + 1)
            with ranks.phase("checkpoint"):
                keeper.after(step + 1, modules, plain, facts, stop)
            if stop:
                raise ranks.stopped()
    ranks.done()
    accelerator.print(f"teacher: {out / 'teacher'}")
    verdict.conclude(config, out, accelerator)


def main() -> None:
    """Entry point."""
    config, out = arguments()
    with processes.running(config.precision, log_with=Scalars(out / "tensorboard")) as accelerator:
        check_ranks(accelerator.num_processes, config.loader.batch, config.order.lanes)
        data = config.loader
        ensure_sets(data.shards, data.draw, accelerator.is_main_process, accelerator.wait_for_everyone)
        reader = ShardReader(data.shards, data.splits, data.keep, config.cache)
        order = Order(reader.shard_sizes, config.seed, config.order)
        with Ranks(config.ranks, accelerator, out) as ranks:
            attempt = functools.partial(train, config, out, accelerator, reader, ranks)
            gaps.through(attempt, out, order, data.batch, config.health, accelerator)


if __name__ == "__main__":
    with plain_errors():
        main()
