"""R9: the disk is full, read-only or limited while a run writes: what was there stays, the run goes on or says why not.

The disks are real ones of 20 MB in memory, mounted by the run itself.
"""

from pathlib import Path

import full_disks
import killing
import pytest
import small
from forked import Run, Server
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PRETRAIN, FINETUNE = "pretrain.journal", "finetune.journal"
SETTINGS = ["checkpoint.every_epochs=0.5", "schedules.epochs=3", "checkpoint.teacher_every_epochs=3"]  # 24 steps
NOW = ["checkpoint.asynchronous=false"]  # so that a test knows which save meets which disk
MEGABYTES = 20


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


@pytest.fixture(scope="module")
def alone(forks, crops, tmp_path_factory):
    """The run folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run = forks.start(small.arguments("pretrain/run.py", out, crops, *SETTINGS))
    assert run.wait() == 0, run.told()
    return out


def on_small_disk(forks: Server, folder: Path, command: list[str], prepare: list, **first: str) -> Run:
    """Run a command whose DISK is a disk of its own; what lies there at the end comes to folder/seen."""
    full_disks.needs_mounts()
    disk = folder / "disk"
    disk.mkdir(parents=True)
    mount = ["full_disks", "mount", {"folder": str(disk), "megabytes": MEGABYTES, "into": str(folder / "seen")}]
    prepare = [[module, name, {"folder": str(disk), **given}] for module, name, given in prepare]
    run = forks.start([part.replace("DISK", str(disk)) for part in command], [mount, *prepare], **first)
    run.wait()
    return run


def sentences(run: Run) -> list[str]:
    """The last line of the screen first; the progress left out."""
    return [line for line in run.told().splitlines() if "images/s" not in line][::-1]


def states(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def finals(out: Path) -> list[str]:
    return [f"checkpoints/{killing.newest(out)}/tensors.safetensors", "teacher/model.safetensors"]


@pytest.mark.row("R9")
def test_a_run_goes_on_through_a_full_disk_and_ends_as_if_nothing_had_been(forks, crops, alone, tmp_path, figures):
    full = {"module": PRETRAIN, "first": 5, "last": 12}  # the saves of step 8 and 12 fail, that of 16 does not
    note = {"module": PRETRAIN, "file": str(tmp_path / "files"), "steps": [11, 15]}
    prepare = [("full_disks", "full_between", full), ("full_disks", "note_files", note)]
    command = small.arguments("pretrain/run.py", Path("DISK/run"), crops, *SETTINGS, *NOW)
    run = on_small_disk(forks, tmp_path, command, prepare)
    assert run.wait() == 0, run.told()
    told = run.told()
    assert [told.count(f"the state of step {step} could not be saved (No space") for step in (8, 12, 16)] == [1, 1, 0]
    assert told.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert told.count("can be written again, nothing is missing there") == 2  # and the event file
    assert "Traceback" not in told
    out = tmp_path / "seen" / "run"
    during = (tmp_path / "files").read_text().splitlines()[0]
    assert "samples-000000000064/tensors" in during, "the last good state is there"
    assert ".partial" not in during, "what did not fit is removed"
    lost, wrong = killing.compare(out, alone, finals(alone))
    events = EventAccumulator(str(out / "tensorboard")).Reload().Scalars("loss")
    lost += 24 - len(events) + abs(24 - len(small.metrics(out)))
    figures("R9", injected="disk full, then room again", times=2, lost=lost, wrong=wrong, note="saves that failed")
    assert (lost, wrong) == (0, 0)
    assert [event.step for event in events] == list(range(24))


@pytest.mark.row("R9")
@pytest.mark.parametrize("read_only", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_three_failed_saves_in_a_row_end_the_run_with_one_sentence(forks, crops, alone, tmp_path, figures, read_only):
    full = {"module": PRETRAIN, "first": 5, "last": None, "read_only": read_only}
    command = small.arguments("pretrain/run.py", Path("DISK/run"), crops, *SETTINGS, *NOW)
    run = on_small_disk(forks, tmp_path, command, [("full_disks", "full_between", full)])
    assert run.wait() == 2, run.told()
    assert sentences(run)[0].startswith("error: the state of step 16 could not be saved (")
    assert ("Read-only" if read_only else "No space left") in sentences(run)[0]
    assert "Traceback" not in run.told()
    out = tmp_path / "seen" / "run"
    assert states(out) == ["samples-000000000064"]
    again = forks.start(small.arguments("pretrain/run.py", out, crops, *SETTINGS))  # there is room now
    assert again.wait() == 0, again.told()
    lost, wrong = killing.compare(out, alone, finals(alone))
    injected = "disk turns read-only" if read_only else "disk full for good"
    figures("R9", injected=injected, times=3, lost=lost, wrong=wrong, note="stopped, went on from the last state")
    assert (lost, wrong) == (0, 0)


@pytest.mark.row("R9")
@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        ("fill", "error: the disk is full while writing {out}/"),
        ("make_read_only", "error: cannot make the run folder {out}: Read-only"),
    ],
)
def test_a_disk_that_is_full_or_read_only_from_the_start(forks, crops, tmp_path, act, sentence):
    command = small.arguments("pretrain/run.py", Path("DISK/run"), crops, *SETTINGS)
    run = on_small_disk(forks, tmp_path, command, [("full_disks", act, {})])
    assert run.wait() == 2, run.told()
    assert sentences(run)[0].startswith(sentence.format(out=tmp_path / "disk" / "run"))


@pytest.mark.row("R9")
@pytest.mark.parametrize("script", ["pretrain/run.py", "finetune/run.py"])
def test_a_run_folder_that_is_a_file_is_refused(forks, crops, tmp_path, tmp_path_factory, script):
    out = tmp_path / "file"
    out.write_text("mine")
    data = crops if script.startswith("pretrain") else small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)
    more, ckpt = (SETTINGS, None) if script.startswith("pretrain") else ([], "none")
    run = forks.start(small.arguments(script, out, data, *more, ckpt=ckpt))
    assert run.wait() == 2, run.told()
    assert sentences(run)[0] == f"error: cannot make the run folder {out}: File exists; choose another --out"
    assert out.read_text() == "mine"


@pytest.mark.soak
@pytest.mark.row("R9")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_disk_gets_full_amid_every_part_of_a_save(forks, crops, alone, tmp_path, figures, asynchronous):
    """With so many bytes free that a save stops in its first file, in its last, at its end: 40 places each way."""
    whole = sum(path.stat().st_size for path in (alone / "checkpoints").rglob("*") if path.is_file())
    lost = wrong = failed = 0
    for number in range(40):
        full = {"module": PRETRAIN, "first": 5, "last": 12, "free": int(whole * number / 39)}
        folder = tmp_path / str(number)
        more = [*SETTINGS, f"checkpoint.asynchronous={str(asynchronous).lower()}"]
        command = small.arguments("pretrain/run.py", Path("DISK/run"), crops, *more)
        run = on_small_disk(forks, folder, command, [("full_disks", "full_between", full)])
        assert run.wait() == 0, run.told()
        assert "Traceback" not in run.told()
        failed += run.told().count("could not be saved (No space")
        out = folder / "seen" / "run"
        one = killing.compare(out, alone, finals(alone))
        lost, wrong = lost + one[0] + abs(24 - len(small.metrics(out))), wrong + one[1]
        assert not list(out.rglob("*.partial"))
    kind = "asynchronous" if asynchronous else "synchronous"
    figures("R9", injected=f"full amid a save, {kind}", times=40, lost=lost, wrong=wrong, note=f"{failed} saves failed")
    assert (lost, wrong) == (0, 0)
    assert failed > 20


@pytest.mark.soak
@pytest.mark.row("R9")
@pytest.mark.parametrize("last", [7, None])
def test_a_fine_tune_on_a_disk_that_gets_full(forks, tmp_path, tmp_path_factory, figures, last):
    people = small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)
    more = ["resume.every_epochs=1", "optim.epochs=5", "resume.asynchronous=false"]  # 3 steps an epoch
    whole = forks.start(small.arguments("finetune/run.py", tmp_path / "alone", people, *more, ckpt="none"))
    assert whole.wait() == 0, whole.told()
    full = {"module": FINETUNE, "first": 3, "last": last}
    command = small.arguments("finetune/run.py", Path("DISK/run"), people, *more, ckpt="none")
    run = on_small_disk(forks, tmp_path, command, [("full_disks", "full_between", full)])
    assert run.wait() == (2 if last is None else 0), run.told()
    assert "Traceback" not in run.told()
    out = tmp_path / "seen" / "run"
    if last is None:
        assert "in a row that failed" in sentences(run)[0]
        again = forks.start(small.arguments("finetune/run.py", out, people, *more, ckpt="none"))
        assert again.wait() == 0, again.told()
    files = [f"checkpoints/{killing.newest(tmp_path / 'alone')}/tensors.safetensors", "model/model.safetensors"]
    lost, wrong = killing.compare(out, tmp_path / "alone", files)
    injected = f"fine-tuning, disk full{' for good' if last is None else ', then room again'}"
    figures("R9", injected=injected, times=3 if last is None else 2, lost=lost, wrong=wrong)
    assert (lost, wrong) == (0, 0)
