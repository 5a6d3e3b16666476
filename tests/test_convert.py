"""From one layout to another and back: equal bits, models that timm builds, recipes that load, nothing overwritten."""

import argparse
import json

import numpy as np
import pytest
import small
import strangers
import timm
import torch
from PIL import Image
from strangers import TALL, training, written
from torch import nn

from finetune import models
from finetune.augment import AugmentConfig
from finetune.backbones import BackboneConfig
from pretrain import checkpoint, foreign
from pretrain.backbone import Backbone
from pretrain.centering import Centering, CenteringConfig
from pretrain.config import PretrainConfig
from pretrain.optim import OptimConfig, build_optimizer
from pretrain.starting import start_from
from pretrain.student_teacher import build_teacher
from recipes.load import load


def convert(*words: object) -> int:
    """Exit status of the script."""
    return small.run([str(small.ROOT / "pretrain/convert.py"), *map(str, words)])


@pytest.fixture
def run(make_student, tmp_path):
    """A run folder and its modules."""
    student = make_student(1)
    centres = nn.ModuleDict({name: Centering(64, CenteringConfig()) for name in ("cls", "patches")})
    modules = {"student": student, "teacher": build_teacher(student), "centres": centres}
    with torch.no_grad():
        for tensor in [*modules["teacher"].parameters(), *centres.buffers()]:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
    folder = tmp_path / "run"
    checkpoint.save_state(folder / "checkpoints", modules, (student, [build_optimizer(student, OptimConfig())]), 32, 1)
    facts = {"samples": 32, "epochs": 2.0, "seed": 0, "normalize": {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}}
    checkpoint.save_teacher(folder / "teacher", modules["teacher"].backbone, facts)
    (folder / "recipe.yaml").write_text("loader: {shards: [somewhere/secret/luperson, data/mine/]}\n")
    return folder, modules


@torch.no_grad()
def same_features(model: nn.Module, backbone: Backbone) -> bool:
    """Whether a model of timm gives what the backbone gives, to rounding."""
    images = torch.randn(2, 3, *backbone.arguments["img_size"], generator=torch.Generator().manual_seed(0))
    return torch.allclose(model.eval()(images), backbone.eval()(images).cls, atol=1e-5)


def test_ours_to_dino_and_back_is_equal_to_the_bit(run, tmp_path, capsys):
    folder, modules = run
    assert convert(folder, "--to", "dino", "--out", tmp_path / "bare") == 0
    bare = torch.load(tmp_path / "bare" / "backbone.pth", weights_only=True)
    vit = modules["teacher"].backbone.vit.state_dict()
    assert bare.keys() == vit.keys()
    # nothing in such a file says that 32 channels are 2 heads
    assert convert(tmp_path / "bare" / "backbone.pth") == 2
    assert "into how many heads its 32 channels are cut" in capsys.readouterr().err
    again = ("--heads", 2, "--grid", 8, 4, "--normalize", "imagenet", "--out", tmp_path / "again")
    assert convert(tmp_path / "bare" / "backbone.pth", *again) == 0
    backbone, config = checkpoint.load_backbone(tmp_path / "again", modules["teacher"].backbone.arguments)
    assert all(torch.equal(value, vit[name]) for name, value in backbone.vit.state_dict().items())
    assert config["normalize"]["mean"] == [0.485, 0.456, 0.406]
    assert "backbone.pth (bare backbone)" in config["source"]
    assert str(tmp_path) not in config["source"]


def test_head_and_centres_come_back(tmp_path):
    content = training(TALL).content
    path = written(tmp_path, content)
    assert convert(path, "--to", "dino", "--head", "--out", tmp_path / "whole") == 0
    whole = torch.load(tmp_path / "whole" / "checkpoint.pth", weights_only=True)
    assert whole["teacher"].keys() == content["teacher"].keys()
    assert all(torch.equal(tensor, whole["teacher"][name]) for name, tensor in content["teacher"].items())
    assert all(torch.equal(tensor, whole["ibot_loss"][name]) for name, tensor in content["ibot_loss"].items())


