"""R2: killed several times inside one epoch and started again, a pretraining gives the bits of one left alone."""

from pathlib import Path

import killing
import pytest
import small
import torch
from forked import Run, Server
from killing import Campaign, Kill

from pretrain import checkpoint
from pretrain.backbone import Backbone
from pretrain.checkpoint import CheckpointConfig
from pretrain.keeping import Keeper

# 32 steps an epoch of 128 images, 40 in all; a full state every 3.2 steps: after 4, 7, 10, 13, ...
BATCH, EPOCH, STEPS = 4, 32, 40
SETTINGS = ["loader.batch=4", "schedules.epochs=1.25", "checkpoint.every_epochs=0.1", "views.local_count=1"]
FILES = [f"checkpoints/samples-{STEPS * BATCH:012d}/tensors.safetensors", "teacher/model.safetensors"]


def newest_state(out: Path) -> int:
    """Steps done at the newest complete state; 0 without one."""
    return int(killing.newest(out).partition("-")[2] or 0) // BATCH


def inside_the_epoch(least: int) -> Kill:
    """With a state of at least so many steps, and lines of steps beyond it, all before the end of the first epoch."""

    def act(run: Run, out: Path) -> None:
        def reached() -> bool:
            written = newest_state(out)
            return written >= least and len(small.complete_lines(out)) > written + 1

        assert killing.until(run, reached), run.told()
        run.kill()
        assert least <= newest_state(out) < EPOCH, "inside the first epoch"
        assert newest_state(out) < len(small.complete_lines(out)), "steps are done again"

    return Kill("inside one epoch", act=act)


def campaign(forks: Server, folder: Path, crops: Path, *more: str) -> Campaign:
    """Starts of pretrain/run.py on drawn crops."""
    return Campaign(forks, lambda out: small.arguments("pretrain/run.py", out, crops, *SETTINGS, *more), folder)


@pytest.fixture(scope="module")
def alone(forks, tmp_path_factory):
    """The drawn crops, and the folder of a run that nobody disturbed."""
    crops, folder = small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED), tmp_path_factory.mktemp("alone")
    run = campaign(forks, folder, crops).start(folder / "run")
    assert run.wait() == 0, run.told()
    return crops, folder / "run"


def resumed(forks: Server, folder: Path, alone: tuple[Path, Path], resumes: int, *more: str) -> tuple[int, int]:
    """Kill a run that often inside its first epoch; samples or lines lost, and how many differ."""
    crops, undisturbed = alone
    one = campaign(forks, folder, crops, *more)
    one.spend([inside_the_epoch(4 + 6 * number) for number in range(resumes)])
    assert len(one.starts) == resumes + 1
    assert len(small.json_of(one.outs[0] / "environment.json")["earlier"]) == resumes
    return one.against(undisturbed, FILES)


@pytest.mark.row("R2")
def test_killed_three_times_inside_one_epoch(alone, forks, tmp_path, figures):
    lost, wrong = resumed(forks, tmp_path, alone, 3, "loader.workers=1", "loader.prefetch=2")
    figures("R2", injected="SIGKILL inside one epoch, 1 worker", times=3, lost=lost, wrong=wrong)
    assert (lost, wrong) == (0, 0)


@pytest.mark.soak
@pytest.mark.row("R2")
def test_resumes_inside_one_epoch(alone, forks, tmp_path, figures):
    """2 and 3 resumes, with 0, 1 and 2 workers that are 1, 2 and 4 batches ahead."""
    cases = [(resumes, workers, ahead) for resumes in (2, 3) for workers in (0, 1, 2) for ahead in (1, 2, 4)]
    found = []
    for number, (resumes, workers, ahead) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        more = [f"loader.workers={workers}", f"loader.prefetch={ahead}"]
        found.append(resumed(forks, tmp_path / str(number), alone, resumes, *more))
    lost, wrong = (sum(part) for part in zip(*found, strict=True))
    note = f"{len(cases)} runs: 2 and 3 resumes, 0 to 2 workers, prefetch 1, 2, 4; samples, crops, masks compared, too"
    times = sum(resumes for resumes, _, _ in cases)
    figures("R2", injected="SIGKILL inside one epoch", times=times, lost=lost, wrong=wrong, note=note)
    assert (lost, wrong) == (0, 0)


def test_a_finished_run_stays_as_it_is(alone):
    crops, out = alone
    command = small.arguments("pretrain/run.py", out, crops, *SETTINGS)
    before = {path: path.read_bytes() for path in [*out.glob("teacher/*"), *out.glob("checkpoints/*/*")]}
    lines = (out / "metrics.jsonl").read_bytes()
    assert small.run(command) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert (out / "metrics.jsonl").read_bytes() == lines


def test_the_teacher_is_on_disk_before_the_last_state(tmp_path, monkeypatch):
    """Else a kill between the two leaves a run that counts as finished and has no teacher."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_state", killed)
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 1, "img_size": [16, 16], "patch_size": 8}
    teacher = torch.nn.Module()
    teacher.backbone = Backbone({"model_name": "vit_tiny_patch16_224", "num_classes": 0, **sizes})
    config, plain = CheckpointConfig(every_epochs=1, teacher_every_epochs=1), torch.optim.AdamW(teacher.parameters())
    with pytest.raises(KeyboardInterrupt):
        Keeper(tmp_path, config, 2, 2.0, 8).after(2, {"teacher": teacher, "student": teacher}, plain, {})
    assert (tmp_path / "teacher" / "model.safetensors").is_file()
    assert (tmp_path / "teachers" / "epoch-0001.00" / "model.safetensors").is_file()


def test_smaller_cards_may_go_on_unless_something_sees_the_micro_batch(alone, tmp_path, capsys):
    settings = [*SETTINGS, "schedules.epochs=0.1"]
    for kind, goes_on in (("centre", True), ("sinkhorn", False)):
        first = small.arguments("pretrain/run.py", tmp_path / kind, alone[0], *settings, f"centering.kind={kind}")
        assert small.run(first) == 0
        assert (small.run([*first, "loader.batch_per_device=2"]) == 0) is goes_on
    assert "loader.batch_per_device was 16 and is now 2" in capsys.readouterr().err
