"""R19: a save copies and returns; what changes afterwards is not in its file, however slow the writing is."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import killing
import pytest
import small
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pretrain import checkpoint, committed
from pretrain.centering import Centering, CenteringConfig
from pretrain.checkpoint import CheckpointConfig
from pretrain.keeping import Keeper
from pretrain.student_teacher import build_teacher

BATCH, STEPS = 4, 10**6
BENCH = small.ROOT / "bench" / "checkpoint.py"


class Parts:
    """A state whose every number is another one after each `change`, and its keeper: all is due after each step."""

    def __init__(self, make_student, out: Path, device: str = "cpu"):
        student = make_student(0, shared=False).to(device)
        centres = nn.ModuleDict({name: Centering(64, CenteringConfig()) for name in ("cls", "patches")}).to(device)
        self.modules = {"student": student, "teacher": build_teacher(student).to(device), "centres": centres}
        self.optimizer = torch.optim.AdamW(student.parameters())
        for parameter in student.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.out, self.draw = out, torch.Generator().manual_seed(0)
        self.keeper = Keeper(out, CheckpointConfig(every_epochs=1, teacher_every_epochs=1), STEPS, 1.0, BATCH)

    def live(self) -> dict[str, Tensor]:
        return checkpoint.state_tensors(self.modules, (self.modules["student"], [self.optimizer]))

    @torch.no_grad()
    def change(self) -> None:
        """Write to every tensor in place, as a step does."""
        for tensor in self.live().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=self.draw))
            else:
                tensor.add_(1)

    def held(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.live().items()}

    def after(self, step: int) -> None:
        self.keeper.after(step, self.modules, self.optimizer, {})

    def differing(self, step: int, expected: dict[str, Tensor]) -> int:
        """Tensors in the files of a step, the state's and the teacher's, that are not the expected ones."""
        state = self.out / "checkpoints" / f"samples-{step * BATCH:012d}"
        assert checkpoint.check_state(state)["samples"] == step * BATCH
        found = load_file(state / checkpoint.TENSORS)
        prefix = "teacher.backbone.vit."
        teacher, _ = checkpoint.load_model(self.out / "teachers" / f"epoch-{step:07.2f}")
        found |= {f"exported {name}": tensor for name, tensor in teacher.items()}
        expected = expected | {
            f"exported {name.removeprefix(prefix)}": tensor
            for name, tensor in expected.items()
            if name.startswith(prefix)
        }
        assert found.keys() == expected.keys()
        return sum(not torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def gate(monkeypatch):
    """Closed with `clear()`: nothing is written to the disk until `set()`."""
    event, real = threading.Event(), committed.save_file
    event.set()

    def save_file(*given) -> None:
        assert threading.current_thread().name == "checkpoint"
        assert event.wait(60)
        real(*given)

    monkeypatch.setattr(committed, "save_file", save_file)
    yield event
    event.set()


def changed_after_the_save(parts: Parts, gate: threading.Event, rounds: int) -> int:
    """Change all right after each save, before a byte is written in even rounds, while they are written in odd ones."""
    wrong = 0
    for step in range(1, rounds + 1):
        parts.change()
        expected = parts.held()
        if step % 2 == 0:
            gate.clear()
        parts.after(step)
        parts.change()
        if step % 2 == 0:
            assert parts.keeper.writer.busy, "the save has returned, and nothing is written"
            assert not (parts.out / "checkpoints" / f"samples-{step * BATCH:012d}").exists()
            gate.set()
        while parts.keeper.writer.busy:
            parts.change()
        parts.keeper.writer.wait()
        wrong += parts.differing(step, expected)
    return wrong


@pytest.mark.row("R19")
@pytest.mark.parametrize("rounds", [6, pytest.param(200, marks=pytest.mark.soak)])
def test_the_file_holds_what_was_there_at_the_save(make_student, tmp_path, gate, figures, rounds):
    parts = Parts(make_student, tmp_path)
    wrong = changed_after_the_save(parts, gate, rounds)
    figures("R19", injected="all weights changed after a save returned", times=rounds, lost=0, wrong=wrong)
    assert wrong == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.row("R19")
def test_the_file_holds_what_was_there_at_the_save_on_a_gpu(make_student, tmp_path, gate, figures):
    parts = Parts(make_student, tmp_path, "cuda")
    wrong = changed_after_the_save(parts, gate, 20)
    figures("R19", injected="all weights on a GPU changed after a save returned", times=20, lost=0, wrong=wrong)
    assert wrong == 0


def test_the_test_finds_a_save_that_copies_nothing(make_student, tmp_path, gate, monkeypatch):
    parts = Parts(make_student, tmp_path)
    monkeypatch.setattr(parts.keeper.writer, "copy", dict)
    assert changed_after_the_save(parts, gate, 2) > 0


@pytest.mark.row("R19")
def test_a_second_save_waits_for_the_first(make_student, tmp_path, gate, figures):
    parts, expected = Parts(make_student, tmp_path), []
    gate.clear()
    for step in (1, 2, 3):
        parts.change()
        expected.append(parts.held())
        opener = threading.Timer(0.1, gate.set)
        opener.start()
        begin = time.monotonic()
        parts.after(step)
        opener.join()
        if step > 1:
            assert time.monotonic() - begin >= 0.1, "the copies of the one before are still needed"
            assert parts.differing(step - 1, expected[step - 2]) == 0
        gate.clear()
        parts.change()
    gate.set()
    parts.keeper.close()
    wrong = sum(parts.differing(step, expected[step - 1]) for step in (2, 3))
    figures("R19", injected="a save while the one before is being written", times=2, lost=0, wrong=wrong)
    assert wrong == 0


SETTINGS = ["loader.batch=8", "views.local_count=1", "checkpoint.every_epochs=0.0625", "checkpoint.keep=1000"]
SETTINGS += ["checkpoint.teacher_every_epochs=0.125"]
EPOCH = 16  # steps of 8 in an epoch of 128 images


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


@pytest.mark.row("R19")
@pytest.mark.parametrize("epochs", [0.5, pytest.param(8, marks=pytest.mark.soak)])
def test_a_slow_disk_changes_no_bit(forks, crops, tmp_path, figures, epochs):
    """Runs that save after every step: in the step, and beside the steps on a disk that takes three steps for it."""
    runs = {}
    for name, value in (("synchronous", "false"), ("asynchronous", "true")):
        more = [*SETTINGS, f"schedules.epochs={epochs}", f"checkpoint.asynchronous={value}"]
        line = small.arguments("pretrain/run.py", tmp_path / name, crops, *more)
        runs[name] = forks.start(line, [("slow_writes", "slow", {"seconds": 0.05})] if value == "true" else [])
    for run in runs.values():
        assert run.wait() == 0, run.told()
    alone, beside = tmp_path / "synchronous", tmp_path / "asynchronous"
    files = sorted(str(path.relative_to(alone)) for path in alone.rglob("*.safetensors"))
    steps = int(EPOCH * epochs)
    assert len(files) == steps + steps // 2 + 1, "states, teachers on the way, the last one"
    lost, wrong = killing.compare(beside, alone, files)
    figures("R19", injected="a slow disk beside the steps", times=len(files), lost=lost, wrong=wrong)
    assert (lost, wrong) == (0, 0)


@pytest.mark.row("R19")
@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.soak)])
def test_killed_while_the_disk_is_written_beside_the_steps(forks, crops, tmp_path, figures, count):
    """Nothing has the name of the state that was under way; the one before is there, and the run goes on from it."""
    line = small.arguments("pretrain/run.py", tmp_path / "run", crops, *SETTINGS, "schedules.epochs=2")
    wrong = lost = 0
    for number in range(count):
        folder = tmp_path / "run" / "checkpoints"
        before = len(checkpoint.states(folder))
        trace = tmp_path / f"trace-{number}"
        # the first save of an even step is that of its teacher
        arm = {"file": str(trace), "begin": f".samples-{8 * (before + 2):012d}", "number": 0, "when": "half"}
        run = forks.start(line, [("kill_points", "arm", arm)])
        assert run.wait() == -9, run.told()
        states = checkpoint.states(folder)
        lost += before + 1 - len(states)
        wrong += sum(checkpoint.check_state(state)["samples"] != 8 * (i + 1) for i, state in enumerate(states))
        assert len(list(folder.glob(".samples-*.partial"))) == 1, "it died in the middle of the write"
    figures("R19", injected="SIGKILL in a write beside the steps", times=count, lost=lost, wrong=wrong)
    assert (lost, wrong) == (0, 0)


def test_the_bench_measures_what_it_says(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCH.parent)
    import checkpoint as bench
    from textbook_step.ours import Crops

    training = bench.Training("vit_tiny_patch16_224", Crops(1, 1, (64, 32), (32, 32)), 64, False, "cpu")
    found = bench.measure(training, tmp_path, rounds=1, steps=1)
    assert found["ours"] == found["stall_s"]["asynchronous"]
    assert found["written_s"]["asynchronous"] > found["stall_s"]["asynchronous"], "the write is beside the steps"
    assert len(found["steps_during"]) == 1
    assert found["steps_during"][0] >= 1
    for way in ("asynchronous", "synchronous"):
        for state in checkpoint.states(tmp_path / way / "checkpoints"):
            checkpoint.check_state(state)


@pytest.mark.soak
@pytest.mark.row("R19")
def test_a_save_of_vit_b_stalls_for_a_tenth_of_a_synchronous_one(tmp_path, figures):
    command = [sys.executable, str(BENCH), "--rounds", "3", "--steps", "1", "--json", str(tmp_path / "line.json")]
    subprocess.run([*command, "--folder", str(tmp_path)], check=True, timeout=900, cwd=small.ROOT)
    found = json.loads((tmp_path / "line.json").read_text())
    stall = found["stall_s"]
    told = f"{stall['asynchronous']:.2f} s of {stall['synchronous']:.2f} s: {found['share_of_synchronous']:.1%}"
    note = f"stall of a ViT-B state of {found['state_mb']} MB: {told}"
    figures("R19", injected="a save of ViT-B beside the steps", times=3, lost=0, wrong=0, note=note)
    assert found["share_of_synchronous"] <= 0.10
