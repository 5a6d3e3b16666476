"""R14: a collapse made on purpose is told within 50 steps, with its cause, whatever the seed; sound runs are quiet.

tests/test_alarms.py has one of each with the sentences that are told.
"""

from pathlib import Path

import pytest
import small

# 48 steps of the small ViT, with the centring of the paper
SHORT = ["schedules.epochs=6", "centering.kind=centre", "log_every=1", "checkpoint.every_epochs=99"]
MADE = {
    "temperature 0.0001": (
        ["schedules.teacher_temperature_start=1e-4", "schedules.teacher_temperature=1e-4"],
        ("hard_targets", "the entropy of the targets is 0.0"),
    ),
    "no centring": (["centering.kind=none"], ("one_prototype", "the entropy of the mean target is 0.")),
    "a centre that stays at 0": (
        ["centering.momentum=0.999999"],
        ("no_centring", "same prototype (entropy to 0)"),
    ),
}
SEEDS = range(8)


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


@pytest.mark.soak
@pytest.mark.row("R14")
@pytest.mark.parametrize("made", MADE)
def test_whatever_the_seed(forks, crops, tmp_path, figures, made):
    settings, (alarm, cause) = MADE[made]
    begun, untold = [], 0
    for seed in SEEDS:
        out = tmp_path / str(seed)
        run = forks.start(small.arguments("pretrain/run.py", out, crops, *SHORT, *settings, f"seed={seed}"))
        assert run.wait() == 0, run.told()[-3000:]
        steps = [line["step"] for line in small.metrics(out) if alarm in line.get("alarms", [])]
        begun += steps[:1]
        told = [line for line in run.told().splitlines() if line.startswith(f"alarm {alarm} at step ")]
        untold += len(told) != 1 or cause not in told[0]
    note = f"told at step {min(begun)} to {max(begun)}" if begun else "never told"
    lost = len(SEEDS) - len(begun)
    figures("R14", injected=f"collapse by {made}", times=len(SEEDS), lost=lost, wrong=untold, note=note)
    assert (lost, untold) == (0, 0)


@pytest.mark.soak
@pytest.mark.row("R14")
@pytest.mark.parametrize("kind", ["centre", "sinkhorn"])
def test_no_false_alarm(forks, crops, tmp_path, figures, kind):
    false = 0
    for seed in SEEDS:
        out = tmp_path / str(seed)
        command = small.arguments("pretrain/run.py", out, crops, *SHORT, f"centering.kind={kind}", f"seed={seed}")
        run = forks.start(command)
        assert run.wait() == 0, run.told()[-3000:]
        false += sum("alarms" in line for line in small.metrics(out)) + run.told().count("alarm ")
    figures("R14", injected=f"nothing: sound runs, {kind}", times=len(SEEDS), lost=0, wrong=false, note="no alarm")
    assert false == 0
