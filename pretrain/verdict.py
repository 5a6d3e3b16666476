"""Go or no-go at the end of a run: does its teacher know the images better than the one that it started from?

Both are scored on the same views of the same images (agreement.py); a bootstrap over the images (Efron 1979) says
whether the difference is more than chance. It is a statement about the images, not about a search with labels.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field

from pretrain import checkpoint, committed
from pretrain.agreement import VIEWS, Agreement, Images, Probe, choose_images, measure
from pretrain.backbone import Backbone, timm_arguments
from pretrain.loader import LoaderConfig
from pretrain.modules import Recipe as NetworkRecipe
from pretrain.modules import build_modules
from pretrain.starting import SCRATCH, start_from
from recipes.errors import UserError
from recipes.load import Section
from recipes.progress import Meter
from recipes.record import METRICS, environment, write_json
from shards.cache import CacheConfig
from shards.seeds import generator

VERDICT = "verdict.json"


class VerdictConfig(Section):
    """Go or no-go at the end of a run."""

    enabled: bool = False
    images: int = Field(1024, ge=32)  # scored, at most
    gain: float = Field(0.0, ge=0, lt=1)  # the score must rise by more than this, in mean reciprocal rank
    confidence: float = Field(0.95, gt=0.5, lt=1)  # of the interval of the difference
    resamples: int = Field(1000, ge=100)  # of the bootstrap
    rank_share: float = Field(0.5, ge=0, le=1)  # of the effective rank of the start, below it: collapse
    least_rank: float = Field(2.0, ge=1)  # effective rank, below it: collapse; also after a start from random weights


class Recipe(NetworkRecipe, Protocol):
    """Beside the networks: where a pretraining started and what it saw."""

    ckpt: str
    loader: LoaderConfig
    cache: CacheConfig
    verdict: VerdictConfig


class Teacher(NamedTuple):
    """A teacher that was scored."""

    name: str  # what --ckpt takes
    epochs: float  # of its run; 0 for the start of one
    agreement: Agreement

    def numbers(self) -> dict[str, Any]:
        """For a JSON file."""
        own = self.agreement
        scores = {"score": own.score, "rank1": own.rank1, "effective_rank": own.effective_rank}
        return {"ckpt": self.name, "epochs": self.epochs, **scores}


class Interval(NamedTuple):
    """A mean difference of scores and its confidence interval."""

    mean: float
    low: float
    high: float


class Decision(NamedTuple):
    """What to do, and why."""

    verdict: Literal["GO", "NO-GO", "UNDECIDED"]
    reason: str  # one sentence
    difference: Interval


def interval(before: np.ndarray, after: np.ndarray, confidence: float, resamples: int, seed: int) -> Interval:
    """Percentile bootstrap of mean(after - before), both float [N] of the same images; exact repeat by the seed."""
    change = after - before
    rng = generator(seed, "verdict bootstrap")
    means = [change[rng.integers(len(change), size=len(change))].mean() for _ in range(resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(change.mean()), float(low), float(high))


def decide(
    config: VerdictConfig,
    start: Agreement,
    end: Agreement,
    losses: tuple[float, float] | None,
    trained: bool = True,
    seed: int = 0,
) -> Decision:
    """GO: the score rose by more than `gain`, without signs of collapse. NO-GO: it fell, or there are such signs.

    losses: mean loss at the beginning and at the end of the run, None if not known. trained: whether the start was;
    random weights have a high effective rank, and the rank of a good teacher may be a quarter of theirs.
    """
    change = interval(start.reciprocal, end.reciprocal, config.confidence, config.resamples, seed)
    moved = f"from {start.score:.4f} to {end.score:.4f} (difference between {change.low:+.4f} and {change.high:+.4f})"
    directions = f"its features use {end.effective_rank:.1f} directions, those of the start {start.effective_rank:.1f}"
    floor = max(config.least_rank, config.rank_share * start.effective_rank if trained else 0.0)
    if math.isnan(end.effective_rank):
        return Decision("NO-GO", "Its features are not finite", change)
    if end.effective_rank < floor:
        return Decision(
            "NO-GO", f"Collapse: {directions}, the least allowed is {floor:.1f}; the score went {moved}", change
        )
    if change.high < 0:
        return Decision("NO-GO", f"It knows the images less well than the start: the score fell {moved}", change)
    if change.low <= config.gain:
        more = f" by more than verdict.gain = {config.gain}" if config.gain else ""
        return Decision("UNDECIDED", f"The score did not clearly rise{more}: {moved}; more images may tell", change)
    if losses is not None and not losses[1] < losses[0]:
        told = f"The score rose {moved}, but the loss did not fall: from {losses[0]:.3f} to {losses[1]:.3f}"
        return Decision("UNDECIDED", told, change)
    return Decision("GO", f"It knows the images better than the start: the score rose {moved}; {directions}", change)


def losses_of(run: Path) -> tuple[float, float] | None:
    """Mean loss over the first and the last tenth of the lines of a run; None if it has fewer than two."""
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [loss for line in lines if isinstance(loss := json.loads(line).get("loss"), int | float)]
    if len(found) < 2:
        return None
    tenth = max(1, len(found) // 10)
    return sum(found[:tenth]) / tenth, sum(found[-tenth:]) / tenth


def samples_of(teacher: Path) -> int:
    """Samples that an exported teacher has seen. Damaged (a UserError) where its files are not what was written."""
    facts = committed.read_facts(teacher / checkpoint.CONFIG, sealed=False)
    if committed.FILES in facts:  # before there were sums, a model had none
        committed.check_files(teacher, facts)
    if type(facts.get("samples")) is not int:
        raise committed.Damaged(f"{teacher / checkpoint.CONFIG} does not tell the samples that the teacher has seen")
    return facts["samples"]


def teachers_of(run: Path) -> list[Path]:
    """The exported teachers of a run in the order of their epochs; a snapshot that the last one repeats is left out.

    So is one that is damaged, with a warning. UserError where the last teacher is, or where there are none.
    """
    found = {}
    for folder in [run / "teacher", *sorted((run / "teachers").glob("epoch-*"))]:
        if (folder / checkpoint.WEIGHTS).is_file():
            try:
                found.setdefault(samples_of(folder), folder)
            except committed.Damaged as error:
                if folder.parent == run:
                    raise
                print(f"warning: {folder} is left out of the verdict: {error}", file=sys.stderr, flush=True)
    if not found:
        raise UserError(
            f"{run} holds no teacher: expected {run / 'teacher'} or {run / 'teachers'}/epoch-*, which pretrain/run.py "
            "writes every checkpoint.teacher_every_epochs"
        )
    return [found[samples] for samples in sorted(found)]


def start_of(recipe: Recipe, ckpt: str) -> tuple[Backbone, dict[str, Any]]:
    """The teacher that a run of the recipe would start from with that --ckpt, and the config stored with it."""
    own = Path(ckpt)
    unfinished = checkpoint.states(own / "checkpoints") and not (own / "teacher" / checkpoint.WEIGHTS).is_file()
    if ckpt == SCRATCH or unfinished:
        modules = build_modules(recipe, torch.device("cpu"), 1)
        start_from(ckpt, modules)
        return modules["teacher"].backbone, {}
    return checkpoint.load_backbone(ckpt, timm_arguments(recipe.backbone, recipe.views.global_size))


def score(
    recipe: Recipe, start: str | None, folders: Sequence[Path], images: Images, accelerator: Accelerator
) -> list[Teacher]:
    """The start (a --ckpt, None for none) and the exported teachers of `folders`, each scored on the same views."""
    probe, normal = Probe(images, recipe.views, recipe.seed), recipe.photometric
    found = []
    with Meter(len(probe) * (len(folders) + (start is not None)), "score") as meter:

        def add(name: str, backbone: Backbone, stored: dict[str, Any], epochs: float) -> None:
            colours = stored.get("normalize") or {"mean": normal.mean, "std": normal.std}
            both = (colours["mean"], colours["std"])
            found.append(
                Teacher(name, epochs, measure(backbone, probe, both, recipe.loader.workers, accelerator, meter))
            )

        if start is not None:
            add(start, *start_of(recipe, start), 0.0)
        for folder in folders:
            backbone, stored = checkpoint.load_backbone(folder)
            add(str(folder), backbone, stored, stored["epochs"])
    return found


def judge(recipe: Recipe, run: Path, out: Path, teachers: Sequence[Teacher], images: Images) -> dict[str, Any]:
    """Write OUT/verdict.json and return it. teachers: as `score` gives them, the start first, the last one last.

    The best of several snapshots is best by chance, too: it is compared at a confidence that allows for their number.
    """
    config, (start, *own) = recipe.verdict, teachers
    end, losses, trained = own[-1], losses_of(run), start.name != SCRATCH
    best = max(own, key=lambda teacher: teacher.agreement.score)
    decision = decide(config, start.agreement, end.agreement, losses, trained, recipe.seed)
    strict = config.model_copy(update={"confidence": 1 - (1 - config.confidence) / len(own)})
    instead = decide(strict, start.agreement, best.agreement, losses, trained, recipe.seed)
    settings = (strict.confidence, strict.resamples, recipe.seed)
    above = interval(end.agreement.reciprocal, best.agreement.reciprocal, *settings)
    take, reason = (end.name if decision.verdict == "GO" else start.name), decision.reason
    if best is not end and instead.verdict == "GO" and (decision.verdict != "GO" or above.low > 0):
        take = best.name
        reason += f"; {best.name} is better than both (score {best.agreement.score:.4f})"
    told = {
        "verdict": decision.verdict,
        "reason": reason,
        "take": take,
        "difference": decision.difference._asdict(),
        "start": start.numbers(),
        "end": end.numbers(),
        "best": best.numbers(),
        "loss": None if losses is None else dict(zip(("begin", "end"), losses, strict=True)),
        "teachers": [teacher.numbers() for teacher in teachers],
        "images": {"count": len(end.agreement.reciprocal), "views": VIEWS, "kind": images.kind, "seed": recipe.seed},
        "verdict_config": config.model_dump(),
        "versions": environment()["versions"],
    }
    write_json(out / VERDICT, told)
    return told


def sentence(told: dict[str, Any]) -> str:
    """A verdict for people."""
    advice = "nothing is gained by it, stay with" if told["take"] == told["start"]["ckpt"] else "take"
    return f"verdict: {told['verdict']}. {told['reason']}. {advice.capitalize()} {told['take']}"


def conclude(recipe: Recipe, out: Path, accelerator: Accelerator) -> None:
    """At the end of the run in `out`: score its start and its teachers, write OUT/verdict.json and print the verdict.

    Does nothing without `verdict.enabled`, and on other processes than the main one.
    """
    if not (recipe.verdict.enabled and accelerator.is_main_process):
        return
    images = choose_images(recipe.loader, recipe.cache, recipe.verdict.images, recipe.seed)
    found = score(recipe, recipe.ckpt, teachers_of(out), images, accelerator)
    print(sentence(judge(recipe, out, out, found, images)), flush=True)
