"""What a pretraining saves when, beside the training or in it, and what it does with a disk that refuses."""

import errno
import threading

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from pretrain import checkpoint, committed, keeping
from pretrain.checkpoint import CheckpointConfig
from pretrain.keeping import Keeper
from pretrain.saving import Writer
from pretrain.student_teacher import build_teacher
from recipes.errors import UserError

FULL = OSError(errno.ENOSPC, "No space left on device", "the file")


class Parts:
    """What a keeper saves."""

    def __init__(self, make_student):
        student = make_student(0)
        self.modules = {"student": student, "teacher": build_teacher(student)}
        self.optimizer = torch.optim.AdamW(student.parameters())
        for parameter in student.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def keeper(self, out, steps: int = 1000, per_epoch: float = 1.0, **given) -> Keeper:
        return Keeper(out, CheckpointConfig(**{"teacher_every_epochs": 1e6} | given), steps, per_epoch, batch=4)

    def after(self, keeper: Keeper, step: int, stop: bool = False) -> None:
        """`keeper.after` with weights that are those of the step."""
        with torch.no_grad():
            self.modules["student"].head.mlp[0].weight.fill_(step)
        keeper.after(step, self.modules, self.optimizer, {"seed": 5}, stop)


@pytest.fixture
def parts(make_student):
    return Parts(make_student)


def saved(out) -> dict[int, float]:
    """Step and weight of the states that are there."""
    return {
        checkpoint.check_state(state)["samples"] // 4: load_file(state / checkpoint.TENSORS)[
            "student.head.mlp.0.weight"
        ].mean()
        for state in checkpoint.states(out / "checkpoints")
    }


def refusing(monkeypatch, *answers: bool | BaseException) -> None:
    """The next saves of tensors are taken (True) or fail with an error; after that all are taken."""
    left, real = iter(answers), committed.save_file

    def save_file(*given) -> None:
        answer = next(left, True)
        if answer is not True:
            raise answer
        real(*given)

    monkeypatch.setattr(committed, "save_file", save_file)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_when(parts, tmp_path, asynchronous):
    # 10 samples in steps of 4: epochs end inside steps 3, 5, 8 and 10
    given = {"every_epochs": 1, "keep": 2, "teacher_every_epochs": 2, "asynchronous": asynchronous}
    found = []
    with parts.keeper(tmp_path, 11, 2.5, **given) as keeper:
        for step in range(1, 12):
            parts.after(keeper, step)
            keeper.writer.wait()
            found.append(list(saved(tmp_path)))
    assert found == [[], [], [3], [3], [3, 5], [3, 5], [3, 5], [5, 8], [5, 8], [8, 10], [10, 11]]
    assert saved(tmp_path) == {10: 10, 11: 11}
    assert sorted(path.name for path in (tmp_path / "teachers").iterdir()) == ["epoch-0002.00", "epoch-0004.00"]
    weights, told = checkpoint.load_model(tmp_path / "teacher")
    assert (told["samples"], told["epochs"], told["seed"]) == (44, 4.4, 5)
    assert torch.equal(weights["cls_token"], parts.modules["teacher"].backbone.vit.cls_token)


def test_the_last_step_and_a_stop_are_on_disk_at_once(parts, tmp_path):
    keeper = parts.keeper(tmp_path, steps=9, every_epochs=100)
    parts.after(keeper, 4, stop=True)
    assert saved(tmp_path) == {4: 4}
    parts.after(keeper, 9)
    assert saved(tmp_path) == {4: 4, 9: 9}
    assert not keeper.writer.busy
    assert (tmp_path / "teacher" / checkpoint.WEIGHTS).is_file()


