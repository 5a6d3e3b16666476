"""pretrain/pictures.py on a run of seconds: every kind of checkpoint, every kind of images, every refusal."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from conftest import encoded
from PIL import Image
from safetensors.torch import load_file

from pretrain import checkpoint, exporting, foreign
from pretrain.heads import Head, HeadsConfig
from pretrain.opened_teacher import open_teacher
from pretrain.token_clusters import assign

ALL = ("attention", "components", "correspondence", "clusters")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of half an epoch; its set is `drawn-unlabeled` beside it."""
    base = tmp_path_factory.mktemp("pictures")
    data = small.drawn(base, small.UNLABELED)
    more = ("schedules.epochs=0.5", "pictures.images=0")
    assert small.run(small.arguments("pretrain/run.py", base / "run", data, *more)) == 0
    return base / "run"


@pytest.fixture(scope="module")
def people(run) -> Path:
    return small.drawn(run.parent, small.LABELLED)


def pictures(ckpt, images, out, *more: str) -> int:
    given = [str(ckpt), str(images), "--out", str(out), "--pool", "24", "--images", "4", *more]
    return small.run([str(small.ROOT / "pretrain/pictures.py"), *given])


def test_all_pictures_of_a_run(run, people, tmp_path, capsys):
    assert pictures(run, people, tmp_path) == 0
    told = capsys.readouterr()
    numbers = small.json_of(tmp_path / "numbers.json")
    for kind in ALL:
        assert f"{tmp_path / kind}.png: {numbers[kind]['sentence']}" in told.out
        with Image.open(tmp_path / f"{kind}.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.min() < 40, "there is ink"
        colours = np.unique(pixels.astype(int) @ (1 << 16, 1 << 8, 1))
        assert len(colours) > 200, "and there are pictures"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(f"{k}.png" for k in ALL), "numbers.json"])
    assert "images/s" in told.err
    attention, matched = numbers["attention"], numbers["correspondence"]
    assert attention["heads"] == len(attention["patches_used_by_head"]) == 2
    assert 0 < attention["patches_with_mass"] <= 0.65, "no more than an even spread needs"
    assert 0 < matched["matching_accuracy"] <= matched["matching_near"] <= 1
    # a patch inside has one place of 32, and 4 to 9 neighbours with itself
    assert matched["matching_chance"] == pytest.approx(1 / 32, rel=0.05)  # a place on a border belongs to two patches
    assert 4 / 32 <= matched["matching_near_chance"] <= 9 / 32
    assert matched["matching_images"] == 24
    assert 0 < matched["matching_patches"] <= 24 * 32
    assert sum(numbers["components"]["variance_shares"]) <= 1
    found = numbers["clusters"]
    assert (found["images"], found["patches"] + found["black_patches"], found["prototypes"]) == (24, 24 * 32, 64)
    assert len(found["drawn"]) <= found["prototypes_used"] <= 64
    assert numbers["opened"].startswith(f"the teacher of {run}/checkpoints/samples-")
    assert numbers["grid"] == [8, 4]


def test_the_same_command_draws_the_same(run, people, tmp_path):
    for name, more in (("one", []), ("again", []), ("other", ["--seed", "1"])):
        assert pictures(run, people, tmp_path / name, *more) == 0
    for kind in ALL:
        one, again, other = ((tmp_path / name / f"{kind}.png").read_bytes() for name in ("one", "again", "other"))
        assert one == again != other


def test_a_teacher_alone_has_no_clusters(run, people, tmp_path, capsys):
    assert pictures(run / "teacher", people, tmp_path) == 0
    why = f"{run}/teacher is the teacher alone, without its projection head; give the run folder of the pretraining"
    assert f"no clusters.png: {why}" in capsys.readouterr().out
    assert not (tmp_path / "clusters.png").exists()
    assert pictures(run / "teacher", people, tmp_path / "x", "--kinds", "clusters") == 2
    assert f"error: --kinds clusters needs a projection head: {why}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_run_s_teacher_is_the_exported_one(run, people, tmp_path):
    kinds = ("--kinds", "attention", "correspondence")
    for name, ckpt in (("run", run), ("teacher", run / "teacher")):
        assert pictures(ckpt, people, tmp_path / name, *kinds) == 0
    for kind in ("attention", "correspondence"):
        one, other = ((tmp_path / name / f"{kind}.png").read_bytes() for name in ("run", "teacher"))
        assert one == other


def test_unlabelled_images_are_paired_with_themselves(run, tmp_path):
    folder = tmp_path / "crops"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(encoded(number))
    (folder / "bad.jpg").write_bytes(encoded(7)[:300])
    assert pictures(run, folder, tmp_path / "out", "--mutual") == 0
    numbers = small.json_of(tmp_path / "out" / "numbers.json")
    assert numbers["correspondence"]["sentence"].startswith("4 pairs;")
    assert numbers["correspondence"]["matching_images"] == numbers["clusters"]["images"] == 5
    assert pictures(run, folder / "1.jpg", tmp_path / "single") == 0
    assert pictures(run, folder / "bad.jpg", tmp_path / "none") == 2


def test_larger_images_give_finer_maps(run, people, tmp_path):
    assert pictures(run, people, tmp_path, "--size", "128", "64", "--heads", "2", "--kinds", "attention") == 0
    assert small.json_of(tmp_path / "numbers.json")["grid"] == [16, 8]
    with Image.open(tmp_path / "attention.png") as image:
        assert image.width == 2 * (4 * 104 + 16) - 8 or image.width == 3 * (4 * 104 + 16) - 8, "one head"


