"""Pictures while a run goes: when, of what, and that nothing of the training changes by them."""

import errno
import random
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from pretrain import checkpoint, committed, keeping, showing
from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.checkpoint import CheckpointConfig
from pretrain.photometric import PhotometricConfig
from pretrain.scalars import Scalars
from pretrain.showing import LOGGED, PicturesConfig, Showing, still
from pretrain.student_teacher import build_teacher
from pretrain.views import ViewsConfig
from shards.reader import ShardReader

KINDS = ("attention", "components", "correspondence")
PNGS = [f"{kind}.png" for kind in KINDS]
SETTINGS = [
    *("schedules.epochs=1", "checkpoint.teacher_every_epochs=0.5", "checkpoint.every_epochs=0.25", "checkpoint.keep=9")
]


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, crops) -> Path:
    """The same run twice, `with` pictures and `without`; few lines are written."""
    base = tmp_path_factory.mktemp("showing")
    for name, more in (("with", ["pictures.images=3"]), ("without", ["pictures.images=0"])):
        given = [*SETTINGS, "log_every=100", *more]
        assert small.run(small.arguments("pretrain/run.py", base / name, crops, *given)) == 0
    return base


def test_they_are_drawn_when_a_teacher_is_kept_and_at_the_end(runs):
    folder = runs / "with" / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-0000.50", "epoch-0001.00"]
    for snapshot in folder.iterdir():
        assert sorted(path.name for path in snapshot.iterdir()) == [*PNGS, "numbers.json"]
        assert small.json_of(snapshot / "numbers.json")["correspondence"]["matching_images"] == 32
    assert not (runs / "without" / "pictures").exists()


def test_the_numbers_stand_in_whole_lines(runs):
    lines, others = small.metrics(runs / "with"), small.metrics(runs / "without")
    assert [line["step"] for line in lines] == [0, 3, 7]
    assert [line["step"] for line in others] == [0, 7]
    assert [sorted(set(line) - set(others[-1])) for line in lines] == [[], sorted(LOGGED), sorted(LOGGED)]
    for line, epoch in zip(lines[1:], ("0000.50", "0001.00"), strict=True):
        stored = small.json_of(runs / "with" / "pictures" / f"epoch-{epoch}" / "numbers.json")["correspondence"]
        assert {name: line[name] for name in LOGGED} == {name: stored[name] for name in LOGGED}
        assert line["loss"] > 0


def test_the_training_is_the_same_bit_for_bit(runs):
    one, other = (checkpoint.newest_sound(runs / name / "checkpoints") for name in ("with", "without"))
    tensors = load_file(one / checkpoint.TENSORS)
    others = load_file(other / checkpoint.TENSORS)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())
    last, theirs = (small.repeatable(small.metrics(runs / name))[-1] for name in ("with", "without"))
    assert {name: last[name] for name in theirs} == theirs


def test_tensorboard_has_them(runs):
    events = EventAccumulator(str(runs / "with" / "tensorboard")).Reload()
    assert events.Tags()["images"] == [f"pictures/{kind}" for kind in KINDS]
    assert [image.step for image in events.Images("pictures/attention")] == [3, 7]
    last = events.Images("pictures/components")[-1].encoded_image_string
    assert last == (runs / "with" / "pictures" / "epoch-0001.00" / "components.png").read_bytes()
    assert [point.step for point in events.Scalars("matching_accuracy")] == [3, 7]


def test_a_run_that_goes_on_draws_the_same_again_also_of_an_older_recipe(runs, crops, tmp_path):
    """From the state after half of the run, in a folder whose recipe does not know of pictures."""
    out = tmp_path / "run"
    shutil.copytree(runs / "with", out)
    committed.discard(checkpoint.states(out / "checkpoints")[2:])
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    del recipe["pictures"]
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.rmtree(out / "pictures")
    more = ["log_every=100", "pictures.images=3"]
    assert small.run(small.arguments("pretrain/run.py", out, crops, *SETTINGS, *more)) == 0
    drawn = sorted(path.relative_to(out) for path in out.glob("pictures/*/*"))
    assert drawn == [Path("pictures", "epoch-0001.00", name) for name in sorted([*PNGS, "numbers.json"])]
    assert all((out / name).read_bytes() == (runs / "with" / name).read_bytes() for name in drawn)
    assert small.repeatable(small.metrics(out)) == small.repeatable(small.metrics(runs / "with"))


class Scene:
    """A Showing of the training images with a tiny teacher."""

    def __init__(self, out, reader, student, **pictures):
        self.teacher = build_teacher(student)
        self.accelerator = types.SimpleNamespace(is_main_process=True, trackers=[])
        config = types.SimpleNamespace(
            **{"seed": 0, "views": ViewsConfig(global_size=(64, 32)), "photometric": PhotometricConfig()},
            pictures=PicturesConfig(**{"images": 2, "matched": 4} | pictures),
        )
        self.showing = Showing(
            out, config, lambda step: f"epoch-{step}" if step % 2 else None, reader, self.accelerator
        )

    def draw(self, step: int = 1) -> dict[str, float]:
        return self.showing.after(step, self.teacher)


