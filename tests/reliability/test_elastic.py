"""R4: a run goes on by other numbers of processes: the same samples, crops and masks in every step, the same losses."""

from pathlib import Path

import pytest
import small
import together
from forked import Server
from killing import newest

from pretrain.ranks import REQUEUE

# float32: the sums of bf16 differ by more than the losses may
SETTINGS = ["precision=no", "centering.kind=centre", "schedules.lr=0.002", "schedules.momentum=0.99"]
BATCH, EPOCH = 16, 8  # images, steps
TERMS = ("loss", "loss_cls", "loss_patch")
MOST = 1e-5  # relative difference of losses
Leg = tuple[int, int | None]  # processes, the step at whose end one of them gets a signal


def run(forks: Server, crops: Path, out: Path, legs: list[Leg], *more: str) -> tuple[dict, list[dict]]:
    """A pretraining by these processes, one after the other: its samples by step, and the lines of its metrics."""
    seen = out.with_name(f"{out.name}-samples")
    seen.mkdir()
    command = small.arguments("pretrain/run.py", out, crops, *SETTINGS, *more)
    before = ""
    for ranks, stop in legs:
        prepare = [("together", "samples", {"folder": str(seen)})]
        prepare += [("together", "stop_at", {"step": stop, "rank": ranks - 1})] if stop else []
        runs = together.start(forks, command, ranks, prepare)
        assert together.wait(runs) == {REQUEUE if stop else 0}, "\n".join(one.told() for one in runs)
        assert small.json_of(out / "environment.json")["processes"] == ranks
        assert newest(out) > before, "it stopped with a newer state"
        before = newest(out)
    return together.steps_of(seen), small.metrics(out)


def compared(alone: tuple[dict, list[dict]], other: tuple[dict, list[dict]], steps: int) -> tuple[int, int, float]:
    """Samples lost; steps with other samples or too different losses; the largest relative difference of a loss."""
    (ours, lines), (theirs, others) = alone, other
    assert len(ours) == len(lines) == steps
    assert all(len(samples) == BATCH for samples in ours.values())
    assert [line["step"] for line in others] == list(range(steps))
    lost = sum(BATCH - len(theirs.get(step, ())) for step in ours)
    apart = [
        max(abs(one[term] - two[term]) / abs(one[term]) for term in TERMS if term in one)
        for one, two in zip(lines, others, strict=True)
    ]
    wrong = [step for step in ours if ours[step] != theirs.get(step) or apart[step] > MOST]
    return lost, len(wrong), max(apart)


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


@pytest.mark.row("R4")
def test_from_one_process_to_two(forks, crops, tmp_path, figures):
    more = "schedules.epochs=1.25"
    alone = run(forks, crops, tmp_path / "alone", [(1, None)], more)
    other = run(forks, crops, tmp_path / "other", [(1, 2), (2, None)], more)
    lost, wrong, apart = compared(alone, other, 10)
    note = f"losses differ by at most {apart:.0e}"
    figures("R4", injected="1, 2 processes, 10 steps", times=1, lost=lost, wrong=wrong, note=note)
    assert (lost, wrong) == (0, 0)


KINDS = {
    "one micro-batch": ["schedules.epochs=12", "backbone.drop_path=0.1"],
    "micro-batches of 4": ["schedules.epochs=12", "loader.batch_per_device=4"],
    "Sinkhorn-Knopp": ["schedules.epochs=12", "centering.kind=sinkhorn"],
    "2 workers": ["schedules.epochs=4", "loader.workers=2", "loader.prefetch=4"],
}


@pytest.mark.soak
@pytest.mark.row("R4")
@pytest.mark.parametrize("kind", KINDS)
def test_one_two_one_four(kind, forks, crops, tmp_path, figures):
    more = KINDS[kind]
    steps = int(more[0].partition("=")[2]) * EPOCH
    alone = run(forks, crops, tmp_path / "alone", [(1, None)], *more)
    legs: list[Leg] = [
        (1, steps // 6),
        (2, steps // 3),
        (1, steps // 2),
        (4, 2 * steps // 3),
        (2, steps - 5),
        (4, None),
    ]
    other = run(forks, crops, tmp_path / "other", legs, *more)
    lost, wrong, apart = compared(alone, other, steps)
    note = f"{kind}: {steps} steps, losses differ by at most {apart:.1e}; float32"
    numbers = ", ".join(str(ranks) for ranks, _ in legs)
    figures("R4", injected=f"{numbers} processes", times=len(legs) - 1, lost=lost, wrong=wrong, note=note)
    assert (lost, wrong) == (0, 0)
