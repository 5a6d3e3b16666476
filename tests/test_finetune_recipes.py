"""The recipes of BoT against the published settings, one line a group, and a step with what they choose."""

import pytest
import torch

from finetune import backbones
from finetune.config import FinetuneConfig
from finetune.methods import build
from finetune.methods.base import ImageBatch, Parts
from finetune.optim import build_optimizer, set_rate
from recipes.load import load, recipe_path

ALL = {path.stem: path for path in sorted(recipe_path("finetune").glob("*.yaml"))}
PUBLISHED = [name for name in ALL if name.startswith(("bot_", "cross_"))]
VITS = [name for name in PUBLISHED if "_r50" not in name]
PASS = ("pass_vits", "pass_vitb", "pass_vits_384", "pass_vitb_384")
SETS = ("market1501", "msmt17", "dukemtmc", "occluded_duke", "cuhk03_np", "synergyreid")


def recipe(name: str) -> FinetuneConfig:
    return load(FinetuneConfig, ALL[name])


def test_every_set_and_model_has_its_recipe():
    small = {f"bot_{name}" for name in SETS}
    base = {f"bot_{name}_vitb" for name in SETS if name != "synergyreid"}
    resnet = {f"bot_{name}_r50" for name in ("market1501", "msmt17", "dukemtmc", "cuhk03_np")}
    resnet |= {f"bot_{name}_r50_centre" for name in ("market1501", "dukemtmc")}
    both = {
        f"bot_{name}_{what}"
        for name in ("market1501", "msmt17")
        for what in ("vits_ics", "vits_ics_4gpus", "vitb_ics_384", *PASS)
    }
    assert set(PUBLISHED) == {"cross_market1501", *small, *base, *resnet, *both}


@pytest.mark.parametrize("name", VITS)
def test_vits_have_the_settings_of_transreid_ssl_and_personvit(name):
    config = recipe(name)
    optim, losses, augment = config.optim, config.method["id_losses"], config.augment
    four = name.endswith("_4gpus")  # batch 256
    assert (optim.kind, optim.momentum, optim.weight_decay, optim.bias_lr_factor) == ("sgd", 0.9, 1e-4, 2.0)
    assert optim.lr == (3.2e-3 if four else 4e-4)
    assert (optim.epochs, optim.schedule, optim.by, optim.layer_decay) == (120, "cosine", "epoch", 1.0)
    assert (optim.warmup_factor, optim.end_factor) == (0.01, 0.002)
    assert optim.warmup_epochs == (5 if name == "bot_market1501_vitb" else 20)
    assert (config.sampling.identities_per_batch, config.sampling.images_per_identity) == (64 if four else 16, 4)
    assert losses == {"id_weight": 1.0, "triplet_weight": 1.0, "margin": None, "label_smoothing": 0.0}
    assert (augment.height, augment.width) == (384 if name.endswith("_384") else 256, 128)
    assert (augment.flip, augment.pad, augment.erase) == (0.5, 10, 0.5)
    assert augment.mean == augment.std == (0.5, 0.5, 0.5)
    assert config.backbone.drop_path == 0.1
    assert config.seed == 1234


@pytest.mark.parametrize("name", VITS)
def test_the_backbone_is_the_one_of_the_name(name):
    config = recipe(name)
    large = "vitb" in name
    assert config.backbone.name == f"vit_{'base' if large else 'small'}_patch16_224"
    assert config.backbone.stem == ("ics" if "_ics" in name else "patch")
    assert config.backbone.registers == (3 if "_pass_" in name else 0)
    pooling = "cls_parts" if "_pass_" in name else None
    assert config.method["necks"] == {"feature": "before", **({"pooling": pooling} if pooling else {})}
    arguments = backbones.arguments_of(config.backbone, (config.augment.height, config.augment.width))
    assert arguments["img_size"] == [config.augment.height, 128]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "_r50" in name])
