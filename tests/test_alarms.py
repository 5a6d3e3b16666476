"""A collapse made on purpose is told within 50 steps from random weights, with its cause; a sound run is quiet."""

from pathlib import Path

import pytest
import small
import together

# 4.75 epochs of 8 steps = 38 steps of the small ViT with the centring of the paper
SHORT = ["schedules.epochs=4.75", "centering.kind=centre"]
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


@pytest.mark.row("R14")
@pytest.mark.parametrize(
    "made, log_every, alarm, cause",
    [
        (
            COLD,
            50,
            "hard_targets",
            "0.0000 of ln K, because the teacher temperature is 0.0001; raise schedules.teacher",
        ),
        (UNCENTRED, 1, "one_prototype", "prototypes in use; centring is off or too weak: set centering.kind=sinkhorn"),
        (STUCK, 10, "no_centring", "the centre takes away 0.0% of the mean logits"),
    ],
)
def test_a_collapse_is_told_within_50_steps(crops, tmp_path, capsys, figures, made, log_every, alarm, cause):
    out = tmp_path / "run"
    settings = [*SHORT, *made, f"log_every={log_every}"]
    assert small.run(small.arguments("pretrain/run.py", out, crops, *settings)) == 0
    begun, told = alarms(out), capsys.readouterr().err
    assert begun[alarm] <= 50
    assert told.count(f"alarm {alarm} at step {begun[alarm]}: ") == 1, "once, and not at each line"
    assert cause in told
    # in the end: hard targets have no entropy, and without centring they are of one prototype
    last = small.metrics(out)[-1]
    assert last["teacher_entropy_share"] < 0.05
    assert (last["mean_entropy"] < 0.5) == (made != COLD)
    note = f"{alarm} at step {begun[alarm]}"
    figures("R14", injected=f"collapse by {made[-1]}", times=1, lost=0, wrong=0, note=note)


def test_before_anything_is_learned_it_is_the_centre_that_tells(crops, tmp_path):
    """At a learning rate near 0, as in the warm-up of a long run, no entropy falls within 50 steps."""
    still = ["schedules.warmup_epochs=1e6", "heads.out_dim=256"]
    still += ["schedules.teacher_temperature_start=0.04", "schedules.teacher_temperature=0.04"]
    for more, expected in ((UNCENTRED, {"no_centring": 30}), ([], {})):
        out = tmp_path / str(len(more))
        assert small.run(small.arguments("pretrain/run.py", out, crops, *SHORT, *still, *more)) == 0
        assert alarms(out) == expected
        assert small.metrics(out)[-1]["teacher_entropy_share"] > 0.6


# recipe, and what it takes from the command line to be small
TINY = ["loader.draw=null", "loader.batch=16", "loader.batch_per_device=16", *small.VIT]
SOUND = {
    "smoke": ("smoke", small.PRETRAIN),
    "smoke, running centre": ("smoke", [*TINY, "centering.kind=centre"]),
    "demo": ("demo", TINY),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_run_is_quiet(crops, tmp_path, capsys, name):
    recipe, settings = SOUND[name]
    settings = [*settings, f"loader.shards=[{crops}]", "schedules.epochs=4.75"]
    out, recipe = tmp_path / "run", f"recipes/pretrain/{recipe}.yaml"
    assert small.run([str(small.ROOT / "pretrain/run.py"), "--recipe", recipe, "--out", str(out), *settings]) == 0
    assert alarms(out) == {}
    assert "alarm" not in capsys.readouterr().err
    assert small.metrics(out)[-1]["step"] == 37


def test_on_collapse_stop_with_two_processes(crops, tmp_path, forks):
    """The main process alone keeps the watch; both stop at the same step, and none waits for the other."""
    command = small.arguments("pretrain/run.py", tmp_path / "run", crops, *SHORT, *COLD, "health.on_collapse=stop")
    command += ["health.first_step=1", "health.lasting=1"]
    both = together.start(forks, command, 2)
    assert together.wait(both) == {2}
    told = [process.told() for process in both]
    sentences = [[line for line in text.splitlines() if line.startswith("error: ")] for text in told]
    assert sentences[0] == sentences[1]
    assert sentences[0][0].startswith("error: step 2: hard_targets: each image gets one hard prototype")
    assert [text.count("alarm hard_targets at step 2") for text in told] == [1, 0]
    assert [line["step"] for line in small.metrics(tmp_path / "run")] == [0, 1, 2]
    assert not (tmp_path / "run" / "teacher").exists()
