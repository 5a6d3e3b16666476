"""Evaluate a model by retrieval, without training.

    python finetune/eval.py --ckpt runs/market --data data/market1501       a fine-tuned model, or a teacher as it is
    python finetune/eval.py --ckpt runs/market --data data/duke --data data/cuhk03_np      several test sets
    python finetune/eval.py --ckpt runs/smoke/teacher            on drawn figures: cosine of its CLS tokens
    python finetune/eval.py --ckpt none                          random weights
    python finetune/eval.py --ckpt histogram                     no network: colour histograms of eight stripes
    python finetune/eval.py --ckpt runs/market --data data/market1501 --rerank benchmark.flip=true
    python finetune/eval.py --ckpt runs/market --data data/own --calibrate     same person? a threshold for search.py
    python finetune/eval.py --follow runs/pretrain --data data/market1501      each teacher of a running pretraining

--data takes a packed set, an URL or SOURCE:PATH, and needs no recipe: the model then gets the input size that it was
trained with. Writes OUT/table.md (the numbers with their confidence), OUT/results.json (everything), OUT/queries.csv
(a row a query), OUT/nearest.json, OUT/strips.png, OUT/distances.png, OUT/cameras.png, OUT/embeddings; with several test
sets these lie in OUT/<set>. docs/evaluation.md explains them, docs/following.md --follow.
"""

import argparse
import json
from pathlib import Path

from accelerate import Accelerator

from finetune import benchmark, curve, features, follow, models, stored_calibration, text_benchmark
from finetune.augment import Augment
from finetune.config import FinetuneConfig
from finetune.metrics import Retrieval
from finetune.short_finetune import ShortFinetune
from pretrain import processes
from recipes.errors import UserError, plain_errors
from recipes.load import load, recipe_path
from shards.on_demand import ensure_sets

FIGURES = str(recipe_path("finetune/figures.yaml"))
HISTOGRAM = "histogram"  # `--ckpt histogram`: no network
# with --data alone: the recipe of the figures is for tiny models, and draws what is missing
UNDRAWN, WITHOUT_RECIPE = "benchmark.draw=null", ("precision=bf16", "benchmark.workers=2")


