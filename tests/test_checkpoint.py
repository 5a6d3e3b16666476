"""A resumed run is the same run to the last bit; a damaged state is told, and the one before is found."""

import pytest
import torch
from torch import nn

from pretrain import checkpoint, committed
from pretrain.centering import Centering, CenteringConfig, teacher_targets
from pretrain.losses import LossesConfig, named_losses
from pretrain.optim import OptimConfig, build_optimizer, clip_gradients, freeze_last_layer, set_values
from pretrain.student_teacher import build_teacher, update_teacher
from recipes.errors import UserError

BATCH = 4


class Run:
    """A pretraining of a few steps, made of the parts and without the entry script."""

    def __init__(self, make_student, seed: int):
        student = make_student(seed, drop_path=0.3, shared=False)
        centres = nn.ModuleDict({name: Centering(64, CenteringConfig()) for name in ("cls", "patches")})
        self.modules = {"student": student, "teacher": build_teacher(student), "centres": centres}
        self.optimizer = build_optimizer(student, OptimConfig())

    def train(self, batches, first: int, last: int) -> None:
        student, teacher, centres = self.modules.values()
        for step in range(first, last):
            set_values(self.optimizer, 1e-3 * (step + 1), 0.1)
            targets = teacher_targets(centres, teacher(batches[step]), 0.04)
            loss = named_losses(student(batches[step]), targets, batches[step].mask_weights, LossesConfig())["loss"]
            loss.backward()
            if step == 0:  # so that not all parameters have a state of the same age
                freeze_last_layer(student)
            clip_gradients(student, OptimConfig())
            self.optimizer.step()
            self.optimizer.zero_grad()
            update_teacher(teacher, student, 0.99)
            for centre in centres.values():
                centre.end_step()

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {
            f"{name}.{key}": value for name, part in self.modules.items() for key, value in part.state_dict().items()
        }
        return {**own, **checkpoint.optimizer_tensors(self.optimizer, self.modules["student"])}

    def save(self, folder, samples: int, keep: int = 2) -> None:
        checkpoint.save_state(folder, self.modules, self.trained, samples, keep)

    @property
    def trained(self) -> checkpoint.Trained:
        return self.modules["student"], [self.optimizer]

    def load(self, state) -> int:
        return checkpoint.load_state(state, self.modules, self.trained)["samples"]


@pytest.fixture(scope="module")
def batches(make_batch):
    return [make_batch(BATCH, seed=step) for step in range(6)]


def same(one: Run, other: Run) -> bool:
    a, b = one.tensors(), other.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("done", [1, 3])  # after one step the prototypes, still frozen, have no moments
def test_going_on_from_a_checkpoint_is_bit_equal(make_student, batches, tmp_path, done):
    run = Run(make_student, 0)
    run.train(batches, 0, done)
    run.save(tmp_path, done * BATCH)
    other = Run(make_student, 1)
    other.train(batches, 0, 2)  # leaves moments behind that must not survive
    assert not same(run, other)
    assert other.load(checkpoint.states(tmp_path)[-1]) == done * BATCH
    assert same(run, other)
    run.train(batches, done, 6)
    other.train(batches, done, 6)
    assert same(run, other)


def test_the_state_of_the_optimiser_counts(make_student, batches, tmp_path):
    # were moments or counters lost, the first test would have to see it
    run, other = Run(make_student, 0), Run(make_student, 0)
    run.train(batches, 0, 3)
    other.train(batches, 0, 3)
    other.optimizer.state.clear()
    run.train(batches, 3, 4)
    other.train(batches, 3, 4)
    assert not torch.equal(run.modules["student"].head.mlp[0].weight, other.modules["student"].head.mlp[0].weight)


def test_a_state_before_the_first_step(make_student, tmp_path):
    run, other = Run(make_student, 0), Run(make_student, 1)
    run.save(tmp_path, 0)
    assert other.load(checkpoint.states(tmp_path)[-1]) == 0
    assert same(run, other)


def test_the_optimiser_is_keyed_by_name(make_student, batches, tmp_path):
    run = Run(make_student, 0)
    run.train(batches, 0, 2)
    keys = checkpoint.optimizer_tensors(run.optimizer, run.modules["student"])
    expected = {
        f"{n}//{what}"
        for n, _ in run.modules["student"].named_parameters()
        for what in ("step", "exp_avg", "exp_avg_sq")
    }
    assert set(keys) == expected
    # the prototypes were frozen for one of two steps
    assert keys["head.last_layer.weight_v//step"] == 1
    assert keys["head.mlp.0.weight//step"] == 2


def test_the_newest_states_are_kept(make_student, tmp_path):
    run = Run(make_student, 0)
    for samples in (4, 8, 12, 100, 1000):
        run.save(tmp_path, samples, keep=3)
    names = [f"samples-{n:012d}" for n in (12, 100, 1000)]
    assert [state.name for state in checkpoint.states(tmp_path)] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert checkpoint.states(tmp_path / "none") == []