def test_a_run_of_ours_with_its_head(run, tmp_path, make_student):
    folder, modules = run
    assert convert(folder, "--to", "dino", "--head", "--out", tmp_path / "whole") == 0
    found = foreign.read(tmp_path / "whole" / "checkpoint.pth", heads=2)
    head = modules["teacher"].head.state_dict()
    twice = {name.replace("last_layer", "last_layer2") for name in head if "last_layer" in name}
    assert found.head.keys() == {*head, *twice}  # as iBOT names shared prototypes
    assert all(torch.equal(found.head[name], tensor) for name, tensor in head.items())
    assert torch.equal(found.centres["patches"], modules["centres"]["patches"].centre)


def test_ours_to_timm(run, tmp_path, capsys):
    folder, modules = run
    assert convert(folder / "teacher", "--to", "timm", "--out", tmp_path / "timm") == 0
    told = capsys.readouterr().out.partition("written")[2].strip()
    model = eval(told, {"timm": timm})  # the line that it prints
    assert same_features(model, modules["teacher"].backbone)
    fresh = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=(64, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2
    )
    fresh.load_state_dict(timm.models.load_state_dict(str(tmp_path / "timm" / "timm.safetensors")), strict=True)
    assert same_features(fresh, modules["teacher"].backbone)


def test_the_usual_size_needs_its_name_only(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(256, 128))
    assert convert(written(tmp_path, model.state_dict()), "--to", "timm", "--out", tmp_path / "timm") == 0
    path = str(tmp_path / "timm" / "timm.safetensors")
    again = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(256, 128), checkpoint_path=path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    wanted = checkpoint.load_backbone(path)[0].arguments
    assert wanted == {
        **{"model_name": "vit_tiny_patch16_224", "num_classes": 0, "img_size": [256, 128]},
        **{"patch_size": 16, "dynamic_img_size": True},
    }


def test_a_folder_for_the_hub(run, tmp_path):
    folder, modules = run
    out = tmp_path / "hub"
    assert convert(folder, "--to", "hub", "--out", out) == 0
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert same_features(model, modules["teacher"].backbone)
    data = timm.data.resolve_data_config(model=model)
    assert tuple(data["input_size"]) == (3, 64, 32)
    assert (tuple(data["mean"]), tuple(data["std"])) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    pixels = np.full((90, 70, 3), 255, np.uint8)
    view = timm.data.create_transform(**data)(Image.fromarray(pixels))
    assert torch.allclose(view.mean((1, 2)), torch.tensor([6.0, 2.5, 4 / 3]))
    assert view.shape == (3, 64, 32)
    found = json.loads((out / "config.json").read_text())
    assert (found["architecture"], found["num_features"]) == ("vit_tiny_patch16_224", 32)
    assert found["pretrained_cfg"]["crop_pct"] == 1.0
    card = (out / "README.md").read_text()
    for part in (
        "| trained on | luperson, mine |",
        "| samples seen | 32 |",
        "| epochs | 2.0 |",
        "[0.4, 0.5, 0.6]",
        "Licence",
    ):
        assert part in card
    assert "secret" not in card
    backbone, config = checkpoint.load_backbone(out)  # and back, whatever its width
    vit = modules["teacher"].backbone.vit.state_dict()
    assert all(torch.equal(value, vit[name]) for name, value in backbone.vit.state_dict().items())
    assert config["normalize"]["mean"] == [0.4, 0.5, 0.6]


def test_another_size_in_both_kernels(tmp_path):
    path = written(tmp_path, strangers.backbone())
    for kernel in ("bilinear", "bicubic"):
        out = tmp_path / kernel
        assert convert(path, "--size", 384, 128, "--positions", kernel, "--out", out) == 0
        backbone, config = checkpoint.load_backbone(out)
        expected = checkpoint.resize_positions(strangers.backbone()["pos_embed"], (14, 14), (24, 8), 1, kernel)
        assert torch.equal(backbone.vit.pos_embed, expected)
        assert f"from 14 x 14 to 24 x 8 patches, {kernel}" in config["source"]


