"""Following a pretraining with labels: every teacher that it exports is scored by retrieval, the best one is marked.

PersonViT (arXiv 2408.05398) found that accuracy rises and then falls in a long pretraining and took the teacher of
about epoch 220 of 300; a loss does not show that. Nothing of the pretraining is changed: everything is written below
OUT, RUN/follow/<set> by default.

    OUT/scores/samples-*.json   one file a teacher: numbers, and the average precision of every query
    OUT/curve.json, curve.png   mAP and Rank-1 against epochs, with intervals; OUT/table.md the same as a table
    OUT/best.json               the best teacher, and those that are as good by these queries
    OUT/kept/                   the best teacher itself, where the pretraining will delete it (teacher_newest)

Killed at any moment, the same command goes on: what is in OUT/scores is not scored again.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple

from finetune import confidence
from finetune.curve import TUNED, best_of, deciding, publish
from finetune.metrics import Retrieval
from finetune.short_finetune import SETTINGS, ShortFinetune, digest
from pretrain import committed
from pretrain.checkpoint import CONFIG, WEIGHTS
from recipes import locks
from recipes.errors import UserError
from recipes.record import RECIPE, write_json

SCORES, KEPT, LOCK = "scores", "kept", ".lock"


class Snapshot(NamedTuple):
    """An exported teacher of a run."""

    folder: Path
    samples: int  # that the pretraining had seen; tells the teachers of a run apart
    epochs: float
    passing: bool  # the pretraining will delete it (checkpoint.teacher_newest)


def snapshots(run: Path) -> list[Snapshot]:
    """The exported teachers of a run that are there now, in the order of their epochs.

    The last teacher stands for the snapshot that it repeats. One that is deleted meanwhile is left out.
    """
    found: dict[int, Snapshot] = {}
    for folder in [run / "teacher", *sorted((run / "teachers").glob("epoch-*"))]:
        try:
            facts = committed.read_facts(folder / CONFIG, sealed=False)
        except committed.Damaged:
            if not (folder / CONFIG).exists():
                continue
            raise
        if not (folder / WEIGHTS).is_file():
            continue
        try:
            one = Snapshot(folder, int(facts["samples"]), float(facts["epochs"]), facts.get("kept") == "newest")
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / CONFIG} does not tell samples and epochs; export the teacher again") from error
        found.setdefault(one.samples, one)
    return [found[samples] for samples in sorted(found)]


class Scores:
    """What is known about each teacher, on disk: one file a teacher, written whole."""

    def __init__(self, out: Path, facts: Mapping[str, Any]):
        """facts: what the scores depend on beside the teacher, JSON-able; scores under other facts are a UserError."""
        self.folder, self.facts = out / SCORES, json.loads(json.dumps(facts))
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("samples-*.json"):
            self._refuse_other(path, self._read(path))

    def _path(self, samples: int) -> Path:
        return self.folder / f"samples-{samples:012d}.json"

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            return {**row, "samples": int(row["samples"]), "sha256": str(row["sha256"])}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged; delete it to have that teacher scored again") from error

    def _refuse_other(self, path: Path, row: dict[str, Any]) -> None:
        was = row.get("facts")
        if was == self.facts:
            return
        keys = [key for key in {**self.facts, **(was or {})} if (was or {}).get(key) != self.facts.get(key)]
        told = "; ".join(f"{key} was {(was or {}).get(key)!r} and is now {self.facts.get(key)!r}" for key in keys)
        raise UserError(
            f"{path.parent.parent} holds scores of another data set or protocol: {told}. Choose another --out"
        )

    def all(self) -> list[dict[str, Any]]:
        """In the order of the epochs."""
        return [self._read(path) for path in sorted(self.folder.glob("samples-*.json"))]

    def get(self, samples: int) -> dict[str, Any] | None:
        """What is known about the teacher of so many samples."""
        path = self._path(samples)
        return self._read(path) if path.is_file() else None

    def put(self, row: dict[str, Any]) -> None:
        """Write or replace one."""
        write_json(self._path(row["samples"]), {**row, "facts": self.facts})


def _held(one: Snapshot, out: Path) -> Path | None:
    """Where the weights of a teacher stay while they are needed: in place, or a copy of a passing one in OUT/kept.

    None where the pretraining deleted it before the copy was whole.
    """
    copy = out / KEPT / one.folder.name
    if not one.passing:
        return one.folder
    if (copy / WEIGHTS).is_file() and digest(copy) == digest(one.folder):
        return copy
    shutil.rmtree(copy, ignore_errors=True)
    partial = copy.with_name(f".{copy.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(exist_ok=True)
    try:
        shutil.copytree(one.folder, partial)
    except OSError as error:  # shutil.Error is one
        shutil.rmtree(partial, ignore_errors=True)
        if not one.folder.exists():
            return None
        raise UserError(f"{one.folder} cannot be copied to {copy.parent}: {error}") from error
    partial.rename(copy)
    return copy


def _where(row: dict[str, Any], one: Snapshot | None, copy: Path) -> str | None:
    """What `--ckpt` takes for a teacher that was scored: itself if it will stay, else the copy; None if there is none.

    one: the teacher if it is still there. copy: the only copy that will stay.
    """
    if one is not None and not one.passing:
        return str(one.folder)
    if copy.name == row["name"] and (copy / WEIGHTS).is_file():
        return str(copy)
    return None if one is None else str(one.folder)


def _tell(row: dict[str, Any], best: dict[str, Any]) -> None:
    """One line about a teacher that was scored; best: what `publish` returns."""
    low, high = row["intervals"]["mAP"]
    tuned = f", fine-tuned {100 * row[TUNED]['mAP']:.1f} %" if TUNED in row else ""
    first = row["samples"] == best["samples"]
    place = (
        "the best so far" if first else f"best so far: epoch {best['epochs']:g}, {100 * deciding(best)['mAP']:.1f} %"
    )
    print(
        f"epoch {row['epochs']:g}: mAP {100 * row['mAP']:.1f} % ({100 * low:.1f} to {100 * high:.1f}), "
        f"Rank-1 {100 * row['rank1']:.1f} %{tuned}; {place}",
        flush=True,
    )


class Follower:
    """One pretraining, one labelled set, one folder."""

    def __init__(
        self,
        run: Path,
        score: Callable[[Path], Retrieval],
        out: Path,
        finetune: Callable[[Path], dict[str, Any]] | None,
        facts: Mapping[str, Any],
    ):
        self.run, self.score, self.out, self.finetune = run, score, out, finetune
        self.settings = finetune.settings() if isinstance(finetune, ShortFinetune) else None
        self.scores = Scores(out, facts)
        self.verified: set[int] = set()  # samples of teachers whose weights this process has compared with the score

    def _fresh(self, one: Snapshot) -> dict[str, Any]:
        """What is known of a teacher: {} if nothing, or if other weights have its name now."""
        row = self.scores.get(one.samples)
        if row is None or (one.samples not in self.verified and row["sha256"] != digest(one.folder)):
            return {}
        self.verified.add(one.samples)
        return row

    def _complete(self, row: dict[str, Any]) -> bool:
        """Whether nothing is left to do. A fine-tune under other settings is left to its run folder to refuse."""
        return bool(row) and (self.finetune is None or (TUNED in row and row[TUNED].get(SETTINGS) == self.settings))

    def take(self, one: Snapshot) -> dict[str, Any] | None:
        """Score a teacher as far as it is not scored yet; None if there was nothing to do or it was deleted."""
        try:
            row = self._fresh(one)
            if self._complete(row):
                return None
            ckpt = _held(one, self.out)
        except FileNotFoundError:
            ckpt = None
        if ckpt is None:
            print(f"{one.folder} was deleted before it could be scored", file=sys.stderr)
            return None
        if not row:
            retrieval = self.score(ckpt)
            row = {"name": one.folder.name, "samples": one.samples, "epochs": one.epochs, "sha256": digest(ckpt)}
            row |= {**retrieval.numbers(), "intervals": confidence.intervals(retrieval)}
            row["average_precision"] = retrieval.ap.tolist()
            self.scores.put(row)
        if self.finetune is not None:
            row[TUNED] = self.finetune(ckpt)
            self.scores.put(row)
        self.verified.add(one.samples)
        return row

    def publish(self) -> dict[str, Any]:
        """Write curve, table and best.json of all that is scored; of the copies only that of the best stays."""
        present, rows = {one.samples: one for one in snapshots(self.run)}, self.scores.all()
        kept = self.out / KEPT / best_of(rows)["name"]
        rows = [{**row, "ckpt": _where(row, present.get(row["samples"]), kept)} for row in rows]
        told = publish(self.out, rows, self.scores.facts)
        for copy in (self.out / KEPT).glob("*"):
            if copy != kept or told["ckpt"] != str(kept):
                shutil.rmtree(copy)
        return told


def follow(
    run: Path,
    score: Callable[[Path], Retrieval],
    out: Path,
    once: bool,
    poll_s: float = 30.0,
    finetune: Callable[[Path], dict[str, Any]] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score every teacher of the pretraining `run` as it comes, until its last one is there; returns best.json.

    score: from an exported teacher to how well it searches the labelled set. once: only those that are there now.
    poll_s: seconds between two looks. finetune: from a teacher to the numbers after a short fine-tune ("mAP", "rank1"
    and others), by which the best is chosen then. facts: data set, input size, protocol and what else the scores depend
    on. Ctrl-C while it waits ends it as if the last teacher had come. UserError: no run, no teacher with `once`, scores
    under other facts in `out`, or somebody else writes there.
    """
    if not (run / RECIPE).is_file():
        raise UserError(f"--follow {run}: no run folder of pretrain/run.py, it has no {RECIPE}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; results go into a folder")
    out.mkdir(parents=True, exist_ok=True)
    busy = f"{out} is in use by another --follow, or by a fine-tune that a killed one left"
    way_out = "wait for it, stop it, or choose another --out"
    # inherited: a fine-tune that outlives this process holds the lock, see short_finetune.py
    with locks.holding(out / LOCK, busy, way_out, inherited=True):
        follower, waiting, told = Follower(run, score, out, finetune, facts or {}), False, {}
        while True:
            ended = once or (run / "teacher" / WEIGHTS).is_file()  # before the look: nothing comes after the last one
            for one in snapshots(run):
                row = follower.take(one)
                if row is not None:
                    waiting, told = False, follower.publish()
                    _tell(row, told)
            if ended:
                break
            if not waiting:
                print(f"waiting for the next teacher of {run}; Ctrl-C ends this", file=sys.stderr, flush=True)
                waiting = True
            try:
                sleep(poll_s)
            except KeyboardInterrupt:
                break
        if not follower.scores.all():
            raise UserError(f"{run} holds no teacher: pretrain/run.py writes one every checkpoint.teacher_every_epochs")
        return told or follower.publish()
