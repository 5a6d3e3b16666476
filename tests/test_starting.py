"""Starting from another run or file: student and teacher both get its teacher; what does not fit is refused or told."""

import re

import pytest
import strangers
import torch
from torch import nn

from pretrain.backbone import Backbone, BackboneConfig, timm_arguments
from pretrain.centering import Centering, CenteringConfig
from pretrain.checkpoint import save_state, save_teacher
from pretrain.heads import Head, HeadsConfig
from pretrain.optim import OptimConfig, build_optimizer
from pretrain.photometric import PhotometricConfig
from pretrain.starting import start_from
from pretrain.student_teacher import Student, build_teacher
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
    trained = modules["student"], [build_optimizer(modules["student"], OptimConfig())]
    save_state(tmp_path / "run" / "checkpoints", modules, trained, 32, 1)
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


def of_strangers(mim: bool = True, size=(256, 128), **head) -> dict[str, nn.Module]:
    """Modules as wide as the networks of strangers.py."""
    torch.manual_seed(3)
    config = BackboneConfig(name="vit_tiny_patch16_224", embed_dim=strangers.DIM, depth=2, num_heads=1)
    backbone = Backbone(timm_arguments(config, size), masked=mim)
    sizes = {"out_dim": strangers.K, "hidden_dim": strangers.HIDDEN, "bottleneck_dim": strangers.BOTTLENECK}
    student = Student(backbone, Head(backbone.dim, HeadsConfig(**sizes | head), mim), PhotometricConfig(), mim)
    kinds = ("cls", "patches") if mim else ("cls",)
    centres = nn.ModuleDict({name: Centering(head.get("out_dim", strangers.K), CenteringConfig()) for name in kinds})
    return {"student": student, "teacher": build_teacher(student), "centres": centres}


def holds(modules: dict[str, nn.Module], heads: bool, content: dict) -> None:
    """Both networks have the file's teacher; the heads are the file's or as they were made."""
    fresh = of_strangers()["student"].head.state_dict()
    for part in ("student", "teacher"):
        vit = modules[part].backbone.vit.state_dict()
        for name in ("cls_token", "blocks.1.mlp.fc2.weight", "norm.bias"):
            assert torch.equal(vit[name], content["teacher"][f"backbone.{name}"])
        for name, value in modules[part].head.state_dict().items():
            expected = content["teacher"][f"head.{name}"] if heads else fresh.get(name, value)
            assert torch.equal(value, expected), name


def test_a_training_file_of_ibot_gives_everything(tmp_path):
    content, new = strangers.training(strangers.TALL).content, of_strangers()
    path = strangers.written(tmp_path, content)
    assert start_from(path, new) == (
        f"30 tensors of {path} (iBOT (also PersonViT) training file, teacher); its head, the centre of cls, "
        "the centre of patches, its mask embedding"
    )
    holds(new, True, content)
    assert torch.equal(new["centres"]["cls"].centre, content["ibot_loss"]["center"][0])
    assert torch.equal(new["centres"]["patches"].centre, content["ibot_loss"]["center2"][0, 0])
    mask = content["student"]["module.backbone.masked_embed"]
    assert torch.equal(new["student"].backbone.mask_embedding, mask)
    assert new["student"].backbone.mask_embedding.requires_grad
    assert not any(parameter.requires_grad for parameter in new["teacher"].parameters())


def test_a_head_that_does_not_fit_stays_fresh_and_the_sentence_says_why(tmp_path):
    content = strangers.training().content
    path = strangers.written(tmp_path, content)
    for head, why in (
        ({"out_dim": 16}, r"last_layer\.weight_v is \(32, 16\) there and \(16, 16\) in this recipe"),
        ({"layers": 2}, r"mlp\.2\.weight is \(24, 24\) there and \(16, 24\) in this recipe"),
        ({"norm_last_layer": True}, "has learned lengths there, which heads.norm_last_layer=false would take"),
    ):
        new = of_strangers(**head)
        told = start_from(path, new)
        assert re.search(rf"; fresh heads and centres \(.*{why}", told), told
        assert "14 x 14 to 16 x 8 patches, bilinear" in told
        assert "keys left out (projection head: only a pretraining can take it)" in told
        assert not new["centres"]["cls"].centre.any()
        expected = of_strangers(**head)["student"].head.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in new["student"].head.state_dict().items())
    own = {**content, "teacher": dict(content["teacher"])}
    own["teacher"]["head.last_layer2.weight_v"] = own["teacher"]["head.last_layer.weight_v"] + 1
    path = strangers.written(tmp_path, own)
    assert "its patch tokens have prototypes of their own, which heads.shared=false would take" in start_from(
        path, of_strangers()
    )
    new = of_strangers(shared=False)
    assert "; its head, the centre of cls" in start_from(path, new)
    assert torch.equal(new["teacher"].head.last_layer2.weight_v, own["teacher"]["head.last_layer2.weight_v"])
    path = strangers.written(tmp_path, strangers.training(ibot=False).content)
    assert "fresh heads and centres (last_layer2.weight_v is missing there" in start_from(path, new)


def test_dino_files_without_the_mim_term(tmp_path):
    content = strangers.training(ibot=False).content
    new = of_strangers()
    told = start_from(strangers.written(tmp_path, content), new)
    assert told.endswith("; its head, the centre of cls; fresh the centre of patches")
    holds(new, True, content)
    plain = of_strangers(mim=False)
    assert start_from(strangers.written(tmp_path, content), plain).endswith("; its head, the centre of cls")
    ibot = strangers.training().content  # its prototypes for patch tokens are not needed, whatever they are
    ibot["teacher"]["head.last_layer2.weight_v"] = ibot["teacher"]["head.last_layer.weight_v"] + 1
    assert start_from(strangers.written(tmp_path, ibot), plain).endswith("; its head, the centre of cls")


def test_a_bare_backbone_and_another_recipe(tmp_path):
    path = strangers.written(tmp_path, strangers.backbone())
    told = start_from(path, of_strangers())
    assert told == (
        f"30 tensors of {path} (bare backbone); pos_embed from 14 x 14 to 16 x 8 patches, bilinear; "
        "fresh heads and centres (the file has none)"
    )
    modules = of_strangers()
    modules["student"].backbone.arguments["depth"] = 3
    with pytest.raises(UserError, match="depth is 2, the recipe asks for 3"):
        start_from(path, modules)