def test_what_is_refused_says_what_to_do(run, tmp_path, capsys):
    ics = written(tmp_path, strangers.backbone(TALL, ics=True), "ics.pth")
    v2 = written(tmp_path, strangers.strangers()["DINOv2"].content, "v2.pth")
    bare = written(tmp_path, strangers.backbone(), "bare.pth")
    for words, told in (
        ((ics, "--to", "timm"), "timm has no ViT with the ICS stem; --to dino or --to ours keep it"),
        ((ics, "--to", "hub"), "timm has no ViT with the ICS stem"),
        ((v2, "--to", "dino"), "the ViT of DINO has no blocks.0.ls1.gamma; use --to timm or --to hub"),
        ((bare, "--to", "hub"), "does not tell mean and std of its images; say --normalize imagenet or halves"),
        ((bare, "--size", 250, 128), "--size 250 128: both must be multiples of the patch, 16 pixels"),
        ((bare, "--to", "dino", "--head"), "holds no projection head with its centre"),
        ((run[0] / "teacher", "--to", "dino", "--head"), "is no run folder with checkpoints"),
        ((run[0], "--grid", 8, 4), "--grid and --heads are for files of other projects"),
        ((bare, "--head"), "--head belongs to --to dino"),
        ((tmp_path / "nothing",), "is no checkpoint"),
    ):
        assert convert(*words, "--out", tmp_path / "out") == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert convert(bare, "--out", run[0]) == 2
    assert "exists and is no empty folder; nothing is overwritten" in capsys.readouterr().err
    assert checkpoint.states(run[0] / "checkpoints")


def test_a_file_alone_is_told_and_nothing_is_written(tmp_path, capsys):
    path = written(tmp_path, strangers.strangers()["PersonViT"].content)
    assert convert(path) == 0
    out = capsys.readouterr().out
    assert "fine-tuned for person re-identification" in out
    assert "taken      30 tensors of the backbone" in out
    assert "left out     2 (base.fc.weight, base.fc.bias): never used" in out
    assert "left out     1 (classifier.weight)" in out
    assert "img_size=[256, 128]" in out
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.pth"]


def test_a_recipe_from_the_arguments_of_a_training(tmp_path, capsys):
    path = written(tmp_path, training(TALL, args=argparse.Namespace(**strangers.IBOT_ARGS, crop_knob=0.4)).content)
    assert convert("--recipe-from", path) == 0
    text = capsys.readouterr().out
    (tmp_path / "made.yaml").write_text(text)
    config = load(PretrainConfig, tmp_path / "made.yaml")
    assert (config.loader.batch, config.loader.batch_per_device, config.loader.workers) == (512, 64, 9)
    assert (config.views.global_size, config.views.local_count) == ((256, 128), 7)
    assert (config.views.global_scale, config.views.local_scale) == ((0.4, 1.0), (0.05, 0.8))
    assert (config.views.local_size, config.views.ratio) == ((96, 64), (0.375, 0.6667))  # not in the file
    assert (config.masks.ratios, config.masks.spreads, config.masks.shape) == ((0.0, 0.3), (0.0, 0.2), "block")
    assert (config.backbone.name, config.backbone.drop_path) == ("vit_small_patch16_224", 0.2)
    assert (config.heads.out_dim, config.heads.shared, config.heads.norm_last_layer) == (strangers.K, True, False)
    assert (config.losses.cls_weight, config.losses.patch_weight) == (1.0, 0.5)
    now = config.schedules
    assert (now.epochs, now.warmup_epochs, now.lr, now.lr_cap, now.lr_end) == (250, 12, 7.5e-4, 1.5e-3, 2e-6)
    assert (now.weight_decay, now.weight_decay_end, now.momentum) == (0.05, 0.3, 0.99)
    assert (now.teacher_temperature_start, now.teacher_temperature, now.teacher_temperature_epochs) == (0.03, 0.06, 20)
    assert (now.freeze_last_layer_epochs, config.optim.clip, config.optim.clip_by) == (3, 0.3, "parameter")
    assert (config.seed, config.checkpoint.teacher_every_epochs, config.precision) == (4, 20, "bf16")
    assert "# no place: crop_knob = 0.4 (unknown to this recipe: look whether it matters)" in text
    assert "views.ratio: the range of width / height of a crop is not in the file: default" in text
    for word in ("Source", "Command: accelerate launch pretrain/run.py", "Hardware", "Expected", "reproduced"):
        assert word in text.partition("\nseed")[0]


