"""Fine-tune a pretrained teacher for person re-identification, then evaluate it by retrieval.

    python finetune/run.py --ckpt runs/smoke                     BoT on drawn figures, from that run's teacher
    python finetune/run.py --ckpt none                           the same from random weights
    python finetune/run.py --ckpt runs/pretrain --recipe recipes/finetune/bot_market1501.yaml --out runs/market \\
        benchmark.shards=data/market1501

--ckpt takes a run folder, its `teacher` folder, or what docs/checkpoints.md lists. The same command goes on after a
kill. Writes OUT/model and its evaluation (docs/finetuning.md, docs/evaluation.md): table.md, results.json, strips.png.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from finetune import benchmark, features, models, optim, resume, views
from finetune.augment import Augment
from finetune.config import FinetuneConfig
from finetune.identities import Identities, select_identities
from finetune.journal import Journal
from finetune.methods import build
from finetune.methods.base import Method, Parts
from finetune.sampling import shard_batch
from finetune.validation import Validation, hold_out
from pretrain import processes
from recipes.errors import plain_errors
from recipes.load import load, recipe_path
from recipes.progress import Meter
from recipes.record import RunFolder
from shards.on_demand import ensure_sets
from shards.reader import ShardReader

# may differ when a run is continued: they do not change what it computes
FREE_KEYS = ("benchmark.workers", "benchmark.strips", "benchmark.nearest", "log_every", "resume")


def arguments() -> tuple[FinetuneConfig, Path]:
    """The resolved recipe and the run folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder, teacher, file of others, timm:NAME, or none: random")
    parser.add_argument("--recipe", default=str(recipe_path("finetune/figures.yaml")), help="YAML; default: figures")
    parser.add_argument("--out", type=Path, help="run folder; default: runs/<recipe>-<ckpt>")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a key of the recipe")
    given = parser.parse_intermixed_args()  # an override may stand before and after an option
    config = load(FinetuneConfig, given.recipe, [*given.overrides, f"ckpt={json.dumps(given.ckpt)}"])
    return config, given.out or Path("runs") / f"{Path(given.recipe).stem}-{Path(given.ckpt).name}"


def build_method(config: FinetuneConfig, identities: Identities, cameras: int) -> tuple[Method, str]:
    """The method on the backbone of config.ckpt, and what that is; fresh weights are the same on all processes."""
    size = (config.augment.height, config.augment.width)
    backbone, stored = models.start_backbone(config.ckpt, config.backbone, size, config.seed)
    torch.manual_seed(config.seed)
    method = build(config.method, Parts(backbone, identities.classes, cameras, config.sampling, config.seed))
    return method, stored.get("source", config.ckpt)


def train(
    config: FinetuneConfig, method: Method, reader: ShardReader, identities: Identities, folder: RunFolder,
    acc: Accelerator, validate: Callable[[int], object],
) -> None:  # fmt: skip
    """The loop: batches of the epoch -> named losses -> backward -> step. validate: is told of the epochs done."""
    dataset = views.TrainViews(reader, identities, Augment(config.augment), config.seed, method.draws)
    sampler, rank, ranks = views.Places(), acc.process_index, acc.num_processes
    loader = views.build_loader(dataset, sampler, config.benchmark.workers)
    plain = [optim.build_optimizer(part, config.optim) for part in method.optimisers()]
    done, epochs = resume.restore(folder.path, method, plain), config.optim.epochs
    folder.rewind(done.step - 1)
    optimisers, wrapped = [acc.prepare(optimiser) for optimiser in plain], acc.prepare(method)
    total = done.images + (epochs - done.epoch) * method.epoch(0, identities).size
    with Meter(total, "fine-tune", start=done.images, silent=not acc.is_main_process) as meter:
        journal = Journal(folder, acc, meter, config.log_every)
        for epoch in range(done.epoch, epochs):
            batches = method.epoch(epoch, identities)
            sampler.batches = views.places(epoch, batches, config.sampling.images_per_identity, rank, ranks)
            method.train()
            for number, batch in enumerate(loader):
                moment = epoch + number / len(batches)
                rates = [optim.set_rate(optimiser, moment, config.optim) for optimiser in plain]
                views.seed_torch(config.seed, done.step, rank)
                with acc.autocast():
                    losses = wrapped(batch.to(acc.device))
                loss = sum(losses.values())
                acc.backward(loss)
                for optimiser in optimisers:
                    optimiser.step()
                    optimiser.zero_grad()
                method.end_step()
                last = number == len(batches) - 1
                journal.record(done.step, epoch, {"loss": loss, **losses}, rates[0], last)
                meter.advance(batches.shape[1])
                done = resume.Position(epoch + last, done.step + 1, done.images + batches.shape[1])
            if acc.is_main_process:
                validate(epoch + 1)
                resume.save(folder.path, config.resume, done, epochs, method, plain)


def run(config: FinetuneConfig, out: Path, acc: Accelerator) -> None:
    """Build the parts, train, evaluate."""
    sets, ready = [config.benchmark.shards, *config.benchmark.tests], (acc.is_main_process, acc.wait_for_everyone)
    ensure_sets(sets, config.benchmark.draw, *ready)
    reader, protocol = ShardReader([config.benchmark.shards], "train"), config.benchmark.protocol
    split = hold_out(config.validation, reader.pids, reader.camids, protocol)
    identities = select_identities(config.identities, split.training_pids(reader.pids))
    cameras = max(0, int(reader.camids[identities.rows].max()) + 1)  # 0: nobody knows
    method, start = build_method(config, identities, cameras)
    batch, per_identity = method.epoch(0, identities)[0], config.sampling.images_per_identity
    shard_batch(batch, acc.process_index, acc.num_processes, per_identity)  # refuses what cannot be shared
    folder = RunFolder.open(out, config, acc.is_main_process, FREE_KEYS, {"processes": acc.num_processes})
    acc.print(f"{len(identities.rows)} images of {identities.classes} identities, start: {start}")
    method.to(acc.device)
    facts = {"classes": identities.classes, "cameras": cameras, "ckpt": config.ckpt}
    embed = features.embedder(method, Augment(config.augment), acc, config.benchmark.workers, config.benchmark.flip)

    def save(folder: Path, more: dict[str, Any]) -> None:
        models.save(folder, method, config.method, config.augment, {**facts, **more})

    validation = Validation(config.validation, reader, split, out, protocol)
    if acc.is_main_process:
        (out / "results.json").unlink(missing_ok=True)  # of an earlier launch
        validation.rewind(resume.reached(out))
    validate = functools.partial(validation.after, epochs=config.optim.epochs, embed=embed, save=save)
    train(config, method, reader, identities, folder, acc, validate)
    if acc.is_main_process:
        best = validation.restore(method)
        save(out / "model", best | validation.calibration(embed))
        outcomes = benchmark.run(config.benchmark, config.rerank, embed, out, str(out), facts | best)
        print(*(outcome.sentence for outcome in outcomes), sep="\n")
    acc.wait_for_everyone()


def main() -> None:
    """Entry point."""
    config, out = arguments()
    acc = processes.start(config.precision)
    try:
        run(config, out, acc)
    finally:
        processes.end(acc)


if __name__ == "__main__":
    with plain_errors():
        main()
