"""A collapse that is made on purpose is told within 50 steps from random weights, with its cause; a sound run is quiet."""

import shutil
from pathlib import Path

import pytest
import small

# 6.5 epochs of 8 steps = 52 steps of the small ViT and the small heads, whose centre is the paper's
SHORT = ["schedules.epochs=6.5", "centering.kind=centre"]
COLD = ["schedules.teacher_temperature_start=1e-4", "schedules.teacher_temperature=1e-4"]
UNCENTRED = ["centering.kind=none"]
STUCK = ["centering.momentum=0.999999"]  # a centre that never leaves 0


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


def alarms(out: Path) -> dict[str, int]:
    """The step of the first line with each alarm."""
    first: dict[str, int] = {}
    for line in small.metrics(out):
        for name in line.get("alarms", []):
            first.setdefault(name, line["step"])
    return first


@pytest.mark.parametrize(
    "made, log_every, alarm, cause",
    [
        (COLD, 1, "hard_targets", "0.0000 of ln K, because the teacher temperature is 0.0001; raise schedules.teacher"),
        (COLD, 50, "hard_targets", "the teacher temperature is 0.0001"),
        (UNCENTRED, 1, "one_prototype", "prototypes in use; centring is off or too weak: set centering.kind=sinkhorn"),
        (STUCK, 50, "no_centring", "the centre takes away 0.0% of the mean logits"),
    ],
)
def test_a_collapse_is_told_within_50_steps(crops, tmp_path, capsys, made, log_every, alarm, cause):
    out = tmp_path / "run"
    settings = [*SHORT, *made, f"log_every={log_every}"]
    assert small.run(small.arguments("pretrain/run.py", out, crops, *settings)) == 0
    begun, told = alarms(out), capsys.readouterr().err
    assert begun[alarm] <= 50
    assert told.count(f"alarm {alarm} at step {begun[alarm]}: ") == 1, "once, and not at each line"
    assert cause in told
    # in the end: hard targets have no entropy, and without centring they are of one prototype
    last = small.metrics(out)[-1]
    assert last["teacher_entropy_share"] < 0.01
    assert (last["mean_entropy"] < 0.1) == (made != COLD)


def test_before_anything_is_learned_it_is_the_centre_that_tells(crops, tmp_path):
    """At a learning rate near 0, as in the warm-up of a long run, no entropy falls within 50 steps."""
    out, still = tmp_path / "run", ["schedules.warmup_epochs=1e6", "schedules.teacher_temperature_start=0.04"]
    still += ["schedules.teacher_temperature=0.04", "heads.out_dim=1024"]
    assert small.run(small.arguments("pretrain/run.py", out, crops, *SHORT, *UNCENTRED, *still)) == 0
    assert alarms(out) == {"no_centring": 30}
    assert small.metrics(out)[-1]["teacher_entropy_share"] > 0.6
    shutil.rmtree(out)
    assert small.run(small.arguments("pretrain/run.py", out, crops, *SHORT, *still)) == 0
    assert alarms(out) == {}


# recipe, what it takes from the command line to be small, and whether its centre is that of the paper
SOUND = {
    "as the tests": ("smoke", small.PRETRAIN),
    "smoke": ("smoke", ["loader.draw=null", "loader.batch=16", "loader.batch_per_device=16", *small.VIT]),
    "smoke, running centre": (
        "smoke",
        ["loader.draw=null", "loader.batch=16", "loader.batch_per_device=16", *small.VIT],
    ),
    "demo": ("demo", ["loader.draw=null", "loader.batch=16", "loader.batch_per_device=16", *small.VIT]),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_run_is_quiet(crops, tmp_path, capsys, name):
    recipe, settings = SOUND[name]
    settings = [*settings, f"loader.shards=[{crops}]", "schedules.epochs=6.5"]
    settings += ["centering.kind=centre"] if "centre" in name else []
    out, recipe = tmp_path / "run", f"recipes/pretrain/{recipe}.yaml"
    assert small.run([str(small.ROOT / "pretrain/run.py"), "--recipe", recipe, "--out", str(out), *settings]) == 0
    assert alarms(out) == {}
    assert "alarm" not in capsys.readouterr().err
    assert small.metrics(out)[-1]["step"] == 51


def test_on_collapse_stop(crops, tmp_path, capsys):
    out = tmp_path / "run"
    command = small.arguments("pretrain/run.py", out, crops, *SHORT, *COLD, "health.on_collapse=stop")
    assert small.run(command) == 2
    told = capsys.readouterr().err
    assert told.rstrip().splitlines()[-1].startswith("error: step 30: hard_targets: each image gets one hard prototype")
    assert small.metrics(out)[-1]["step"] == 30
    assert not (out / "teacher").exists()
