"""What a run writes and when, without waiting for the device in between; what stops it."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from made_steps import STEPS, B, D, K, Run
from waiting import Reads

from pretrain.journal import BadSamples
from pretrain.losses import Guessed, Logits
from pretrain.student_teacher import Seen
from recipes.errors import UserError


@pytest.fixture(autouse=True)
def accelerator_state():
    """The next test's Accelerator is not to inherit the settings of this one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_share_of_what_was_seen_but_of_an_epoch_at_least():
    bad = BadSamples(0.01, epoch=1000)
    bad.add(10, 64)  # 1 % of an epoch, though much more of what was seen
    bad.check()
    bad.add(1, 64)
    with pytest.raises(UserError) as caught:
        bad.check()
    assert str(caught.value) == (
        "11 damaged samples among 128: more than loader.max_bad = 0.01 of the 1000 allowed for; see which with "
        "shards/check.py, or raise loader.max_bad"
    )
    later = BadSamples(0.01, epoch=1000)
    later.add(20, 2000)
    later.check()
    later.add(1, 0)
    with pytest.raises(UserError):
        later.check()


def test_none_allowed():
    bad = BadSamples(0.0, epoch=100)
    bad.add(0, 50)
    bad.check()
    bad.add(1, 50)
    with pytest.raises(UserError):
        bad.check()


def test_which_steps_are_written(tmp_path):
    run = Run(tmp_path, every=30)
    for step in range(STEPS):
        assert run.step(step)
    # every 30th, every 10th of the first 50, and the last
    assert [line["step"] for line in run.lines] == [0, 10, 20, 30, 40, 60, 90, 120, 127]
    line = run.lines[-1]
    assert (line["samples"], line["loss"], line["loss_cls"], line["lr"], line["grad_norm"]) == (768, 2.5, 1.5, 0.1, 1.0)
    assert (line["skipped_steps"], line["bad_samples"]) == (0, 0)
    assert 0 < line["teacher_entropy"] < line["mean_entropy"] < math.log(K)
    assert 1 < line["effective_rank"] <= B
    assert 0 <= line["data_wait"] < 1
    assert not {"mfu", "not_finite"} & line.keys()


def test_nothing_is_read_of_the_other_steps(tmp_path):
    run = Run(tmp_path)
    with Reads() as reads:
        for step in range(15):
            reads.stage = "line" if step % 7 == 0 or step == 10 else "between"
            targets, features = torch.full((2, B, K), 1 / K), torch.ones(2, B, D)
            forward = (
                Logits(targets, None),
                Seen(Logits(targets, None), torch.ones(K), None, features),
                Guessed(targets, None, None, features),
            )
            run.journal.losses, run.journal.health, run.journal.outputs = {}, {}, torch.zeros(())
            run.journal.collect({"loss": torch.ones(()), "loss_cls": torch.ones(())}, forward, 1.0)
            norm = torch.full((), math.nan if step == 3 else 1.0)
            run.journal.check(norm)
            run.journal.record(step, {"lr": 0.1, "teacher_temperature": 0.04, "grad_norm": norm})
    assert reads.who("between") == set()
    assert {"journal.py:_read", "journal.py:_stop", "spikes.py:look"} <= reads.who("line")
    assert int(run.skipped.total) == 1


@pytest.mark.parametrize(
    "fault, names",
    [
        ({"loss": math.nan}, ["loss"]),
        ({"norm": math.inf}, ["grad_norm"]),
        ({"teacher": math.nan}, ["teacher"]),
        ({"loss": -math.inf, "norm": math.nan}, ["loss", "grad_norm"]),
    ],
)
def test_a_step_that_is_not_finite(tmp_path, capsys, fault, names):
    run = Run(tmp_path, every=2)
    assert run.step(0)
    assert not run.step(1, **fault)
    assert not run.step(2, **fault)
    assert (int(run.skipped.total), int(run.skipped.row)) == (2, 2)
    assert run.step(3)
    assert run.step(4)
    assert (int(run.skipped.total), int(run.skipped.row)) == (2, 0)
    first, broken, after = run.lines
    assert "not_finite" not in first
    assert first["skipped_steps"] == 0
    assert broken["not_finite"] == names
    assert broken["skipped_steps"] == after["skipped_steps"] == 2
    assert [broken[name] is None for name in ("loss", "grad_norm")] == [name in names for name in ("loss", "grad_norm")]
    assert broken["alarms"] == ["skipped_steps"]
    assert (after["loss"], after["grad_norm"]) == (2.5, 1.0), "what was skipped poisons nothing"
    assert "alarms" not in after
    assert capsys.readouterr().err.startswith("alarm skipped_steps at step 2: 2 step(s) since the line before were")


def test_damaged_samples_are_counted_over_the_steps(tmp_path):
    run = Run(tmp_path, every=5, most_bad=0.03)  # 3 of an epoch of 100
    run.step(0, bad=1)
    for step in range(1, 5):
        run.step(step, bad=int(step == 2))
    run.step(5, bad=1)
    assert [line["bad_samples"] for line in run.lines] == [1, 3]
    for step in range(6, 10):
        run.step(step, bad=1)
    with pytest.raises(UserError, match=r"7 damaged samples among 66"):
        run.step(10)
    assert run.lines[-1]["bad_samples"] == 7


def test_the_share_of_the_peak(tmp_path):
    run = Run(tmp_path / "a", rates=(2e9, 1e12))
    run.step(0)
    (line,) = run.lines
    assert line["mfu"] == pytest.approx(line["images_per_s"] * 2e9 / 1e12)
    unknown = Run(tmp_path / "b", rates=(2e9, None))
    unknown.step(0)
    assert "mfu" not in unknown.lines[0]
    assert "MFU" not in unknown.journal.meter.note
    assert run.journal.meter.note.startswith("loss 2.5000  cls 1.5000  data wait ")
    assert "  MFU " in run.journal.meter.note


def repeatable(run: Run) -> list[dict]:
    clock = ("images_per_s", "data_wait", "mfu")
    return [{name: value for name, value in line.items() if name not in clock} for line in run.lines]


@pytest.mark.parametrize("stopped_at", [12, 26, 40])
def test_a_run_that_goes_on_rings_the_same_alarms(tmp_path, stopped_at):
    """All targets uniform beyond their settings: an alarm begins at step 30 and is found again in the lines."""
    settings = {"uniform": 0.1, "flat_epochs": 0.001, "lasting": 10, "prototypes": K, "first_step": 20}
    alone, first = Run(tmp_path / "alone", every=1, **settings), Run(tmp_path / "run", every=1, **settings)
    for step in range(50):
        alone.step(step)
        if step < stopped_at:
            first.step(step)
    second = Run(tmp_path / "run", every=1, first=stopped_at, **settings)
    for step in range(stopped_at, 50):
        second.step(step)
    assert repeatable(alone) == repeatable(second)
    rings = [line["step"] for line in alone.lines if "one_prototype" in line.get("alarms", [])]
    assert rings == list(range(30, 50))


def test_a_collapse_can_stop_the_run(tmp_path):
    run = Run(tmp_path, every=1, on_collapse="stop", prototypes=K)
    for step in range(30):
        run.step(step)
    stop = (
        r"step 30: one_prototype: every image gets the same prototype.*\(it stops here because health.on_collapse=stop"
    )
    with pytest.raises(UserError, match=stop):
        run.step(30)
    again = Run(tmp_path, every=1, first=31, on_collapse="stop", prototypes=K)
    with pytest.raises(UserError, match="step 31: one_prototype"):
        again.step(31)
    assert again.lines[-1]["alarms"] == ["one_prototype"]
