"""What ends a run, or sends it back, and what it leaves behind then."""

import json
import math

import pytest
import torch
from accelerate.state import AcceleratorState
from made_steps import B, D, Run

from pretrain import dumps
from pretrain.spikes import RollBack
from recipes.errors import UserError


@pytest.fixture(autouse=True)
def accelerator_state():
    """The next test's Accelerator is not to inherit the settings of this one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.row("R13")
def test_too_many_in_a_row_stop_the_run_and_leave_a_dump(tmp_path):
    run = Run(tmp_path, every=1, max_skipped=2)
    run.step(0, loss=math.nan)
    run.step(1, loss=math.nan)
    run.step(2)
    run.step(3, norm=math.nan)
    run.step(4, norm=math.nan)
    run.journal.gradients |= {"module.a": torch.tensor(0.5), "b": torch.tensor(math.nan), "c": torch.tensor(2.0)}
    run.modules["student"].weight.data[1] = -math.inf
    with pytest.raises(UserError) as caught:
        run.step(5, norm=math.inf)
    dump = tmp_path / "faults" / "step-5-rank-0.json"
    assert str(caught.value) == (
        "step 5: 3 steps in a row were skipped, more than health.max_skipped = 2, because of values that are not "
        f"finite (grad_norm); their samples, gradients and the parts at fault are in {dump}. Begin a new run with a "
        "lower schedules.lr, heads.norm_last_layer=true or schedules.teacher_temperature=0.04, from scratch or from "
        f"--ckpt {tmp_path}"
    )
    assert run.lines[-1]["skipped_steps"] == 5, "the line is there although the run stops"
    told = json.loads(dump.read_text())
    assert (told["step"], told["rank"]) == (5, 0)
    assert told["scheduled"] == {"lr": 0.1, "teacher_temperature": 0.04}
    assert list(told["gradient_norms"].items()) == [("b", "nan"), ("c", 2.0), ("a", 0.5)]
    assert told["not_finite_in_state"] == {"student.weight": 1}
    assert told["not_finite_first_in"] == {"teacher": None, "student": "second"}, "row 13 is in the last batch"
    assert [step["step"] for step in told["steps"]] == [0, 1, 2, 3, 4, 5]
    assert [step["not_finite"] for step in told["steps"]] == [["loss"], ["loss"], [], *[["grad_norm"]] * 3]
    assert told["steps"][5]["own"] == {
        "loss": 2.5,
        "loss_cls": 1.5,
        "grad_norm": "inf",
        "teacher": told["steps"][5]["own"]["teacher"],
    }
    assert told["steps"][1]["mean"]["loss"] == "nan"
    assert told["steps"][4]["rows"] == list(range(4, 4 + 2 * B))


def test_a_dump_tells_the_last_steps_only(tmp_path):
    run = Run(tmp_path, every=100, max_skipped=2)
    for step in range(60, 100):
        run.journal.meter.done = step * B
        run.step(step, loss=math.nan)
    run.journal.meter.done = 100 * B
    with pytest.raises(UserError, match="41 steps in a row were skipped"):
        run.step(100, loss=math.nan)
    told = json.loads((tmp_path / "faults" / "step-100-rank-0.json").read_text())
    assert [step["step"] for step in told["steps"]] == list(range(101 - dumps.KEPT, 101))


def test_a_disk_that_refuses_the_dump_does_not_hide_why_the_run_stops(tmp_path):
    run = Run(tmp_path, every=1, max_skipped=0)
    (tmp_path / "faults").touch()
    with pytest.raises(
        UserError, match=r"\(loss\); what is known of them could not be written \(File exists\)\. Begin"
    ):
        run.step(0, loss=math.nan)


SPIKE = {"spike_warmup": 5, "spike_steps": 2, "spike_before": 3}


def spiked(run: Run, steps: int = 20) -> None:
    for step in range(run.journal.step, steps):
        run.step(step, loss=9.0 if step in (11, 12, 13) else 2.0 + 0.01 * (step % 3))


def test_a_spike_is_told_once_and_the_run_goes_on(tmp_path, capsys):
    run = Run(tmp_path, every=4, **SPIKE)
    spiked(run)
    told = {line["step"]: line["spike"] for line in run.lines if "spike" in line}
    assert told.keys() == {12, 16}
    assert {name: round(value, 2) for name, value in told[12].items()} == {
        "first": 11,
        "last": 12,
        "peak": 9.5,
        "mean": 2.51,
        "deviation": 0.01,
    }
    assert [line["step"] for line in run.lines if "loss_spike" in line.get("alarms", [])] == [12, 16]
    assert capsys.readouterr().err == (
        "alarm loss_spike at step 12: loss 9.5 in steps 11 to 12, where 2.509 +- 0.0079 is usual; a run that does not "
        "recover from it needs a lower schedules.lr, or health.on_spike=roll_back (docs/health.md)\n"
    )
    quiet = Run(tmp_path / "quiet", every=4, on_spike="ignore", on_collapse="stop", **SPIKE)
    spiked(quiet)
    assert not [line for line in quiet.lines if "spike" in line]
    stopping = Run(tmp_path / "stopping", every=4, on_collapse="stop", **SPIKE)
    spiked(stopping)
    assert len(stopping.lines) == len(run.lines), "a spike is no collapse"


def test_a_spike_asks_to_go_back(tmp_path):
    run = Run(tmp_path, every=4, on_spike="roll_back", **SPIKE)
    with pytest.raises(RollBack) as caught:
        spiked(run)
    assert (caught.value.first, caught.value.last, caught.value.spike.peak) == (8, 12, 9.5)
    assert run.lines[-1]["step"] == 12
    early = Run(tmp_path / "early", every=4, on_spike="roll_back", spike_warmup=2, spike_steps=1, spike_before=30)
    with pytest.raises(RollBack) as caught:
        spiked(early)
    assert caught.value.first == 0


def test_terms_that_begin_make_no_spike(tmp_path):
    """The patch term from step 10 on, then the prototypes: the loss is twice as high at once, and stays there."""
    run = Run(tmp_path, every=1, on_spike="roll_back", **SPIKE)
    one = torch.ones(())
    for step in range(40):
        patch = 2.0 * (step >= 10)
        frozen, loss = step < 25, 2.0 + patch + 3.0 * (step >= 25)
        run.journal.losses = {"loss": loss * one, "loss_cls": 2.0 * one, "loss_patch": patch * one}
        run.journal.outputs = torch.zeros(())
        run.journal.health = {"teacher_entropy": one}
        run.journal.features = torch.ones(2, D)
        run.journal.check(one)
        run.journal.record(step, {"teacher_temperature": 0.04, "freeze_last_layer": frozen, "grad_norm": one})
    assert not [line for line in run.lines if "spike" in line]


def test_a_stop_names_what_failed_between_the_lines(tmp_path):
    run = Run(tmp_path, every=4, max_skipped=2)
    run.step(0)
    for step in (1, 2, 3):
        run.step(step, loss=math.nan)
    with pytest.raises(UserError, match=r"4 steps in a row .*\(loss, grad_norm\)"):
        run.step(4, norm=math.nan)