def test_recipes_of_dino_and_transreid_ssl(tmp_path, capsys):
    told = {"arch": "ours_vit_small", "height": 256, "width": 128, "crop_height": 128, "crop_width": 64}
    told |= {
        "patch_size": 16,
        "clip_grad": 0.0,
        "out_dim": 65536,
        "optimizer": "lars",
        "keep_num": 5,
        "pred": "a\n#b: 1",
    }
    path = written(tmp_path, training(TALL, ibot=False, ics=True, args=argparse.Namespace(**told)).content)
    assert convert("--recipe-from", path) == 0
    text = capsys.readouterr().out
    (tmp_path / "made.yaml").write_text(text)
    config = load(PretrainConfig, tmp_path / "made.yaml")
    assert (config.backbone.stem, config.losses.patch_weight, config.optim.clip) == ("ics", 0.0, None)
    assert (config.views.local_size, config.views.ratio, config.heads.out_dim) == ((128, 64), (0.75, 1.3333), 65536)
    assert "optimizer = \"lars\" (only 'adamw' exists here)" in text
    assert "keep_num = 5 (which images: see loader.shards and loader.keep)" in text
    assert 'pred = "a\\n#b: 1"' in text  # what a stranger wrote stays inside of its comment
    for args, why in (
        (argparse.Namespace(), "stores no arguments of its training"),
        (argparse.Namespace(arch="swin_tiny"), "arch = 'swin_tiny' is no Vision Transformer that a recipe can name"),
        (argparse.Namespace(lr="x"), "schedules.lr = 'x' is refused"),
    ):
        assert convert("--recipe-from", written(tmp_path, training(args=args).content)) == 2
        assert why in capsys.readouterr().err


@torch.no_grad()
def test_a_published_fine_tune_embeds_as_it_is(tmp_path):
    stranger = strangers.strangers()["PersonViT"]
    path = written(tmp_path, stranger.content)
    config = BackboneConfig(name="vit_tiny_patch16_224", embed_dim=strangers.DIM, depth=2, num_heads=1)
    model, augment = models.load_embedder(path, config, AugmentConfig(mean=(0.1, 0.1, 0.1)), seed=0)
    assert augment.mean == (0.5, 0.5, 0.5)
    plain = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=(256, 128), embed_dim=strangers.DIM, depth=2, num_heads=1
    )
    plain.load_state_dict(stranger.backbone, strict=True)
    assert same_features(plain, model.backbone)
    stored, augment = models.load_stored(path)
    assert (augment.height, augment.width) == (256, 128)
    assert all(torch.equal(a, b) for a, b in zip(stored.parameters(), model.parameters(), strict=True))
    bare = written(tmp_path, strangers.backbone(), "bare.pth")
    _, augment = models.load_embedder(bare, config, AugmentConfig(mean=(0.1, 0.1, 0.1)), seed=0)
    assert augment.mean == (0.1, 0.1, 0.1)  # the file does not tell; the recipe does


def test_start_from_our_own_exports(run, tmp_path, make_student):
    folder, modules = run
    assert convert(folder, "--to", "hub", "--out", tmp_path / "hub") == 0
    student = make_student(5)
    centres = nn.ModuleDict({name: Centering(64, CenteringConfig()) for name in ("cls", "patches")})
    new = {"student": student, "teacher": build_teacher(student), "centres": centres}
    assert "fresh heads and centres (the file has none)" in start_from(str(tmp_path / "hub"), new)
    vit = modules["teacher"].backbone.vit.state_dict()
    assert all(torch.equal(value, vit[name]) for name, value in new["student"].backbone.vit.state_dict().items())
