"""A resumed run is the same run to the last bit; an exported teacher is a plain timm model; damage is told."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from pretrain import checkpoint
from pretrain.centering import Centering, CenteringConfig, teacher_targets
from pretrain.checkpoint import CheckpointConfig
from pretrain.keeping import Keeper
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


def test_an_interrupted_save_is_passed_over(make_student, tmp_path, monkeypatch):
    run = Run(make_student, 0)
    run.save(tmp_path, 4)

    def interrupted(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.save(tmp_path, 8)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    assert [state.name for state in checkpoint.states(tmp_path)] == ["samples-000000000004"]
    run.save(tmp_path, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples-000000000004", "samples-000000000008"]


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
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
    with pytest.raises(UserError, match=r"checkpoint .*samples-000000000004 is damaged .*delete it to go on from"):
        run.load(state)


def test_a_state_of_another_format_is_told(make_student, tmp_path):
    run = Run(make_student, 0)
    run.save(tmp_path, 4)
    state = checkpoint.states(tmp_path)[-1]
    (state / "state.json").write_text('{"format_version": 7, "samples": 4}')
    with pytest.raises(UserError, match="has format 7, this version reads 1"):
        run.load(state)


@pytest.fixture
def teacher(make_student):
    teacher = build_teacher(make_student(3))
    torch.manual_seed(4)
    for parameter in teacher.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    return teacher


@torch.no_grad()
def test_an_exported_teacher_is_a_plain_timm_model(teacher, tmp_path):
    checkpoint.save_teacher(tmp_path / "teacher", teacher.backbone, {"samples": 12, "normalize": {"mean": [0.5] * 3}})
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert (config["kind"], config["samples"], config["normalize"]) == ("backbone", 12, {"mean": [0.5] * 3})
    arguments = dict(config["timm"])
    model = timm.create_model(arguments.pop("model_name"), **arguments).eval()
    model.load_state_dict(load_file(tmp_path / "teacher" / "model.safetensors"), strict=True)
    images = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    tokens, expected = teacher.backbone(images), model.forward_features(images)
    assert torch.allclose(tokens.cls, expected[:, 0], atol=1e-5)
    assert torch.allclose(tokens.patches, expected[:, 1:], atol=1e-5)
    for path in (tmp_path / "teacher", tmp_path, tmp_path / "teacher" / "model.safetensors"):
        backbone, found = checkpoint.load_backbone(path)
        assert torch.equal(backbone.eval()(images).cls, tokens.cls)
        assert found == config


def test_a_backbone_can_be_loaded_at_another_size(teacher, make_backbone, tmp_path):
    checkpoint.save_teacher(tmp_path, teacher.backbone, {})
    wanted = make_backbone(size=(96, 48)).arguments
    backbone, _ = checkpoint.load_backbone(tmp_path, wanted, drop_path=0.2)
    assert backbone.grid == (12, 6)
    expected = checkpoint.resize_positions(teacher.backbone.vit.pos_embed, (8, 4), (12, 6), 1)
    assert torch.equal(backbone.vit.pos_embed, expected)
    assert torch.equal(backbone.vit.blocks[1].mlp.fc1.weight, teacher.backbone.vit.blocks[1].mlp.fc1.weight)
    assert backbone.drops[-1] == 0.2


def test_positions_are_resized_bilinearly_by_hand():
    # one row of two patches 0 and 1 becomes four: centres at -1/4, 1/4, 3/4, 5/4 of the old ones, held at the border
    positions = torch.tensor([[9.0], [0.0], [1.0]])[None]
    found = checkpoint.resize_positions(positions, (1, 2), (1, 4), prefix=1)
    assert torch.allclose(found.flatten(), torch.tensor([9.0, 0.0, 0.25, 0.75, 1.0]))
    tall = checkpoint.resize_positions(positions, (2, 1), (4, 1), prefix=1)
    assert torch.equal(tall, found)


def test_positions_are_resized_as_published():
    # square 14 x 14 of an ImageNet model to 16 x 8, row by row; two places before the patches are copied
    positions = torch.randn(1, 2 + 196, 5, generator=torch.Generator().manual_seed(0))
    found = checkpoint.resize_positions(positions, (14, 14), (16, 8), prefix=2)
    assert found.shape == (1, 2 + 128, 5)
    assert torch.equal(found[:, :2], positions[:, :2])
    for channel in range(5):
        square = positions[0, 2:, channel].reshape(1, 1, 14, 14)
        expected = F.interpolate(square, size=(16, 8), mode="bilinear", align_corners=False)
        assert torch.equal(found[0, 2:, channel], expected.flatten())
    assert torch.equal(checkpoint.resize_positions(positions, (14, 14), (14, 14), prefix=2), positions)


def test_what_is_no_checkpoint_is_told(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "none"):
        with pytest.raises(UserError) as caught:
            checkpoint.load_model(path)
        assert str(caught.value) == (
            f"--ckpt {path} is no checkpoint: expected a folder with model.safetensors and config.json, "
            "as pretrain/run.py writes to OUT/teacher and finetune/run.py to OUT/model"
        )


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_model_is_told(teacher, tmp_path, file):
    checkpoint.save_teacher(tmp_path, teacher.backbone, {})
    (tmp_path / file).write_text("{ not this")
    with pytest.raises(UserError, match=r"cannot be read .* it needs intact model\.safetensors and config\.json"):
        checkpoint.load_backbone(tmp_path)


def test_a_model_without_its_config_is_told(teacher, tmp_path):
    checkpoint.save_teacher(tmp_path, teacher.backbone, {})
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot be read .*config\.json"):
        checkpoint.load_backbone(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json does not tell the timm arguments of the model"):
        checkpoint.load_backbone(tmp_path)


def test_a_model_of_another_width_is_told(teacher, make_backbone, tmp_path):
    checkpoint.save_teacher(tmp_path, teacher.backbone, {})
    wanted = make_backbone(embed_dim=48, depth=3).arguments
    with pytest.raises(UserError) as caught:
        checkpoint.load_backbone(tmp_path, wanted)
    assert str(caught.value) == (
        f"--ckpt {tmp_path} does not fit the recipe's backbone section: depth is 2, the recipe asks for 3; "
        "embed_dim is 32, the recipe asks for 48"
    )


def test_weights_that_do_not_belong_to_the_config_are_told(teacher, tmp_path):
    checkpoint.save_teacher(tmp_path, teacher.backbone, {})
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if name != "norm.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"do not belong together: .*Missing key.*norm\.weight"):
        checkpoint.load_backbone(tmp_path)


def test_what_is_saved_when(make_student, tmp_path):
    run = Run(make_student, 0)
    config = CheckpointConfig(every_epochs=1, keep=2, teacher_every_epochs=2)
    # 10 samples in steps of 4: epochs end inside steps 3, 5, 8 and 10
    keeper, found = Keeper(tmp_path, config, steps=11, steps_per_epoch=2.5, batch=4), []
    for step in range(1, 12):
        keeper.after(step, run.modules, run.optimizer, {"seed": 5})
        found.append(
            [int(state.name.removeprefix("samples-")) // 4 for state in checkpoint.states(tmp_path / "checkpoints")]
        )
    assert found == [[], [], [3], [3], [3, 5], [3, 5], [3, 5], [5, 8], [5, 8], [8, 10], [10, 11]]
    assert sorted(path.name for path in (tmp_path / "teachers").iterdir()) == ["epoch-0002.00", "epoch-0004.00"]
    last = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert (last["samples"], last["epochs"], last["seed"]) == (44, 4.4, 5)
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    assert torch.equal(weights["cls_token"], run.modules["teacher"].backbone.vit.cls_token)