@pytest.fixture
def scene(tmp_path, train_reader, make_student):
    return Scene(tmp_path, train_reader, make_student(0))


def test_it_is_due_when_a_snapshot_is_kept(tmp_path, scene, train_reader, make_student):
    assert [scene.showing.due(step) for step in range(1, 5)] == [True, False, True, False]
    assert scene.draw(2) == {}
    assert not (tmp_path / "pictures").exists()
    assert not Scene(tmp_path, train_reader, make_student(0), images=0).showing.due(1)
    keeper = keeping.Keeper(tmp_path, CheckpointConfig(teacher_every_epochs=2), 9, 2.5, 4)
    names = [keeper.snapshot(step) for step in range(1, 10)]
    assert names == [None] * 4 + ["epoch-0002.00"] + [None] * 3 + ["epoch-0003.60"]


def test_other_processes_draw_nothing(tmp_path, scene, monkeypatch):
    monkeypatch.setattr(scene.showing, "accelerator", types.SimpleNamespace(is_main_process=False, trackers=[]))
    assert scene.showing.due(1), "but they write the same line"
    assert scene.draw() == {}
    assert not (tmp_path / "pictures").exists()


def test_no_generator_and_no_weight_is_touched(scene):
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002 - it is the global ones that must not move
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    weights = {name: value.clone() for name, value in scene.teacher.state_dict().items()}
    assert scene.draw().keys() == set(LOGGED)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert all(torch.equal(value, weights[name]) for name, value in scene.teacher.state_dict().items())


def test_batch_statistics_and_modes_are_as_before():
    """With the ICS stem a teacher normalises by the batch; a picture must not add to its statistics."""
    ics = BackboneConfig(name="vit_tiny_patch16_224", embed_dim=32, depth=1, num_heads=1, stem="ics")
    backbone = Backbone(timm_arguments(ics, (64, 32))).eval()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        norm.train()
    compiled = backbone.run_block = lambda *_: pytest.fail("a compiled block must not be run on other shapes")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    with still(backbone), torch.no_grad():
        backbone(torch.randn(2, 3, 64, 32))
    assert [module.training for module in backbone.modules()] == modes
    assert backbone.run_block is compiled
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_a_disk_that_refuses_costs_the_pictures_only(tmp_path, scene, monkeypatch, capsys):
    def refuse(path: Path, _: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(showing, "write_file", refuse)
        numbers = scene.draw()
    told = capsys.readouterr().err
    assert numbers.keys() == set(LOGGED), "what was counted is not lost"
    assert told.startswith("warning: no pictures after step 1: the disk is full while writing ")
    assert told.count("\n") == 1
    assert scene.draw(3) == numbers
    assert (tmp_path / "pictures" / "epoch-3" / "numbers.json").is_file()

    def ours(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(showing, "write_file", ours)
    with pytest.raises(OSError, match="Bad file descriptor"):
        scene.draw()


def test_a_teacher_that_is_not_finite_costs_the_pictures_only(tmp_path, scene, capsys):
    scene.teacher.backbone.vit.norm.weight.data[3] = torch.nan
    assert scene.draw() == {}
    assert "the features of this backbone are not finite" in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


def test_images_that_cannot_be_read_are_tried_again(tmp_path, small_set, make_student, monkeypatch, capsys):
    scene = Scene(tmp_path, ShardReader([small_set], "train"), make_student(0))
    real = showing.sound

    def refuse(*_: object) -> None:
        raise showing.UserError("the storage does not answer")

    monkeypatch.setattr(showing, "sound", refuse)
    assert scene.draw() == {}
    assert "warning: no pictures after step 1: the storage does not answer; the run goes on" in capsys.readouterr().err
    monkeypatch.setattr(showing, "sound", real)
    assert scene.draw(3).keys() == set(LOGGED)


def test_no_file_stays_open(tmp_path, small_set, make_student):
    reader = ShardReader([small_set], "train")
    assert Scene(tmp_path, reader, make_student(0)).draw().keys() == set(LOGGED)
    assert not any(part.files for part in reader.parts)
    assert reader[0].image, "and it reads on"
    reader.close()


def test_fewer_images_than_asked_for(tmp_path, small_set, make_student):
    scene = Scene(tmp_path, ShardReader([small_set], "query"), make_student(0), images=60, matched=2)
    assert scene.draw().keys() == set(LOGGED)
    with Image.open(tmp_path / "pictures" / "epoch-1" / "correspondence.png") as image:
        assert image.height > 256


def test_the_others_are_told_what_this_process_does(tmp_path, scene):
    phases = []

    class Phase:
        def __init__(self, name: str):
            phases.append(name)

        def __enter__(self) -> None:
            phases.append("in")

        def __exit__(self, *_: object) -> None:
            phases.append("out")

    scene.showing.phase = Phase
    scene.draw(1), scene.draw(2)
    assert phases == ["pictures", "in", "out"]


def test_only_our_own_tracker_is_given_pictures(tmp_path, scene):
    ours, theirs = Scalars(tmp_path / "events"), object()
    scene.accelerator.trackers = [theirs, ours]
    scene.draw()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert events.Images("pictures/attention")[0].step == 0