@pytest.mark.parametrize(
    "given, told",
    [
        (["--heads", "3"], "--heads 3: this model has the heads 1 to 2"),
        (["--images", "0"], "--images 0: it must be 1 to 100"),
        (["--pool", "0"], "--pool 0: it must be 1 to 1,000,000"),
        (["--seed", "-1"], "--seed -1: it counts from 0"),
        (["--size", "60", "32"], "--size 60 32: both must be multiples of the patch, 8 pixels"),
        (["--splits", "train"], "holds none of the splits train"),
    ],
)
def test_what_a_user_can_mend_is_said(run, tmp_path, capsys, given, told):
    assert pictures(run, run.parent / "drawn-unlabeled", tmp_path / "out", *given) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_paths_are_said(run, people, tmp_path, capsys):
    assert pictures(tmp_path / "nowhere", people, tmp_path / "out") == 2
    assert pictures(run, tmp_path / "nothing", tmp_path / "out") == 2
    (tmp_path / "file").touch()
    assert pictures(run, people, tmp_path / "file") == 2
    told = capsys.readouterr().err.splitlines()
    assert "nowhere is no checkpoint" in told[0]
    assert "nothing does not exist; give a folder of images" in told[1]
    assert "file is a file; the pictures go into a folder" in told[2]


@pytest.fixture
def stored(make_backbone):
    """A backbone, a head and its centres, with which a file of iBOT can be written."""
    backbone = make_backbone(3, masked=False, embed_dim=64, num_heads=1).eval()
    head = Head(64, HeadsConfig(out_dim=48, hidden_dim=32, bottleneck_dim=16))
    return backbone, head.eval(), {kind: torch.zeros(48) for kind in ("cls", "patches")}


def test_a_file_of_another_project_brings_its_head(stored, tmp_path):
    backbone, head, centres = stored
    exporting.to_dino(tmp_path, backbone, head.state_dict(), centres)
    found = open_teacher(str(tmp_path / "checkpoint.pth"))
    patches = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assign(found.head, patches)[0], assign(head, patches)[0])
    assert all(
        torch.equal(value, backbone.vit.get_parameter(name)) for name, value in found.backbone.vit.named_parameters()
    )
    assert found.headless == ""
    exporting.to_dino(tmp_path, backbone, {}, {})
    bare = open_teacher(str(tmp_path / "backbone.pth"))
    assert bare.head is None
    assert bare.headless.endswith("backbone.pth holds no projection head")
    assert bare.told.endswith("it does not tell mean and std of its images: ImageNet's are taken")


def test_a_head_that_never_saw_a_patch_is_not_used(stored, tmp_path):
    backbone, head, centres = stored
    exporting.to_dino(tmp_path, backbone, head.state_dict(), {"cls": centres["cls"]})
    found = open_teacher(str(tmp_path / "checkpoint.pth"))
    assert found.head is None
    assert "trained without the MIM term, so its head never saw a patch" in found.headless


def test_a_run_without_the_mim_term_has_no_clusters(run, monkeypatch):
    real = checkpoint.read_state

    def read(state: Path) -> tuple[dict, dict]:
        tensors, facts = real(state)
        return {name: tensor for name, tensor in tensors.items() if name != "centres.patches.centre"}, facts

    monkeypatch.setattr(checkpoint, "read_state", read)
    opened = open_teacher(str(run))
    assert opened.head is None
    assert opened.headless == f"{run} was trained without the MIM term, so its head never saw a patch"


def test_a_run_under_way_and_an_old_one(run, tmp_path):
    """A run that has no teacher yet; a state of format 1 that does not tell its recipe."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "teacher")
    expected = load_file(run / "teacher" / "model.safetensors")
    opened = open_teacher(str(copy))
    assert all(torch.equal(value, expected[name]) for name, value in opened.backbone.vit.state_dict().items())
    state = checkpoint.newest_sound(copy / "checkpoints")
    facts = small.json_of(state / "manifest.json")
    (state / "manifest.json").unlink()
    (state / "state.json").write_text(f'{{"format_version": 1, "samples": {facts["samples"]}}}')
    old = open_teacher(str(copy))
    assert old.backbone.arguments == opened.backbone.arguments
    assert old.mean == opened.mean


def test_the_backbone_of_a_fine_tuned_model(run, tmp_path):
    own = open_teacher(str(run)).backbone
    tensors = {f"backbone.vit.{name}": value for name, value in own.vit.state_dict().items()}
    facts = {"kind": "reid", "timm": own.arguments, "augment": {"mean": [0.4] * 3, "std": [0.2] * 3}}
    checkpoint.save_model(tmp_path / "model", tensors, facts)
    opened = open_teacher(str(tmp_path))
    assert (opened.mean, opened.std, opened.head) == ([0.4] * 3, [0.2] * 3, None)
    assert "is the backbone of the fine-tuned model alone" in opened.headless
    assert not foreign.is_foreign(tmp_path / "model")


def test_a_network_without_patches_is_refused(run, people, tmp_path, capsys):
    facts = {"kind": "reid", "timm": {"model_name": "resnet18", "num_classes": 0}}
    checkpoint.save_model(tmp_path / "model", {"backbone.x": torch.zeros(1)}, facts)
    assert pictures(tmp_path, people, tmp_path / "out") == 2
    assert "is no Vision Transformer, so there are no patch tokens to look at" in capsys.readouterr().err
