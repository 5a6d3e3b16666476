"""Runs for the tests of the report page: real ones of the entry scripts, on drawn people, made once a session."""

from pathlib import Path
from typing import NamedTuple

import small


class Runs(NamedTuple):
    """Folders; not to be changed, copy one to damage it."""

    pretraining: Path
    tuned: Path  # from its teacher
    scratch: Path  # the same from random weights
    evaluation: Path  # colour histograms on the same set


def made(base: Path) -> Runs:
    """The runs below `base`, made on the first call."""
    folder = base / "report-runs"
    runs = Runs(*(folder / name for name in ("pretraining", "tuned", "scratch", "evaluation")))
    if folder.exists():
        return runs
    unlabeled, labelled = (small.drawn(base, kind) for kind in (small.UNLABELED, small.LABELLED))
    more = ["schedules.epochs=2", "pictures.images=2", "checkpoint.teacher_every_epochs=1"]
    script, tune = "finetune/run.py", ["validation.identities=4", "validation.every_epochs=1"]
    histogram = small.arguments("finetune/eval.py", runs.evaluation, labelled, ckpt="histogram")
    commands = [
        small.arguments("pretrain/run.py", runs.pretraining, unlabeled, *more),
        small.arguments(script, runs.tuned, labelled, "rerank.k1=5", "rerank.k2=2", ckpt=runs.pretraining / "teacher"),
        small.arguments(script, runs.scratch, labelled, *tune, ckpt="none"),
        histogram,
    ]
    for command in commands:
        assert small.run(command) == 0, command
    return runs
