"""A run folder as its page sees it: what kind it is, how far it came, what it left behind."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune import page_metrics, page_results
from finetune.page_metrics import Metrics
from finetune.page_results import (
    Best,
    Follow,
    LeftOut,
    Notes,
    Result,
    RollBacks,
    Several,
    Snapshot,
    Stop,
    Validation,
    Verdict,
)  # fmt: skip
from pretrain.gaps import SKIPPED
from pretrain.stopping import STOPPED
from pretrain.verdict import VERDICT
from recipes import locks
from recipes.errors import UserError
from recipes.load import Section, load
from recipes.record import ENVIRONMENT, LOCK, METRICS, RECIPE

PRETRAINING, FINETUNE, EVALUATION = "pretraining", "fine-tune", "evaluation"
RESULTS = "results.json"
Kind = Literal["pretraining", "fine-tune", "evaluation"]
Standing = Literal["finished", "going", "stopped", "broken off"]
PLAIN_NAME = re.compile(r"(?!\.)[^/\\\x00]{1,255}")  # of a folder in this one
MOST_SETS = 20  # of an evaluation, or that a pretraining was followed with


class AnyRecipe(Section, extra="allow"):
    """A recipe of any version, by the reader that refuses hostile YAML."""


@dataclass(frozen=True)
class Searched:
    """A set that was searched."""

    folder: Path  # with its files
    result: Result


@dataclass(frozen=True)
class Followed:
    """The teachers of a pretraining, scored on one set."""

    name: str  # of the set's folder
    follow: Follow
    best: Best | None


@dataclass
class Run:
    """Everything about a run but its pictures; built by `open_run`."""

    folder: Path
    kind: Kind
    notes: Notes = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    searched: list[Searched] = field(default_factory=list)
    followed: list[Followed] = field(default_factory=list)
    validation: Validation | None = None
    verdict: Verdict | None = None
    roll_backs: list[LeftOut] = field(default_factory=list)
    stop: Stop | None = None
    faults: list[str] = field(default_factory=list)  # files about values that were not finite
    images_per_epoch: float | None = None  # of a pretraining, where it is known
    ended: bool = False
    locked: bool = False  # by a process that is at work here

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def standing(self) -> Standing:
        """Where the run stands."""
        if self.kind == EVALUATION:
            return "finished"
        if self.locked:
            return "going"
        if self.stop:
            return "stopped"
        return "finished" if self.ended else "broken off"

    def key(self, dotted: str, default: Any = None) -> Any:
        """A value of the recipe."""
        node: Any = self.recipe
        for name in dotted.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return default if node is None else node

    def number(self, dotted: str, default: float) -> float:
        """A number of the recipe."""
        value = self.key(dotted)
        return value if type(value) in (int, float) and abs(value) < page_metrics.LARGEST else default


def _children(folder: Path, notes: Notes) -> list[Path]:
    """The folders in a folder, by name; none where it is missing."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        notes.append(f"{folder.name} cannot be read: {error.strerror}.")
        return []


def _recipe(path: Path, notes: Notes) -> dict[str, Any] | None:
    """The resolved recipe; None where there is none, {} where it is damaged, which is noted."""
    if not path.is_file():
        return None
    try:
        return dict(load(AnyRecipe, path).model_extra or {})
    except UserError as error:
        told = str(error).replace(str(path), path.name)
        notes.append(f"The recipe cannot be read: {told[:300]}.")
    except OSError as error:
        notes.append(f"The recipe cannot be read: {error.strerror}.")
    return {}


def _kind(folder: Path, recipe: dict[str, Any] | None) -> Kind:
    if recipe is not None:
        clues = recipe or {name: 1 for name in ("heads", "sampling") if _left_by(folder, name)}
        if "heads" in clues or "schedules" in clues:
            return PRETRAINING
        if "sampling" in clues or "identities" in clues:
            return FINETUNE
        raise UserError(f"{folder / RECIPE} is no recipe of a pretraining and none of a fine-tune")
    if (folder / RESULTS).is_file():
        return EVALUATION
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a run of pretrain/run.py or finetune/run.py, or an evaluation")
    parent = next((up for up in folder.resolve().parents if (up / RECIPE).is_file()), None)
    more = f"; perhaps you mean {os.path.relpath(parent)}" if parent else ""
    raise UserError(f"{folder} holds neither {RECIPE} nor {RESULTS}: it is no run and no evaluation{more}")


