"""Evaluate a model by retrieval, without training.

    python finetune/eval.py --ckpt runs/market                       a fine-tuned model
    python finetune/eval.py --ckpt runs/smoke/teacher                a teacher as it is: cosine of its CLS tokens
    python finetune/eval.py --ckpt none                              random weights
    python finetune/eval.py --ckpt histogram                         no network: colour histograms of eight stripes
    python finetune/eval.py --ckpt runs/market benchmark.shards=data/other      another test set

Writes OUT/results.json (mAP, Rank-k, mINP, the AP of every query), OUT/nearest.json, OUT/strips.png, OUT/embeddings.
"""

import argparse
from pathlib import Path

from finetune import benchmark, features, models
from finetune.augment import Augment
from finetune.config import FinetuneConfig
from pretrain import processes
from recipes.errors import UserError, plain_errors
from recipes.load import load, recipe_path
from shards.on_demand import ensure_sets


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ckpt", required=True, help="run folder, model folder, file of others, timm:NAME, none or histogram"
    )
    parser.add_argument("--recipe", default=str(recipe_path("finetune/figures.yaml")), help="YAML; default: figures")
    parser.add_argument("--out", type=Path, help="folder for the results; default: runs/eval-<ckpt>")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a key of the recipe")
    given = parser.parse_intermixed_args()  # an override may stand before and after an option
    config = load(FinetuneConfig, given.recipe, given.overrides)
    out = given.out or Path("runs") / f"eval-{Path(given.ckpt).name}"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; results go into a folder")
    accelerator = processes.start(config.precision)
    main_process = accelerator.is_main_process
    ensure_sets([config.benchmark.shards], config.benchmark.draw, main_process, accelerator.wait_for_everyone)
    if not main_process:
        return  # one process is enough: the test sets are small against the training
    if given.ckpt == "histogram":
        embed = features.histogram_split
    else:
        model, augment = models.load_embedder(given.ckpt, config.backbone, config.augment, config.seed)
        embed = features.embedder(model.to(accelerator.device), Augment(augment), accelerator, config.benchmark.workers)
    tables = benchmark.Tables(config.benchmark, embed)
    out.mkdir(parents=True, exist_ok=True)
    tables.save(out / "embeddings")
    facts = {"ckpt": given.ckpt, "shards": config.benchmark.shards}
    print(benchmark.sentence(benchmark.report(tables, out, given.ckpt, facts)))


if __name__ == "__main__":
    with plain_errors():
        main()