def arguments() -> tuple[argparse.Namespace, FinetuneConfig]:
    """The command line and the resolved recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", help="run folder, model folder, file of others, timm:NAME, none or histogram")
    what.add_argument("--follow", type=Path, metavar="RUN", help="a pretraining: score its teachers as they come")
    parser.add_argument("--recipe", help="YAML; default: drawn figures, or with --data what the model stores")
    parser.add_argument("--data", action="append", help="set to search instead of the recipe's; give it again for more")
    parser.add_argument("--out", type=Path, help="folder for the results; default: runs/eval-<ckpt>, RUN/follow/<set>")
    parser.add_argument("--rerank", action="store_true", help="also with k-reciprocal re-ranking: rerank.k1=20")
    parser.add_argument("--calibrate", action="store_true", help="store the threshold for `same person` in the model")
    parser.add_argument("--once", action="store_true", help="with --follow: score what is there, do not wait for more")
    parser.add_argument("--poll", type=float, default=60, metavar="S", help="with --follow: seconds between two looks")
    parser.add_argument("--finetune-epochs", type=int, metavar="N", help="with --follow: also fine-tune each teacher")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a key of the recipe")
    given = parser.parse_intermixed_args()  # an override may stand before and after an option
    short = [f"benchmark.tests={json.dumps(given.data)}", UNDRAWN] if given.data else []
    short += WITHOUT_RECIPE if stored_size(given) else []
    short += ["rerank.k1=20"] if given.rerank else []
    config = load(FinetuneConfig, given.recipe or FIGURES, [*short, *given.overrides])
    refuse(given, config)
    return given, config


def stored_size(given: argparse.Namespace) -> bool:
    """Whether the model tells the size of its input, and not a recipe."""
    return bool(given.data) and not given.recipe


def refuse(given: argparse.Namespace, config: FinetuneConfig) -> None:
    """Raise for what the command line asks and cannot have, before anything is computed."""
    several, epochs = len(config.benchmark.sets) > 1, given.finetune_epochs
    faults = {
        "--ckpt none with --data needs a --recipe: it says which network gets random weights": stored_size(given)
        and given.ckpt == models.SCRATCH,
        "--calibrate takes one --ckpt and one test set, and no benchmark.flip, which search.py has not": given.calibrate
        and (several or given.follow or config.benchmark.flip),
        "--follow scores on one test set; give --data once": given.follow and several,
        "--once and --finetune-epochs belong to --follow RUN": not given.follow and (given.once or epochs is not None),
        "--finetune-epochs takes 1 or more, and a --recipe to fine-tune by": epochs is not None
        and (epochs < 1 or not given.recipe),
        "--poll takes a number of seconds above 0": not given.poll > 0,
        f"--out {given.out} is a file; results go into a folder": given.out and given.out.is_file(),
    }
    for sentence, wrong in faults.items():
        if wrong:
            raise UserError(sentence)
    if given.calibrate:
        stored_calibration.own_folder(given.ckpt)


def embedder(ckpt: str, config: FinetuneConfig, stored: bool, accelerator: Accelerator) -> benchmark.Embed:
    """The function from a reader to its features that `--ckpt` names. stored: see stored_size."""
    if ckpt == HISTOGRAM:
        return features.histogram_split
    if stored:
        model, augment = models.load_stored(ckpt)
    else:
        model, augment = models.load_embedder(ckpt, config.backbone, config.augment, config.seed)
    settings = config.benchmark.workers, config.benchmark.flip
    return features.Embedder(model.to(accelerator.device), Augment(augment), accelerator, *settings)


def short_finetune(given: argparse.Namespace, config: FinetuneConfig, out: Path) -> ShortFinetune:
    """--finetune-epochs: the recipe, with its warm-up shortened alike."""
    warmup = round(config.optim.warmup_epochs * given.finetune_epochs / config.optim.epochs)
    data = [f"benchmark.shards={json.dumps(given.data[0])}", UNDRAWN] if given.data else []
    length = [f"optim.epochs={given.finetune_epochs}", f"optim.warmup_epochs={warmup}"]
    return ShortFinetune(given.recipe, [*data, *given.overrides, *length], out / "finetune")


def watch(given: argparse.Namespace, config: FinetuneConfig, accelerator: Accelerator) -> None:
    """--follow: score the teachers of a pretraining as they come."""
    (data,) = config.benchmark.sets
    out = given.out or given.follow / "follow" / benchmark.names([data])[0]
    finetune = short_finetune(given, config, out) if given.finetune_epochs else None
    facts = {"data": data, **config.benchmark.model_dump(include={"protocol", "flip"}), "precision": config.precision}
    if not stored_size(given):
        facts["input"] = list(config.augment.size)

    def score(teacher: Path) -> Retrieval:
        embed = embedder(str(teacher), config, stored_size(given), accelerator)
        return benchmark.score(data, embed, config.benchmark.protocol)

    print(curve.sentence(follow.follow(given.follow, score, out, given.once, given.poll, finetune, facts), out))


def main() -> None:
    """Entry point."""
    given, config = arguments()
    accelerator = processes.start(config.precision)
    main_process = accelerator.is_main_process
    ensure_sets(config.benchmark.sets, config.benchmark.draw, main_process, accelerator.wait_for_everyone)
    if not main_process:
        return  # one process is enough: the test sets are small against the training
    if given.follow:
        watch(given, config, accelerator)
        return
    out = given.out or Path("runs") / f"eval-{Path(given.ckpt).name}"
    embed = embedder(given.ckpt, config, stored_size(given), accelerator)
    what = config.benchmark, config.rerank, embed, out, given.ckpt, {"ckpt": given.ckpt}
    outcomes = text_benchmark.run(*what) if text_benchmark.reads_text(embed) else benchmark.run(*what)
    print(*(outcome.sentence for outcome in outcomes), sep="\n")
    if given.calibrate:
        print(f"stored in {stored_calibration.store(given.ckpt, outcomes[0].calibration())}: the threshold")


if __name__ == "__main__":
    with plain_errors():
        main()
