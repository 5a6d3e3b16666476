"""R8: whatever happens to the files of a checkpoint, a run goes on from the one before and says why, or refuses."""

import collections
import contextlib
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import damage
import killing
import pytest
import small
import together
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from finetune import resume
from finetune.resume import Position, ResumeConfig
from pretrain import checkpoint, committed, keeping
from pretrain.centering import Centering, CenteringConfig
from pretrain.exporting import head_of
from pretrain.starting import start_from
from pretrain.student_teacher import build_teacher
from recipes.errors import UserError

OLD, NEW = 40, 80  # samples of the state before and of the newest
MANY = pytest.param(1000, marks=pytest.mark.soak)


@pytest.fixture
def alone():
    """The only process of a run."""
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


class Pretraining:
    """Modules and optimiser of a pretraining, and how they are saved and restored."""

    def __init__(self, make_student, out: Path):
        student = make_student(0, shared=False)
        centres = nn.ModuleDict({name: Centering(64, CenteringConfig()) for name in ("cls", "patches")})
        self.modules = {"student": student, "teacher": build_teacher(student), "centres": centres}
        self.trained = student, [torch.optim.AdamW(student.parameters())]
        self.out, self.recipe = out, {"seed": 0}

    def save(self, samples: int) -> None:
        self.fill(samples)
        checkpoint.save_state(self.out / "checkpoints", self.modules, self.trained, samples, 2, recipe=self.recipe)

    def fill(self, number: int) -> None:
        """Other numbers everywhere, given by `number`."""
        draw = torch.Generator().manual_seed(number)
        model, optimisers = self.trained
        for optimiser in optimisers:
            optimiser.state.clear()
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        for optimiser in optimisers:
            optimiser.step()
        with torch.no_grad():
            for tensor in checkpoint.state_tensors(self.modules, self.trained).values():
                tensor.copy_(torch.randn(tensor.shape, generator=draw).mul(9))

    def held(self) -> dict[str, Tensor]:
        live = checkpoint.state_tensors(self.modules, self.trained)
        return {name: tensor.detach().clone() for name, tensor in live.items()}

    def restore(self, accelerator: Accelerator) -> int:
        recipe = self.recipe, ()
        facts = keeping.resume(self.out / "checkpoints", self.modules, self.trained, recipe, 2, accelerator)
        return facts["samples"]


