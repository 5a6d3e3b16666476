"""Fine-tune a pretrained teacher for person re-identification, then evaluate it by retrieval.

    python finetune/run.py --ckpt runs/smoke                     BoT on drawn figures, from that run's teacher
    python finetune/run.py --ckpt none                           the same from random weights
    python finetune/run.py --ckpt runs/pretrain --recipe recipes/finetune/bot_market1501.yaml --out runs/market \\
        benchmark.shards=data/market1501

--ckpt takes a run folder, its `teacher` folder, or what docs/checkpoints.md lists. Results: OUT/model,
OUT/results.json, OUT/nearest.json (the neighbours of each query) and OUT/strips.png (ranked lists).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from finetune import benchmark, features, models, optim, views
from finetune.augment import Augment
from finetune.config import FinetuneConfig
from finetune.identities import Identities, select_identities
from finetune.methods import build
from finetune.methods.base import ImageBatch, Method, Parts
from finetune.sampling import shard_batch
from pretrain import processes
from recipes.errors import UserError, plain_errors
from recipes.load import load, recipe_path
from recipes.progress import Meter
from recipes.record import RunFolder
from shards.on_demand import ensure_sets
from shards.reader import ShardReader

FREE_KEYS = ("benchmark.workers", "log_every")  # they do not change what is computed


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


def build_method(config: FinetuneConfig, identities: Identities) -> tuple[Method, str]:
    """The method on the backbone of config.ckpt, and what that is; fresh weights are the same on all processes."""
    size = (config.augment.height, config.augment.width)
    backbone, stored = models.start_backbone(config.ckpt, config.backbone, size, config.seed)
    torch.manual_seed(config.seed)
    method = build(config.method, Parts(backbone, identities.classes, config.sampling, config.seed))
    return method, stored.get("source", config.ckpt)


def train(config: FinetuneConfig, method: Method, identities: Identities, folder: RunFolder, acc: Accelerator) -> None:
    """The loop: batches of the epoch -> named losses -> backward -> step."""
    reader = ShardReader([config.benchmark.shards], "train")
    augment = Augment(config.augment)
    dataset = views.TrainViews(reader, identities, augment, config.seed, len(method.backbone.drops))
    sampler, rank, ranks = views.Places(), acc.process_index, acc.num_processes
    loader = views.build_loader(dataset, sampler, config.benchmark.workers)
    optimisers = [acc.prepare(optim.build_optimizer(part, config.optim)) for part in method.optimisers()]
    wrapped = acc.prepare(method)
    per_identity, step = config.sampling.images_per_identity, 0
    total = config.optim.epochs * method.epoch(0, identities).size
    with Meter(total, "fine-tune", silent=not acc.is_main_process) as meter:
        for epoch in range(config.optim.epochs):
            batches = method.epoch(epoch, identities)
            sampler.batches = views.places(epoch, batches, per_identity, rank, ranks)
            method.train()
            for number, batch in enumerate(loader):
                moment = epoch + number / len(batches)
                rates = [optim.set_rate(optimiser, moment, config.optim) for optimiser in optimisers]
                on_device = ImageBatch(batch.images.to(acc.device), batch.labels.to(acc.device), batch.drops)
                with acc.autocast():
                    losses = wrapped(on_device)
                loss = sum(losses.values())
                acc.backward(loss)
                for optimiser in optimisers:
                    optimiser.step()
                    optimiser.zero_grad()
                method.end_step()
                note = ""
                if step % config.log_every == 0:
                    note = record(folder, acc, step, epoch, {"loss": loss, **losses}, rates[0])
                meter.advance(batches.shape[1], note)
                step += 1


def record(
    folder: RunFolder, acc: Accelerator, step: int, epoch: int, losses: dict[str, torch.Tensor], rate: float
) -> str:
    """Log the losses, averaged over the processes; returns what the progress shows."""
    means = acc.reduce(torch.stack([value.detach().float() for value in losses.values()]), "mean").tolist()
    if not np.isfinite(means).all():
        raise UserError(f"step {step}: the loss is not finite; lower optim.lr (now {rate:.2g}) or set precision=no")
    folder.log({"step": step, "epoch": epoch, "lr": rate, **dict(zip(losses, means, strict=True))})
    return f"loss {means[0]:.3f}"


def main() -> None:
    """Entry point."""
    config, out = arguments()
    acc = processes.start(config.precision)
    ensure_sets([config.benchmark.shards], config.benchmark.draw, acc.is_main_process, acc.wait_for_everyone)
    identities = select_identities(config.identities, ShardReader([config.benchmark.shards], "train").pids)
    method, start = build_method(config, identities)
    batch, per_identity = method.epoch(0, identities)[0], config.sampling.images_per_identity
    shard_batch(batch, acc.process_index, acc.num_processes, per_identity)  # refuses what cannot be shared
    folder = RunFolder.open(out, config, acc.is_main_process, FREE_KEYS, {"processes": acc.num_processes})
    folder.rewind(-1)  # a fine-tune starts from its first step
    if acc.is_main_process:
        (out / "results.json").unlink(missing_ok=True)  # of an earlier launch
    acc.print(f"{len(identities.rows)} images of {identities.classes} identities, start: {start}")
    method.to(acc.device)
    train(config, method, identities, folder, acc)
    if acc.is_main_process:
        facts = {"classes": identities.classes, "ckpt": config.ckpt}
        models.save(out / "model", method, config.method, config.augment, facts)
        embed = features.embedder(method, Augment(config.augment), acc, config.benchmark.workers)
        tables = benchmark.Tables(config.benchmark, embed)
        tables.save(out / "embeddings")
        acc.print(benchmark.sentence(benchmark.report(tables, out, str(out), facts)))
    acc.wait_for_everyone()
    acc.end_training()


if __name__ == "__main__":
    with plain_errors():
        main()
