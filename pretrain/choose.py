"""Which teacher of a pretraining to take: each one is scored without labels, by how well it knows an image again.

    python pretrain/choose.py runs/vits16
    python pretrain/choose.py runs/mine --against runs/vits16/teacher        also: was it worth it? go or no-go
    python pretrain/choose.py runs/vits16 --shards data/mine --images 4096   on images of another set

The images are those that a random `loader.keep` left out of the training, else training images in new views; what they
are is printed. Writes OUT/choice.json, OUT/choice.png (score against epochs) and, with --against, OUT/verdict.json.
A run that is under way can be looked at as well. docs/adapting.md tells how far the score is to be trusted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pretrain import processes, verdict
from pretrain.agreement import SCALE, VIEWS, Images, choose_images
from pretrain.config import PretrainConfig
from pretrain.verdict import Interval, Teacher, interval
from recipes.errors import UserError, plain_errors
from recipes.load import load
from recipes.record import RECIPE, environment, write_json


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a pretraining")
    parser.add_argument("--shards", nargs="+", default=[], help="sets to take the images from; default: see above")
    parser.add_argument("--images", type=int, default=2048, help="at most; default: 2048")
    parser.add_argument(
        "--against", metavar="CKPT", help="what the run started from: judge its last teacher against it"
    )
    parser.add_argument("--out", type=Path, help="folder for the results; default: RUN")
    given = parser.parse_args()
    if not (given.run / RECIPE).is_file():
        raise UserError(f"{given.run} is no run folder of pretrain/run.py: it has no {RECIPE}")
    return given


def doubts(teachers: Sequence[Teacher], best: Teacher, config: PretrainConfig) -> list[Interval]:
    """By how much the best teacher scores above each, with the interval of the recipe's verdict section."""
    settings = (config.verdict.confidence, config.verdict.resamples, config.seed)
    return [interval(teacher.agreement.reciprocal, best.agreement.reciprocal, *settings) for teacher in teachers]


def show(run: Path, teachers: Sequence[Teacher], best: Teacher, below: Sequence[Interval], images: Images) -> None:
    """One row a teacher; those of the run by their names in it."""
    table = Table(title=f"{len(best.agreement.reciprocal):,} images: {images.kind}")
    for column in ("epochs", "teacher", "score", "Rank-1", "effective rank", ""):
        table.add_column(column, justify="left" if column in ("teacher", "") else "right", overflow="fold")
    for teacher, gap in zip(teachers, below, strict=True):
        own = teacher.agreement
        note = "best" if teacher is best else "as good" if gap.low <= 0 else ""
        scores = (f"{own.score:.4f}", f"{100 * own.rank1:.1f} %", f"{own.effective_rank:.1f}")
        table.add_row(f"{teacher.epochs:.2f}", teacher.name.removeprefix(f"{run}/"), *scores, note)
    Console().print(table)


def curve(path: Path, teachers: Sequence[Teacher], best: Teacher, below: Sequence[Interval]) -> None:
    """Score against epochs; the bars are the interval of the difference to the best teacher."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="epochs", ylabel="score (mean reciprocal rank)")
    epochs, scores = [t.epochs for t in teachers], np.array([t.agreement.score for t in teachers])
    bars = np.abs(np.array([(gap.mean - gap.low, gap.high - gap.mean) for gap in below]).T[::-1])
    axes.errorbar(epochs, scores, yerr=bars, marker="o", capsize=3)
    axes.plot(
        best.epochs, best.agreement.score, marker="o", markersize=12, fillstyle="none", color="black", label="best"
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def record(out: Path, best: Teacher, teachers: Sequence[Teacher], below: Sequence[Interval], images: Images) -> None:
    """Write choice.json."""
    rows = [t.numbers() | {"below_best": gap._asdict()} for t, gap in zip(teachers, below, strict=True)]
    facts: dict[str, Any] = {
        "chosen": best.name,
        "as_good": [row["ckpt"] for row in rows if row["below_best"]["low"] <= 0 and row["ckpt"] != best.name],
        "teachers": rows,
        "images": {"count": len(best.agreement.reciprocal), "kind": images.kind, "set": images.reader.identity},
        "views": {"count": VIEWS, "scale": SCALE},
    }
    write_json(out / "choice.json", facts | {"environment": environment()})


def choose(given: argparse.Namespace, config: PretrainConfig, accelerator: Accelerator) -> None:
    """Score, show, record, judge."""
    out = given.out or given.run
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; results go into a folder")
    folders = verdict.teachers_of(given.run)
    images = choose_images(config.loader, config.cache, given.images, config.seed, given.shards)
    teachers = verdict.score(config, given.against, folders, images, accelerator)
    own = teachers[1:] if given.against is not None else teachers
    best = max(own, key=lambda teacher: teacher.agreement.score)
    below = doubts(teachers, best, config)
    show(given.run, teachers, best, below, images)
    out.mkdir(parents=True, exist_ok=True)
    record(out, best, teachers, below, images)
    curve(out / "choice.png", teachers, best, below)
    print(f"results: {out / 'choice.json'}, {out / 'choice.png'}")
    take = best.name
    if given.against is not None:
        told = verdict.judge(config, given.run, out, teachers, images)
        print(verdict.sentence(told))
        take = told["take"]
    print(f"next: python finetune/run.py --ckpt {take}, with the --recipe of your labelled set")


def main() -> None:
    """Entry point."""
    given = arguments()
    config = load(PretrainConfig, given.run / RECIPE)
    accelerator = processes.start(config.precision)
    if accelerator.is_main_process:  # one process is enough: the images are few
        choose(given, config, accelerator)


if __name__ == "__main__":
    with plain_errors():
        main()