class FineTuning(Pretraining):
    """The same of a fine-tune with two networks, each with an optimiser of its own."""

    def __init__(self, _, out: Path):
        pair = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for name in ("one", "two")})
        optimisers = [torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in pair.values()]
        self.out, self.modules, self.trained = out, {"method": pair}, (pair, optimisers)

    def keeper(self) -> resume.Keeper:
        model, optimisers = self.trained
        return resume.Keeper(self.out, ResumeConfig(every_epochs=1), 9, model, optimisers, ({"seed": 0}, ()))

    def save(self, samples: int) -> None:
        self.fill(samples)
        with contextlib.closing(self.keeper()) as keeper:
            keeper.after(Position(samples // 40, samples // 4, samples))

    def restore(self, accelerator: Accelerator) -> int:
        position = self.keeper().restore(accelerator)
        assert position == Position(position.images // 40, position.images // 4, position.images)
        return position.images


def told_of(text: str, state: Path) -> bool:
    """Whether the screen names the damaged state, says why, and what is used."""
    reason = any(f"{state}" in line and "is damaged (" in line for line in text.splitlines())
    return reason and f"going on from samples-{OLD:012d}, the one before" in text


def damaged(
    one: Pretraining, alone: Accelerator, times: int, kinds: Sequence[damage.Kind] = damage.KINDS
) -> tuple[collections.Counter, int, int]:
    """Damage the newest of two states and restore, again and again: how often by kind; lost: another state than the
    one that must come was used; wrong: values differ from what was saved, or nothing was told."""
    folder, sound, expected = one.out / "checkpoints", one.out / "sound", {}
    for samples in (OLD, NEW):
        one.save(samples)
        expected[samples] = one.held()
    old, new = checkpoint.states(folder)
    folder.rename(sound)
    counts, chance, lost, wrong = collections.Counter(), Random(0), 0, 0
    for number in range(times):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        how = kinds[number % len(kinds)]
        done = how(new, old, chance)
        one.fill(number)
        with contextlib.redirect_stderr(io.StringIO()) as screen:
            found = one.restore(alone)
        wanted = NEW if how in damage.HARMLESS else OLD
        held = one.held()
        same = held.keys() == expected[wanted].keys() and all(
            torch.equal(held[name], tensor) for name, tensor in expected[wanted].items()
        )
        silent = how not in damage.HARMLESS and not told_of(screen.getvalue(), new)
        if found != wanted or not same or silent:
            print(f"{done}: {found}, the same: {same}\n{screen.getvalue()}")
        lost += found != wanted
        wrong += (not same) or silent
        counts[how.__name__] += 1
    return counts, lost, wrong


@pytest.mark.row("R8")
@pytest.mark.parametrize("kind", [Pretraining, FineTuning])
@pytest.mark.parametrize("times", [28, MANY])
def test_the_state_before_a_damaged_one_is_used(make_student, tmp_path, alone, figures, kind, times):
    counts, lost, wrong = damaged(kind(make_student, tmp_path), alone, times)
    note = f"{times - wrong} of {times}: " + ", ".join(f"{count} {name}" for name, count in counts.items())
    injected = f"{kind.__name__.lower()}: newest checkpoint damaged"
    figures("R8", injected=injected, times=times, lost=lost, wrong=wrong, note=note)
    assert (lost, wrong) == (0, 0)


def test_without_the_checksums_wrong_values_would_be_used(make_student, tmp_path, alone, monkeypatch):
    """What the test above rests on: it sees them."""
    one = Pretraining(make_student, tmp_path)
    monkeypatch.setattr(committed, "checksum", lambda path: 0)
    _, lost, wrong = damaged(one, alone, 10, [damage.flip])
    assert lost > 0
    assert wrong > 0


@pytest.mark.row("R8")
def test_a_state_that_has_another_ones_name_is_not_used(make_student, tmp_path, alone, capsys):
    """Both files are sound and belong together, but not to this step: a copy that somebody put there."""
    one = Pretraining(make_student, tmp_path)
    for samples in (OLD, NEW):
        one.save(samples)
    old, new = checkpoint.states(tmp_path / "checkpoints")
    shutil.rmtree(new)
    shutil.copytree(old, new)
    assert one.restore(alone) == OLD
    assert told_of(capsys.readouterr().err, new)


@pytest.mark.row("R8")
@pytest.mark.parametrize("times", [28, MANY])
def test_a_damaged_model_is_refused(make_student, tmp_path, figures, times):
    """An exported teacher has no one before. config.json may be edited, so only its grammar protects it."""
    sound, folder, chance = tmp_path / "sound", tmp_path / "teacher", Random(1)
    facts = {"samples": 12, "epochs": 1.5, "normalize": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    for path, seed in ((sound, 0), (tmp_path / "other", 1)):
        checkpoint.save_teacher(path, make_student(seed).backbone, facts | {"seed": seed})
    weights, config = checkpoint.load_model(sound)
    wrong, refused, edited = 0, 0, 0
    for number in range(times):
        for path in (folder, tmp_path / ".teacher.old"):
            shutil.rmtree(path, ignore_errors=True)
        folder.unlink(missing_ok=True)
        shutil.copytree(sound, folder)
        how = damage.KINDS[number % len(damage.KINDS)]
        done = how(folder, tmp_path / "other", chance)
        try:
            tensors, told = checkpoint.load_model(folder)
        except UserError as error:
            refused += 1
            wrong += how in damage.HARMLESS or str(folder) not in str(error)
            continue
        same = tensors.keys() == weights.keys() and all(torch.equal(tensors[name], weights[name]) for name in weights)
        flipped = how in (damage.flip, damage.flip_in_a_header) and done.startswith(checkpoint.CONFIG)
        edited += flipped and told != config
        bad = not same or (how not in damage.HARMLESS and not flipped)
        if bad:
            print(f"{done}: the same: {same}")
        wrong += bad
    note = f"{refused} refused; the weights are never others; {edited} bits in config.json, which may be edited"
    figures("R8", injected="exported teacher damaged", times=times, lost=0, wrong=wrong, note=note)
    assert wrong == 0


@pytest.mark.row("R8")
def test_what_starts_from_a_run_takes_the_newest_sound_state(make_student, tmp_path, capsys):
    one = Pretraining(make_student, tmp_path)
    for samples in (OLD, NEW):
        one.save(samples)
    old, new = checkpoint.states(tmp_path / "checkpoints")
    tensors, _ = checkpoint.read_state(old)
    (new / checkpoint.TENSORS).write_bytes(b"")
    other = Pretraining(make_student, tmp_path / "other")
    other.modules["student"].mim = True
    assert start_from(str(tmp_path), other.modules) == f"teacher, heads and centres of {old}"
    assert told_of(capsys.readouterr().err, new)
    name = "head.mlp.0.weight"
    assert torch.equal(other.modules["student"].state_dict()[name], tensors[f"teacher.{name}"])
    head, centres = head_of(str(tmp_path), None)
    assert torch.equal(head["mlp.0.weight"], tensors[f"teacher.{name}"])
    assert torch.equal(centres["cls"], tensors["centres.cls.centre"])
    assert told_of(capsys.readouterr().err, new)
    assert new.exists(), "only the run itself moves its states"
    (old / checkpoint.MANIFEST).write_text("[]")
    for act in (lambda: start_from(str(tmp_path), other.modules), lambda: head_of(str(tmp_path), None)):
        with pytest.raises(UserError, match="none of the checkpoints"):
            act()


def resumed_bits(out: Path, files: list[str], start: Callable[[], None], how: damage.Kind, chance: Random) -> tuple:
    """Damage the last state of a finished run, start it again: what is lost and what differs. The screen tells."""
    alone = out.with_name("alone")
    if not alone.exists():
        shutil.copytree(out, alone)
    *_, old, new = checkpoint.states(out / "checkpoints")
    how(new, old, chance)
    start()
    shutil.rmtree(new.with_name(f"{new.name}.damaged"), ignore_errors=True)
    (new.with_name(f"{new.name}.damaged")).unlink(missing_ok=True)
    return killing.compare(out, alone, files)


SCRIPTS = {
    "pretrain/run.py": ["schedules.epochs=1", "checkpoint.every_epochs=0.25"],
    "finetune/run.py": ["resume.every_epochs=1", "optim.epochs=3"],
}
HARMFUL = [kind for kind in damage.KINDS if kind not in damage.HARMLESS]
ONE = [("pretrain/run.py", 1, [damage.flip]), ("finetune/run.py", 1, [damage.flip])]
ALL = [("pretrain/run.py", 1, HARMFUL), ("finetune/run.py", 1, HARMFUL), ("pretrain/run.py", 2, HARMFUL[:4])]


@pytest.mark.row("R8")
@pytest.mark.parametrize("script, ranks, kinds", [*ONE, *(pytest.param(*one, marks=pytest.mark.soak) for one in ALL)])
def test_a_run_ends_with_the_bits_of_one_without_damage(
    forks, tmp_path, tmp_path_factory, figures, script, ranks, kinds
):
    pretraining = script.startswith("pretrain")
    data = small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED if pretraining else small.LABELLED)
    out, screens = tmp_path / "run", []
    line = small.arguments(script, out, data, *SCRIPTS[script], ckpt=None if pretraining else "none")

    def start() -> None:
        runs = together.start(forks, line, ranks)
        assert together.wait(runs) == {0}, [run.told() for run in runs]
        screens.append(runs[0].told())

    start()
    files = [f"checkpoints/{killing.newest(out)}/tensors.safetensors"]
    files.append("teacher/model.safetensors" if pretraining else "model/model.safetensors")
    chance, lost, wrong = Random(2), 0, 0
    for how in kinds:
        found = resumed_bits(out, files, start, how, chance)
        lost, wrong = lost + found[0], wrong + found[1]
        assert "the one before" in screens[-1]
        assert "is damaged (" in screens[-1]
    injected = f"{script} by {ranks}, its last checkpoint damaged"
    figures("R8", injected=injected, times=len(kinds), lost=lost, wrong=wrong)
    assert (lost, wrong) == (0, 0)