def _left_by(folder: Path, section: str) -> bool:
    """Whether a run whose recipe is damaged looks like one with this section."""
    return (folder / ("teachers" if section == "heads" else RESULTS)).exists()


def _searched(folder: Path, notes: Notes) -> Iterator[Searched]:
    """What results.json tells, of several sets each with its own file where that is there."""
    several = page_results.read(folder / RESULTS, Several, notes)
    if several is None:
        return
    if not several.sets:
        one = page_results.read(folder / RESULTS, Result, notes)
        if one is not None and one.mAP is not None:
            yield Searched(folder, one)
        return
    for name, short in list(several.sets.items())[:MOST_SETS]:
        own = folder / (name if PLAIN_NAME.fullmatch(name) else "results of a set without a name")
        whole = page_results.read(own / RESULTS, Result, notes) if (own / RESULTS).is_file() else None
        yield Searched(own, whole or short)


def _is_locked(path: Path) -> bool:
    """Whether a process is at work in the folder."""
    try:
        descriptor = locks.take(path, os.O_RDONLY)
    except OSError:  # no such file, or a file system without locks: nobody is known to be there
        return False
    if descriptor is None:
        return True
    locks.release(descriptor)
    return False


def _pretraining(run: Run) -> None:
    """What only a pretraining has."""
    folder, notes = run.folder, run.notes
    for own in _children(folder / "follow", notes)[:MOST_SETS]:
        follow = page_results.read(own / "curve.json", Follow, notes)
        if follow and follow.teachers:
            run.followed.append(Followed(own.name, follow, page_results.read(own / "best.json", Best, notes)))
    run.verdict = page_results.read(folder / VERDICT, Verdict, notes)
    left_out = page_results.read(folder / SKIPPED, RollBacks, notes)
    run.roll_backs = left_out.skipped if left_out else []
    run.faults = sorted(path.name for path in (folder / "faults").glob("step-*.json"))
    run.ended = (folder / "teacher" / "config.json").is_file()
    exported = [folder / "teacher", *reversed(_children(folder / "teachers", notes))]
    for teacher in exported:
        snapshot = page_results.read(teacher / "config.json", Snapshot, [])  # the notes speak of the run's own files
        if snapshot:
            run.images_per_epoch = snapshot.samples / snapshot.epochs
            break


def _finetune(run: Run) -> None:
    """What only a fine-tune has."""
    run.validation = page_results.read(run.folder / "validation.json", Validation, run.notes)
    last, epochs = run.metrics.last("epoch"), run.number("optim.epochs", 0)
    exported = (run.folder / "model" / "config.json").is_file()
    run.ended = bool(run.searched) or (exported and last is not None and last >= epochs - 1)


def open_run(folder: Path) -> Run:
    """Read a run folder. UserError where it is none; what is damaged in it is among the notes."""
    notes: Notes = []
    recipe = _recipe(folder / RECIPE, notes)
    run = Run(folder, _kind(folder, recipe), notes, recipe or {})
    run.searched = list(_searched(folder, notes))
    if run.kind == EVALUATION:
        if not run.searched:
            raise UserError(f"{folder / RESULTS} holds no numbers of a search: {' '.join(notes) or 'it has no mAP'}")
        return run
    run.environment = page_results.read_tree(folder / ENVIRONMENT, notes)
    run.metrics = page_metrics.read(folder / METRICS, notes)
    run.stop = page_results.read(folder / STOPPED, Stop, notes)
    run.locked = _is_locked(folder / LOCK)
    (_pretraining if run.kind == PRETRAINING else _finetune)(run)
    return run
