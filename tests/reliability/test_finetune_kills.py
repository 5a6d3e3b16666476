"""R1 for fine-tuning: killed or stopped again and again, it ends to the last bit as one that nobody disturbed."""

import random
import signal
from pathlib import Path

import killing
import pytest
import small
from forked import Server
from killing import Campaign

EPOCH = 3  # batches of an epoch of 60 images
SETTINGS = ["resume.every_epochs=1", "backbone.drop_path=0.3", "optim.kind=adamw", "validation.every_epochs=2"]
VARIANTS = [["benchmark.workers=0"], ["benchmark.workers=1"], ["benchmark.workers=2"]]
END = "/.model.partial"  # the save after the last step


def campaign(forks: Server, folder: Path, people: Path, epochs: int) -> Campaign:
    """Starts of finetune/run.py from random weights, with 0, 1 and 2 workers in turn."""
    more = [*SETTINGS, f"optim.epochs={epochs}", "validation.identities=4"]

    def line(out: Path) -> list[str]:
        return small.arguments("finetune/run.py", out, people, *more, ckpt="none")

    return Campaign(forks, line, folder, VARIANTS)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """12 identities x 5 images to train on, 12 others to search."""
    return small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)


def undisturbed(one: Campaign, out: Path, twice: bool) -> tuple[list[str], list[str], list[str]]:
    """Run; the tensor files at the end, the operations of a save in the middle and, if twice, of those at the end."""
    found = []
    for name, begin, saves in [("middle", 3, 2), ("end", END, 9)][: 1 + twice]:
        trace = out.with_name(name)
        run = one.start(out, [("kill_points", "arm", {"file": str(trace), "begin": begin})])
        assert run.wait() == 0, run.told()
        found.append(killing.operations_of(trace, saves))  # the second start trains nothing and evaluates again
    state = killing.newest(out)
    files = [f"checkpoints/{state}/tensors.safetensors", "model/model.safetensors", "best/model.safetensors"]
    return files, found[0], found[-1]


def finish(one: Campaign, kills: list[killing.Kill], alone: Path, files: list[str], figures) -> None:
    """Spend the kills; every run must end as the undisturbed one, its evaluation too."""
    one.spend(kills)
    lost, wrong = one.against(alone, files)
    for name, key in (("results.json", "average_precision"), ("validation.json", "epochs")):
        expected = small.json_of(alone / name)[key]
        wrong += sum(small.json_of(out / name)[key] != expected for out in one.outs)
    injected = "fine-tuning: SIGKILL, signals"
    figures("R1", injected=injected, times=one.counts.total(), lost=lost, wrong=wrong, note=one.told())
    assert (lost, wrong) == (0, 0)


@pytest.mark.row("R1")
def test_four_kills_of_a_fine_tune(forks, people, tmp_path, figures):
    (tmp_path / "alone").mkdir()
    one, out = campaign(forks, tmp_path, people, epochs=5), tmp_path / "alone" / "run"
    files, middle, _ = undisturbed(one, out, twice=False)
    placed = [line.split()[1] for line in middle].index("rename")
    kills = [
        killing.any_time(0.0),
        killing.at_point("inside a save", 2, placed, "before", tmp_path / "trace"),
        killing.stopped(signal.SIGTERM, 0.0),
        killing.at_point("before the model", END, 1, "before", tmp_path / "trace"),
    ]
    finish(one, kills, out, files, figures)


@pytest.mark.soak
@pytest.mark.row("R1")
def test_a_fine_tune_killed_again_and_again(forks, people, tmp_path, figures):
    (tmp_path / "alone").mkdir()
    one, out = campaign(forks, tmp_path, people, epochs=20), tmp_path / "alone" / "run"
    files, middle, end = undisturbed(one, out, twice=True)
    trace, chance = tmp_path / "trace", random.Random(2)
    kills = [killing.any_time(chance.uniform(0, 0.5), workers=number % 4 != 0) for number in range(16)]
    kills += [killing.while_writing(chance.uniform(0, 0.01)) for _ in range(4)]
    kills += [killing.after_an_epoch(EPOCH) for _ in range(4)]
    kills += [killing.stopped(number, chance.uniform(0, 0.2)) for number in (signal.SIGTERM, signal.SIGUSR1) * 3]
    kills += killing.points(middle, 3, trace)
    chance.shuffle(kills)
    kills += killing.points(end, END, trace)
    finish(one, kills, out, files, figures)
    assert one.counts.total() >= 40