def test_a_stop_at_a_step_that_was_saved_writes_no_second_one(parts, tmp_path, monkeypatch):
    keeper, written = parts.keeper(tmp_path, every_epochs=4), []
    real = checkpoint.write_state
    monkeypatch.setattr(checkpoint, "write_state", lambda *given: (written.append(given[2] // 4), real(*given)))
    parts.after(keeper, 4)
    parts.after(keeper, 4, stop=True)
    assert written == [4]
    refusing(monkeypatch, FULL)
    parts.after(keeper, 8)
    parts.after(keeper, 8, stop=True)
    assert written == [4, 8, 8], "the first one did not get there"
    assert saved(tmp_path) == {4: 4, 8: 8}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_refuses_is_told_and_tried_again(parts, tmp_path, monkeypatch, capsys, asynchronous):
    refusing(monkeypatch, True, FULL, FULL, True, FULL, FULL, True)
    with parts.keeper(tmp_path, asynchronous=asynchronous, max_failed=3) as keeper:
        for step in range(1, 8):
            parts.after(keeper, step)
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(" could")[0] for line in told] == [f"warning: the state of step {s}" for s in (2, 3, 5, 6)]
    assert "(No space left on device: the file)" in told[0]
    assert saved(tmp_path) == {4: 4, 7: 7}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"samples-{4 * step:012d}" for step in (4, 7)
    ]


def test_after_several_in_a_row_the_run_stops(parts, tmp_path, monkeypatch):
    refusing(monkeypatch, True, *[FULL] * 9)
    keeper, done = parts.keeper(tmp_path, max_failed=3), []

    def train() -> None:
        for step in range(1, 20):
            parts.after(keeper, step)
            done.append(step)

    with pytest.raises(UserError, match=r"the state of step 4 could not .*the last of 3 saves in a row") as caught:
        train()
    assert "make room or mend the disk, then the same command goes on from the last checkpoint" in str(caught.value)
    assert done == [1, 2, 3, 4], "told at the next save"
    assert saved(tmp_path) == {1: 1}


def test_a_save_that_nothing_makes_up_for_may_not_fail(parts, tmp_path, monkeypatch):
    refusing(monkeypatch, FULL)
    keeper = parts.keeper(tmp_path)
    with pytest.raises(UserError, match=r"the state of step 3 could not be saved .*make room"):
        parts.after(keeper, 3, stop=True)


def test_an_error_of_ours_comes_out_of_the_next_call(parts, tmp_path, monkeypatch):
    refusing(monkeypatch, ZeroDivisionError("a fault"))
    keeper = parts.keeper(tmp_path, every_epochs=2)
    parts.after(keeper, 2)
    keeper.writer.thread.join()
    with pytest.raises(ZeroDivisionError, match="a fault"):
        parts.after(keeper, 3)
    parts.after(keeper, 4)
    keeper.close()
    assert saved(tmp_path) == {4: 4}, "and is told once"


def test_the_memory_for_the_copies_is_taken_once_and_beside_the_training(parts, tmp_path):
    keeper, places = parts.keeper(tmp_path, every_epochs=2), []
    for step in range(1, 7):
        parts.after(keeper, step)
        keeper.writer.wait()
        places.append({name: buffer.data_ptr() for name, buffer in keeper.writer.buffers.items()})
    assert places[0], "before the first save is due"
    assert all(place == places[0] for place in places)
    live = checkpoint.state_tensors(parts.modules, (parts.modules["student"], [parts.optimizer]))
    assert places[0].keys() == live.keys()
    assert not {tensor.data_ptr() for tensor in live.values()} & set(places[0].values())


def test_the_writer_tells_whether_it_is_busy():
    writer, gate = Writer(True, 3), threading.Event()
    writer.submit("a save", [gate.wait])
    assert writer.busy
    writer.poll()
    assert writer.thread is not None, "to ask does not wait"
    gate.set()
    writer.wait()
    assert not writer.busy


@pytest.fixture
def alone():
    """The only process of a run."""
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_goes_on_from_the_newest_sound_state(parts, make_student, tmp_path, alone, capsys):
    with parts.keeper(tmp_path, keep=3) as keeper:
        for step in (1, 2, 3):
            parts.after(keeper, step)
    folder = tmp_path / "checkpoints"
    (folder / "samples-000000000012" / "manifest.json").write_text("{}")
    (folder / ".samples-000000000016.partial").mkdir()
    fresh = Parts(make_student)
    recipe = {"optim": {"lr": 0.1}}, ()
    facts = keeping.resume(folder, fresh.modules, (fresh.modules["student"], [fresh.optimizer]), recipe, 1, alone)
    assert facts["samples"] == 8
    assert (fresh.modules["student"].head.mlp[0].weight == 2).all()
    assert "going on from samples-000000000008, the one before" in capsys.readouterr().err
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["samples-000000000008", "samples-000000000012.damaged"], "and with keep=1 the older one goes"
    nothing = tmp_path / "none"
    assert keeping.resume(nothing, fresh.modules, (nn.Linear(1, 1), []), recipe, 1, alone) is None
