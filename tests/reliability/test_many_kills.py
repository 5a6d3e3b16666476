"""R1: a pretraining killed with SIGKILL again and again ends, to the last bit, as one that nobody disturbed."""

import random
import signal
from pathlib import Path
from typing import NamedTuple

import killing
import pytest
import small
from forked import Server
from killing import Campaign, Kill

EPOCH = 16  # steps of 8 in an epoch of 128 images
SETTINGS = ["loader.batch=8", "views.local_count=1", "checkpoint.every_epochs=0.0625", "checkpoint.teacher_newest=2"]
SETTINGS += ["checkpoint.teacher_every_epochs=2", "checkpoint.teacher_newest_every_epochs=0.25"]
VARIANTS = [["loader.workers=0"], ["loader.workers=1"], ["loader.workers=2", "loader.prefetch=3"]]
END = ".teacher.partial"  # the save with which the last step begins


def campaign(forks: Server, folder: Path, crops: Path, *more: str) -> Campaign:
    """Starts of pretrain/run.py on drawn crops, with 0, 1 and 2 workers in turn."""

    def line(out: Path) -> list[str]:
        return small.arguments("pretrain/run.py", out, crops, *SETTINGS, *more)

    return Campaign(forks, line, folder, VARIANTS)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


class Alone(NamedTuple):
    """Two runs that nobody disturbed."""

    out: Path
    files: list[str]  # tensor files at the end
    middle: list[str]  # operations of the third save and the one after it
    end: list[str]  # operations of the saves of the last step


def undisturbed(forks: Server, crops: Path, folder: Path, *more: str, epochs: int, twice: bool) -> Alone:
    """Run, writing down the operations of the saves; a second time for those at the end."""
    folder.mkdir()
    one, traces = campaign(forks, folder, crops, *more), {"run": folder / "middle", "again": folder / "end"}
    for name, begin in [("run", 3), ("again", END)][: 1 + twice]:
        run = one.start(folder / name, [("kill_points", "arm", {"file": str(traces[name]), "begin": begin})])
        assert run.wait() == 0, run.told()
    files = [f"checkpoints/samples-{8 * EPOCH * epochs:012d}/tensors.safetensors", "teacher/model.safetensors"]
    files += [f"teachers/epoch-{epoch:07.2f}/model.safetensors" for epoch in range(2, epochs + 1, 2)]
    middle = killing.operations_of(traces["run"], saves=2)
    if not twice:
        return Alone(folder / "run", files, middle, [])
    assert killing.compare(folder / "again", folder / "run", files) == (0, 0), "two undisturbed runs are equal"
    return Alone(folder / "run", files, middle, killing.operations_of(traces["again"], saves=99))


def finish(one: Campaign, kills: list[Kill], alone: Alone, figures, injected: str) -> None:
    """Spend the kills; every run must end as the undisturbed one, and may be started once more."""
    one.spend(kills)
    assert all(one.start(out).wait() == 0 for out in one.outs)  # tidies up after a kill behind the last state
    lost, wrong = one.against(alone.out, alone.files)
    figures("R1", injected=injected, times=one.counts.total(), lost=lost, wrong=wrong, note=one.told())
    assert (lost, wrong) == (0, 0)
    assert one.counts.total() == len(kills)
    for part in ("checkpoints", "teachers"):
        kept = sorted(path.name for path in (alone.out / part).iterdir())
        found = [sorted(path.name for path in (out / part).iterdir()) for out in one.outs]
        assert found == [kept] * len(found), "what the recipe keeps, and nothing half-written"


@pytest.mark.row("R1")
def test_five_kills(forks, crops, tmp_path, figures):
    more = "schedules.epochs=2"
    alone = undisturbed(forks, crops, tmp_path / "alone", more, epochs=2, twice=False)
    kinds = [line.split()[1] for line in alone.middle]
    placed, pruned = kinds.index("rename"), kinds.index("rmtree")
    kills = [
        killing.any_time(0.02),
        killing.while_writing(0.0),
        killing.at_point("after a rename", 3, placed, "after", tmp_path / "trace"),
        killing.at_point("inside a pruning", 3, pruned, "half", tmp_path / "trace"),
        killing.after_an_epoch(EPOCH),
    ]
    finish(campaign(forks, tmp_path, crops, more), kills, alone, figures, "SIGKILL, one of each kind")


@pytest.mark.row("R1")
def test_a_fork_computes_the_bits_of_a_fresh_process(forks, crops, tmp_path):
    """So that what is found with forks holds for `accelerate launch`, too."""
    few = "schedules.epochs=0.5"
    run = campaign(forks, tmp_path, crops, few).start(tmp_path / "fork")
    assert run.wait() == 0, run.told()
    process = small.start(small.arguments("pretrain/run.py", tmp_path / "fresh", crops, *SETTINGS, few))
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    files = [f"checkpoints/samples-{EPOCH // 2 * 8:012d}/tensors.safetensors", "teacher/model.safetensors"]
    assert killing.compare(tmp_path / "fork", tmp_path / "fresh", files) == (0, 0)
    assert len(small.metrics(tmp_path / "fork")) == EPOCH // 2


@pytest.mark.soak
@pytest.mark.row("R1")
@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_killed_again_and_again(asynchronous, forks, crops, tmp_path, figures):
    more = ["schedules.epochs=6", f"checkpoint.asynchronous={str(asynchronous).lower()}"]
    alone = undisturbed(forks, crops, tmp_path / "alone", *more, epochs=6, twice=True)
    trace, chance = tmp_path / "trace", random.Random(asynchronous)
    kills = [killing.any_time(chance.uniform(0, 1)) for _ in range(20)]
    kills += [killing.any_time(chance.uniform(0, 1), workers=False) for _ in range(4)]
    kills += [killing.while_writing(chance.uniform(0, 0.01)) for _ in range(8)]
    kills += [killing.after_an_epoch(EPOCH) for _ in range(6)]
    kills += [killing.stopped(number, chance.uniform(0, 1)) for number in (signal.SIGTERM, signal.SIGUSR1) * 2]
    kills += killing.points(alone.middle, 3, trace)
    chance.shuffle(kills)
    kills += killing.points(alone.end, END, trace)  # each is met by a start from the state of the last step but one
    one = campaign(forks, tmp_path, crops, *more)
    finish(one, kills, alone, figures, f"SIGKILL, signals; {'asynchronous' if asynchronous else 'synchronous'} saves")
    assert min(one.counts.values()) >= 2
    assert one.counts.total() >= 50