def test_an_interrupted_save_leaves_nothing(make_student, tmp_path, monkeypatch):
    run = Run(make_student, 0)
    run.save(tmp_path, 4)

    def interrupted(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(committed, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.save(tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["samples-000000000004"]


def test_what_a_killed_save_left_is_passed_over_and_tidied_up(make_student, tmp_path):
    run = Run(make_student, 0)
    run.save(tmp_path, 4)
    for name in (".samples-000000000008.partial", ".samples-000000000002.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensors.safetensors").write_bytes(b"half")
    assert checkpoint.newest_sound(tmp_path).name == "samples-000000000004"
    run.save(tmp_path, 12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples-000000000004", "samples-000000000012"]


@pytest.mark.parametrize("file", ["manifest.json", "tensors.safetensors"])
@pytest.mark.parametrize("how", ["cut", "lost", "empty"])
def test_a_damaged_state_is_told(make_student, tmp_path, file, how):
    run = Run(make_student, 0)
    run.save(tmp_path, 4)
    state = checkpoint.states(tmp_path)[-1]
    if how == "lost":
        (state / file).unlink()
    else:
        data = (state / file).read_bytes()
        (state / file).write_bytes(data[: len(data) // 2] if how == "cut" else b"")
    reason = {"lost": "No such file or directory", "cut": "bytes in place of|delimiter|char"}.get(how, "0 bytes|char 0")
    with pytest.raises(committed.Damaged, match=rf"samples-000000000004/{file} is damaged \(.*({reason})"):
        run.load(state)


def test_a_state_of_another_format_is_told(make_student, tmp_path):
    """It is not damaged, so it is not moved aside, and none before it is taken instead."""
    run = Run(make_student, 0)
    run.save(tmp_path, 4)
    names = checkpoint.TENSORS, checkpoint.MANIFEST
    newer = tmp_path / "samples-000000000008"
    committed.commit(newer, {"x": torch.ones(1)}, names, {"format_version": 7, "samples": 8}, sealed=True)
    for act in (lambda: run.load(newer), lambda: checkpoint.newest_sound(tmp_path, aside=True)):
        with pytest.raises(
            UserError, match=r"has format 7, this version reads 2 and 1; go on with the version"
        ) as caught:
            act()
        assert not isinstance(caught.value, committed.Damaged)
    assert newer.exists()


def test_a_state_of_another_recipe_is_refused_with_all_that_differs(make_student, tmp_path):
    run = Run(make_student, 0)
    old = {"optim": {"lr": 0.1, "clip": 3.0}, "seed": 0, "log_every": 10}
    checkpoint.save_state(tmp_path, run.modules, run.trained, 4, 2, recipe=old)
    (state,) = checkpoint.states(tmp_path)
    new = {"optim": {"lr": 0.2, "clip": 3.0}, "seed": 1, "log_every": 50}
    with pytest.raises(UserError) as caught:
        checkpoint.load_state(state, run.modules, run.trained, (new, ("log_every",)))
    told = str(caught.value)
    assert told.startswith(f"checkpoint {state} is of another recipe: ")
    assert "optim.lr" in told
    assert "seed" in told
    assert "clip" not in told
    assert "log_every" not in told
    facts = checkpoint.load_state(state, run.modules, run.trained, (old | {"log_every": 50}, ("log_every",)))
    assert facts["recipe"] == old


def test_the_newest_sound_state_is_found(make_student, tmp_path, capsys):
    run = Run(make_student, 0)
    for samples in (4, 8, 12):
        run.save(tmp_path, samples, keep=3)
    names = [f"samples-{samples:012d}" for samples in (4, 8, 12)]
    assert checkpoint.newest_sound(tmp_path).name == names[2]
    assert capsys.readouterr().err == ""
    (tmp_path / names[2] / "manifest.json").unlink()
    (tmp_path / names[1] / "tensors.safetensors").write_bytes(b"")
    assert checkpoint.newest_sound(tmp_path).name == names[0]
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(f"warning: checkpoint {names[2]} is not used: {tmp_path / names[2] / 'manifest.json'} is")
    assert f"{tmp_path / names[1] / 'tensors.safetensors'} is damaged (0 bytes in place of" in told[1]
    assert told[2:] == [f"warning: going on from {names[0]}, the one before"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names, "only a run that goes on moves them"
    assert checkpoint.newest_sound(tmp_path, aside=True).name == names[0]
    aside = [f"{name}.damaged" for name in names[1:]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], *aside]
    run.save(tmp_path, 8)
    (tmp_path / names[1] / "manifest.json").write_text("{}")
    assert checkpoint.newest_sound(tmp_path, aside=True).name == names[0], "it takes the place of the one aside"
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[0], *aside]
    assert checkpoint.newest_sound(tmp_path / "none") is None


def test_without_a_sound_state_a_run_does_not_begin_anew_by_itself(make_student, tmp_path):
    run = Run(make_student, 0)
    for samples in (4, 8):
        run.save(tmp_path, samples)
        (tmp_path / f"samples-{samples:012d}" / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the checkpoints .* is sound \(.*8/tensors.*another --out"):
        checkpoint.newest_sound(tmp_path)