def test_resnets_have_the_settings_of_fast_reid_or_of_the_paper(name):
    config = recipe(name)
    optim, losses, centre = config.optim, config.method["id_losses"], name.endswith("_centre")
    assert (optim.kind, optim.lr, optim.weight_decay, optim.bias_lr_factor) == ("adam", 3.5e-4, 5e-4, 1.0)
    assert (optim.schedule, optim.gamma, optim.epochs) == ("steps", 0.1, 120)
    assert optim.steps == ((40, 70) if centre else (40, 90))
    assert (optim.by, optim.warmup_factor) == (("epoch", 0.01) if centre else ("step", 0.1))
    assert (losses["margin"], losses["label_smoothing"]) == (0.3, 0.1)
    assert losses.get("smooth_over", "all") == ("all" if centre else "others")
    assert losses.get("centre_weight", 0.0) == (5e-4 if centre else 0.0)
    assert config.method["necks"] == {"feature": "after" if centre else "before"}
    assert (config.backbone.name, config.backbone.last_stride, config.backbone.drop_path) == ("resnet50", 1, 0.0)
    assert config.augment.mean == (0.485, 0.456, 0.406)
    images = {"market1501": 12_936, "msmt17": 30_248, "dukemtmc": 16_522, "cuhk03_np": 7_365}
    if not centre:  # 2,000 steps of 64 images
        count = next(count for key, count in images.items() if key in name)
        assert optim.warmup_epochs == pytest.approx(2000 / (count / 64), rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_set_is_the_one_of_the_name(name):
    packed = next(key for key in SETS if f"_{key}" in name)
    folder = {"msmt17": "data/msmt17_v1"}.get(packed, f"data/{packed}")
    config = recipe(name)
    assert config.benchmark.shards == folder
    header = ALL[name].read_text()
    assert f"--out {folder}" in header
    assert f"--recipe recipes/finetune/{name}.yaml" in header


def test_cross_domain_searches_other_sets():
    tests = recipe("cross_market1501").benchmark.tests
    assert len(tests) == 3
    assert recipe("cross_market1501").benchmark.shards in tests


def step(name: str, /, **smaller) -> tuple[dict[str, float], torch.nn.Module]:
    """Losses of two optimiser steps on random images with a recipe's method on a small backbone."""
    config = recipe(name)
    torch.manual_seed(0)
    backbone = backbones.build(
        backbones.arguments_of(config.backbone.model_copy(update=smaller), (64, 32)), config.backbone.drop_path
    )
    method = build(config.method, Parts(backbone, 4, 0, config.sampling, 0))
    optimizer = build_optimizer(method, config.optim)
    images, labels = torch.randn(8, 3, 64, 32), torch.arange(4).repeat_interleave(2)
    batch = ImageBatch(images, labels, torch.rand(8, method.draws), torch.full((8,), -2))
    for epoch in (0, 60):
        set_rate(optimizer, epoch, config.optim)
        losses = method(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        method.end_step()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    return {key: value.item() for key, value in losses.items()}, method.eval()


@pytest.mark.parametrize(
    ("name", "smaller", "dim", "losses"),
    [
        ("bot_market1501", {"embed_dim": 32, "depth": 2, "num_heads": 2}, 32, {"id", "triplet"}),
        ("bot_market1501_pass_vits", {"embed_dim": 32, "depth": 2, "num_heads": 2}, 64, {"id", "triplet"}),
        ("bot_msmt17_vits_ics", {"embed_dim": 32, "depth": 2, "num_heads": 2}, 32, {"id", "triplet"}),
        ("bot_market1501_r50", {"name": "resnet18"}, 512, {"id", "triplet"}),
        ("bot_market1501_r50_centre", {"name": "resnet18"}, 512, {"id", "triplet", "centre"}),
    ],
)
def test_two_steps_with_a_recipe(name, smaller, dim, losses):
    found, method = step(name, **smaller)
    assert found.keys() == losses
    assert all(torch.tensor(list(found.values())).isfinite())
    with torch.no_grad():
        assert method.embed(torch.randn(2, 3, 64, 32)).shape == (2, dim)


def test_recipes_keep_to_the_line_length():
    for name in PUBLISHED:
        assert max(map(len, ALL[name].read_text().splitlines())) <= 120, name
