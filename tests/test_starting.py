"""Starting from another run: student and teacher both get its teacher; what does not fit is refused."""

import pytest
import torch
from torch import nn

from pretrain.centering import Centering, CenteringConfig
from pretrain.checkpoint import save_state, save_teacher
from pretrain.optim import OptimConfig, build_optimizer
from pretrain.starting import start_from
from pretrain.student_teacher import build_teacher
from recipes.errors import UserError


def parts(make_student, seed: int, mim: bool = True, **head):
    student = make_student(seed, mim, **head)
    kinds = ("cls", "patches") if mim else ("cls",)
    centres = nn.ModuleDict({name: Centering(64, CenteringConfig()) for name in kinds})
    return {"student": student, "teacher": build_teacher(student), "centres": centres}


@pytest.fixture
def source(make_student, tmp_path):
    """A run folder whose teacher, student and centres all differ, and those modules."""
    modules = parts(make_student, 1)
    with torch.no_grad():
        for parameter in modules["teacher"].parameters():
            parameter.add_(0.5)
        for centre in modules["centres"].values():
            for buffer in centre.buffers():
                buffer.add_(3)
    save_state(tmp_path / "run" / "checkpoints", modules, build_optimizer(modules["student"], OptimConfig()), 32, 1)
    save_teacher(tmp_path / "run" / "teacher", modules["teacher"].backbone, {})
    return tmp_path / "run", modules


def test_a_run_gives_its_teacher_to_both(source, make_student):
    folder, old = source
    new = parts(make_student, 2)
    told = start_from(str(folder), new)
    assert told == f"teacher, heads and centres of {folder}/checkpoints/samples-{32:012d}"
    teacher, student = old["teacher"].state_dict(), new["student"].state_dict()
    for name, value in teacher.items():
        assert torch.equal(value, new["teacher"].state_dict()[name]), name
        assert torch.equal(value, student[name]), name
    assert set(student) - set(teacher) == {"backbone.mask_embedding"}
    assert torch.equal(student["backbone.mask_embedding"], old["student"].backbone.mask_embedding)
    for name, value in old["centres"].state_dict().items():
        assert torch.equal(value, new["centres"].state_dict()[name]), name


def test_an_exported_teacher_gives_its_backbone(source, make_student):
    folder, old = source
    new, fresh = parts(make_student, 2), parts(make_student, 2)
    assert start_from(str(folder / "teacher"), new) == f"the backbone of {folder}/teacher, fresh heads"
    for part in ("student", "teacher"):
        for name, value in old["teacher"].backbone.vit.state_dict().items():
            assert torch.equal(value, new[part].backbone.vit.state_dict()[name]), name
        for name, value in fresh[part].head.state_dict().items():
            assert torch.equal(value, new[part].head.state_dict()[name]), name


def test_a_run_without_the_mim_term_goes_on_from_one_with_it(source, make_student):
    folder, old = source
    new = parts(make_student, 2, mim=False)
    start_from(str(folder), new)
    for name, value in new["student"].state_dict().items():
        assert torch.equal(value, old["teacher"].state_dict()[name]), name
    assert torch.equal(new["centres"]["cls"].centre, old["centres"]["cls"].centre)


def test_none_changes_nothing(make_student):
    new, fresh = parts(make_student, 2), parts(make_student, 2)
    assert start_from("none", new) == "random weights"
    for name, value in fresh["student"].state_dict().items():
        assert torch.equal(value, new["student"].state_dict()[name])


def test_other_heads_are_refused(source, make_student):
    with pytest.raises(UserError, match=r"head\..* is \(.*\) there and .* in this recipe; its backbone and heads must"):
        start_from(str(source[0]), parts(make_student, 2, bottleneck_dim=24))
    with pytest.raises(UserError, match="is no checkpoint"):
        start_from(str(source[0] / "nowhere"), parts(make_student, 2))
