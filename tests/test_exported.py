"""An exported teacher is a plain timm model; one that is damaged or does not fit is refused."""

import json

import full_disks
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from finetune import stored_calibration
from pretrain import checkpoint, committed, exporting, verdict
from pretrain.student_teacher import build_teacher
from recipes.errors import UserError


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
        assert found == {key: value for key, value in config.items() if key != committed.FILES}


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
    config = json.loads((tmp_path / "config.json").read_text())
    save_file({name: value for name, value in tensors.items() if name != "norm.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged \(\d+ bytes in place of"):
        checkpoint.load_backbone(tmp_path)
    del config["files"]  # as in a folder that was put together by hand
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"do not belong together: .*Missing key.*norm\.weight"):
        checkpoint.load_backbone(tmp_path)


@pytest.mark.row("R9")
@pytest.mark.parametrize("layout", ["timm", "dino", "dino with its head", "hub"])
def test_a_disk_that_refuses_an_export_is_told_and_nothing_half_is_left(teacher, tmp_path, figures, layout):
    """So that the same command, which wants an empty folder, works when there is room."""
    backbone, out = teacher.backbone, tmp_path / "out"
    normalize = {"normalize": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    act = {
        "timm": lambda: exporting.to_timm(out, backbone),
        "dino": lambda: exporting.to_dino(out, backbone, {}, {}),
        "dino with its head": lambda: exporting.to_dino(
            out, backbone, teacher.head.state_dict(), {"cls": torch.zeros(64)}
        ),
        "hub": lambda: exporting.to_hub(out, backbone, normalize, "nothing"),
    }[layout]
    act()
    (size,) = (path.stat().st_size for path in out.iterdir() if path.suffix in (".safetensors", ".pth"))
    for path in out.iterdir():
        path.unlink()
    limits = [0, 1, size // 3, size - 1]
    for limit in limits:
        with full_disks.files_of_at_most(limit), pytest.raises(UserError, match=r"out/.*could not be written .*room"):
            act()
        assert list(out.iterdir()) == []
    figures("R9", injected=f"convert.py --to {layout} cut off", times=len(limits), lost=0, wrong=0)
    act()


def test_the_verdict_leaves_a_damaged_snapshot_out(teacher, tmp_path, capsys):
    for folder, samples in (("teachers/epoch-0001.00", 8), ("teachers/epoch-0002.00", 16), ("teacher", 16)):
        checkpoint.save_teacher(tmp_path / folder, teacher.backbone, {"samples": samples, "epochs": samples / 8})
    first, last = tmp_path / "teachers" / "epoch-0001.00", tmp_path / "teacher"
    assert verdict.teachers_of(tmp_path) == [first, last]
    data = bytearray((first / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (first / "model.safetensors").write_bytes(data)
    assert verdict.teachers_of(tmp_path) == [last]
    told = f"warning: {first} is left out of the verdict: {first / 'model.safetensors'} is damaged (its checksum is"
    assert capsys.readouterr().err.startswith(told)
    (last / "config.json").write_text("{ no")
    with pytest.raises(committed.Damaged, match=r"teacher/config\.json is damaged"):
        verdict.teachers_of(tmp_path)


def test_a_calibration_is_not_stored_in_a_damaged_model(teacher, tmp_path):
    checkpoint.save_teacher(tmp_path, teacher.backbone, {})
    assert stored_calibration.own_folder(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").write_text('{"kind": "back')
    with pytest.raises(committed.Damaged, match=r"config\.json is damaged \(Unterminated string"):
        stored_calibration.own_folder(str(tmp_path))
