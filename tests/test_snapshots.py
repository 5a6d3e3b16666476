"""Exported teachers on the way: those that are kept for ever, and the newest of finer ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pretrain import committed
from pretrain.backbone import Backbone
from pretrain.checkpoint import CheckpointConfig
from pretrain.keeping import Keeper

# 4 steps an epoch: one that stays every 2 epochs (steps 8, 16, 24), a finer one every half (steps 2, 4, 6, ...)
CONFIG = CheckpointConfig(every_epochs=100, teacher_every_epochs=2, teacher_newest_every_epochs=0.5, teacher_newest=3)
STEPS, PER_EPOCH, BATCH = 30, 4.0, 8


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    module = nn.Module()
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 1, "img_size": [16, 16], "patch_size": 8}
    module.backbone = Backbone({"model_name": "vit_tiny_patch16_224", "num_classes": 0, **sizes})
    return module


def train(
    out: Path,
    teacher: nn.Module,
    first: int,
    last: int,
    config: CheckpointConfig = CONFIG,
    per_epoch: float = PER_EPOCH,
) -> None:
    """Steps first..last (counted from 1); the teacher of step s is full of s."""
    keeper, student = Keeper(out, config, STEPS, per_epoch, BATCH), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(first, last + 1):
        for parameter in teacher.parameters():
            nn.init.constant_(parameter, step)
        keeper.after(step, {"student": student, "teacher": teacher}, optimizer, {"seed": 3})
    keeper.close()


def steps_of(out: Path) -> list[int]:
    """The steps of the snapshots, each of which must be whole and hold its own weights."""
    found = []
    for folder in sorted((out / "teachers").glob("epoch-*")):
        config = json.loads((folder / "config.json").read_text())
        step = config["samples"] // BATCH
        assert torch.equal(load_file(folder / "model.safetensors")["cls_token"], torch.full((1, 1, 16), float(step)))
        assert folder.name == f"epoch-{step / PER_EPOCH:07.2f}"
        found.append(step)
    return found


def test_the_newest_go_and_the_others_stay(teacher, tmp_path):
    kept = []
    for step in range(1, 28):
        train(tmp_path, teacher, step, step)
        kept.append(steps_of(tmp_path) if (tmp_path / "teachers").exists() else [])
    assert kept[1 - 1] == []
    assert kept[6 - 1] == kept[7 - 1] == [2, 4, 6]
    assert kept[8 - 1] == [2, 4, 6, 8], "8 is one that stays and no fourth of the finer ones"
    assert kept[10 - 1] == [4, 6, 8, 10]
    assert kept[14 - 1] == [8, 10, 12, 14]
    assert kept[20 - 1] == [8, 14, 16, 18, 20]
    assert kept[27 - 1] == [8, 16, 20, 22, 24, 26]
    names = {path.name for path in (tmp_path / "teachers").iterdir()}
    assert not [name for name in names if name.startswith(".")], "nothing is left behind"
    told = json.loads((tmp_path / "teachers" / "epoch-0006.00" / "config.json").read_text())
    assert (told["kept"], told["epochs"], told["seed"]) == ("always", 6.0, 3)
    assert json.loads((tmp_path / "teachers" / "epoch-0006.50" / "config.json").read_text())["kept"] == "newest"


def test_without_finer_ones_only_the_others_are_written(teacher, tmp_path):
    train(tmp_path, teacher, 1, 20, CheckpointConfig(every_epochs=100, teacher_every_epochs=2))
    assert steps_of(tmp_path) == [8, 16]


@pytest.mark.parametrize("where", ["before the weights", "before the name", "before the old one goes", "while it goes"])
def test_killed_at_any_point_and_started_again(teacher, tmp_path, monkeypatch, where):
    """The step that was under way is done again; the result is that of a run that nobody disturbed."""
    train(tmp_path / "alone", teacher, 1, 14)
    out, left = tmp_path / "run", [8, 10, 12, 14]
    train(out, teacher, 1, 9)
    assert steps_of(out) == [2, 4, 6, 8]

    def killed(*_: object, **__: object) -> None:
        raise Killed

    def half_deleted(path: Path, **_: object) -> None:
        for file in list(path.iterdir())[:1] if path.is_dir() and path.name.endswith(".gone") else ():
            file.unlink()
            raise Killed
        real_rmtree(path, ignore_errors=True)

    real_rmtree = shutil.rmtree
    if where == "before the weights":
        monkeypatch.setattr(committed, "save_file", killed)
    elif where == "before the name":
        monkeypatch.setattr(Path, "rename", killed)
    elif where == "before the old one goes":
        monkeypatch.setattr(committed, "discard", killed)
    else:
        monkeypatch.setattr(shutil, "rmtree", half_deleted)
    with pytest.raises(Killed):
        train(out, teacher, 10, 10)
    monkeypatch.undo()
    assert set(steps_of(out)) <= {2, 4, 6, 8, 10}, "no half folder has the name of a whole one"
    assert 8 in steps_of(out)
    train(out, teacher, 9, 14)  # the newest full state was that of step 8
    assert steps_of(out) == left == steps_of(tmp_path / "alone")
    assert {path.name for path in (out / "teachers").iterdir()} == {
        path.name for path in (tmp_path / "alone" / "teachers").iterdir()
    }


def test_a_finer_one_never_takes_the_name_of_one_that_stays(teacher, tmp_path):
    """1,000 steps an epoch: steps 2 and 3 are both called epoch-0000.00."""
    config = CheckpointConfig(
        every_epochs=100, teacher_every_epochs=0.002, teacher_newest_every_epochs=0.003, teacher_newest=1
    )
    train(tmp_path, teacher, 1, 3, config, per_epoch=1000.0)
    (folder,) = (tmp_path / "teachers").iterdir()
    told = json.loads((folder / "config.json").read_text())
    assert (told["kept"], told["samples"]) == ("always", 2 * BATCH)


def test_what_cannot_be_read_is_not_deleted(teacher, tmp_path):
    train(tmp_path, teacher, 1, 9)
    for name, text in (("epoch-0000.10", "{ no"), ("epoch-0000.20", "[]"), ("epoch-0000.30", '{"kept": "newest"}')):
        (tmp_path / "teachers" / name).mkdir()
        (tmp_path / "teachers" / name / "config.json").write_text(text)
    (tmp_path / "teachers" / "epoch-0000.40").mkdir()
    train(tmp_path, teacher, 10, 20)
    assert sorted(path.name for path in (tmp_path / "teachers").iterdir())[:4] == [
        f"epoch-0000.{tenths}0" for tenths in (1, 2, 3, 4)
    ]
