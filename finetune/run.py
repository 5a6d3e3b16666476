"""Fine-tune a pretrained teacher for person re-identification, then evaluate it by retrieval.

    python finetune/run.py --ckpt runs/smoke                     BoT on drawn figures, from that run's teacher
    python finetune/run.py --ckpt none                           the same from random weights
    python finetune/run.py --ckpt runs/pretrain --recipe recipes/finetune/bot_market1501.yaml --out runs/market

Writes OUT/model, its evaluation and OUT/report.html (docs/finetuning.md). The same command goes on after a kill.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from finetune import features, models, optim, page, resume, shared_work, text_benchmark, unlabelled, views
from finetune.augment import Augment
from finetune.config import FinetuneConfig
from finetune.identities import Identities, select_identities
from finetune.journal import Journal
from finetune.methods import build, reads_captions
from finetune.methods.base import Features, Method, Parts
from finetune.page_run import FINETUNE, open_run
from finetune.sampling import shard_batch
from finetune.validation import Validation, hold_out
from pretrain import processes
from pretrain.ranks import EVALUATION, Ranks
from recipes.errors import plain_errors
from recipes.load import load, recipe_path
from recipes.progress import Meter
from recipes.record import RunFolder
from shards.on_demand import ensure_sets
from shards.reader import ShardReader


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


def train(
    config: FinetuneConfig, method: Method, reader: ShardReader, identities: Identities, keeper: resume.Keeper,
    start: resume.Position, journal: Journal, ranks: Ranks, hooks: tuple[Features, Callable[[int], object]],
) -> None:  # fmt: skip
    """The loop: plan of the epoch -> named losses -> backward -> step. hooks: features now; told of the epochs done."""
    acc, done, epochs = journal.accelerator, start, config.optim.epochs
    dataset = views.TrainViews(reader, identities, Augment(config.augment), config.seed, method.draws)
    sampler, share = views.Places(), (config.sampling.images_per_identity, acc.process_index, acc.num_processes)
    loader = views.build_loader(dataset, sampler, config.benchmark.workers)
    optimisers, wrapped = [acc.prepare(optimiser) for optimiser in keeper.trained[1]], acc.prepare(method)
    ranks.watch(*method.watched)  # not the method, which may wait in its forward for the others
    for epoch in range(done.epoch, epochs):
        with ranks.phase(EVALUATION):
            plan = method.epoch(epoch, identities, hooks[0])
        plan.tell(journal.folder, done.step, epoch)
        sampler.batches, length = views.places(epoch, plan, *share)[done.batch :], len(plan.batches)
        method.train()
        for number, batch in enumerate(ranks.waited_for(loader), start=done.batch):
            rates = [optim.set_rate(each, epoch + number / length, config.optim, length) for each in optimisers]
            views.seed_torch(config.seed, done.step, acc.process_index)
            with acc.autocast():
                losses = wrapped(batch.to(acc.device))
            loss = sum(losses.values())
            acc.backward(loss)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            method.end_step()
            journal.record(done.step, epoch, {"loss": loss, **losses}, rates[0], number == length - 1)
            journal.meter.advance(plan.batches.shape[1])
            done = resume.Position(epoch, done.step + 1, done.images + plan.batches.shape[1], number + 1)
            if ranks.stop_after(done.step):
                keeper.after(done, stop=True)
                raise ranks.stopped()
        if acc.is_main_process:
            with ranks.phase(EVALUATION):
                hooks[1](epoch + 1)
        done = resume.Position(epoch + 1, done.step, done.images)
        with ranks.phase("checkpoint"):
            keeper.after(done)
    ranks.done()


def run(config: FinetuneConfig, out: Path, acc: Accelerator, ranks: Ranks) -> None:
    """Build the parts, train, evaluate."""
    data = config.benchmark
    ensure_sets([data.shards, *data.tests], data.draw, acc.is_main_process, acc.wait_for_everyone)
    reader = unlabelled.open_split(data.shards, config.identities, config.validation, reads_captions(config.method))
    split = hold_out(config.validation, reader.pids, reader.camids, data.protocol)
    identities = select_identities(config.identities, split.training_pids(reader.pids), reader.camids)
    cameras = max(0, int(identities.cameras.max()) + 1)  # 0: nobody knows
    backbone, stored = models.start_backbone(config.ckpt, config.backbone, config.augment.size, config.seed)
    torch.manual_seed(config.seed)  # fresh weights are the same on all processes
    captions = partial(text_benchmark.read_captions, reader, identities.rows)
    method = build(config.method, Parts(backbone, identities.classes, cameras, config.sampling, config.seed, captions))
    length, size = method.shape(identities)
    shard_batch(range(size), acc.process_index, acc.num_processes, config.sampling.images_per_identity)  # or refuse
    folder = RunFolder.open(out, config, acc.is_main_process, resume.FREE_KEYS, {"processes": acc.num_processes})
    acc.print(f"{identities.sentence}, start: {stored.get('source', config.ckpt)}{method.told_streams}")
    facts = {"classes": identities.classes, "cameras": cameras, "ckpt": config.ckpt}
    embed = features.Embedder(method.to(acc.device), Augment(config.augment), acc, data.workers, data.flip)

    def save(folder: Path, more: dict[str, Any]) -> None:
        models.save(folder, method, config.method, config.augment, {**facts, **more})

    plain, epochs = [optim.build_optimizer(part, config.optim) for part in method.optimisers()], config.optim.epochs
    recipe = config.model_dump(mode="json"), resume.FREE_KEYS
    keeper = resume.Keeper(out, config.resume, epochs, method, plain, recipe, method.apart())
    done = keeper.restore(acc)
    folder.rewind(done.step - 1)
    validation = Validation(config.validation, reader, split, out, data.protocol, text_benchmark.scorer(method))
    if acc.is_main_process:
        (out / "results.json").unlink(missing_ok=True)  # of an earlier launch
        validation.rewind(done.epoch)
    total = done.images + ((epochs - done.epoch) * length - done.batch) * size
    with Meter(total, "fine-tune", start=done.images, silent=not acc.is_main_process) as meter:
        journal = Journal(folder, acc, meter, config.log_every)
        every = partial(shared_work.embed_together, embed, reader, identities.rows, acc)
        hooks = every, partial(validation.after, epochs=epochs, embed=embed, save=save)
        train(config, method, reader, identities, keeper, done, journal, ranks, hooks)
    if acc.is_main_process:
        best = validation.restore(method)
        save(out / "model", best | validation.calibration(embed))
        text_benchmark.measure(config.identities, data, config.rerank, embed, out, facts | best)
        folder.close()
        page.write([open_run(out)], {FINETUNE: FinetuneConfig}, out / page.NAME)
    acc.wait_for_everyone()


def main() -> None:
    """Entry point."""
    config, out = arguments()
    with processes.running(config.precision) as acc, Ranks(config.ranks, acc, out) as ranks:
        run(config, out, acc, ranks)


if __name__ == "__main__":
    with plain_errors():
        main()
