"""The recipes of Cluster Contrast: no labels, the published settings, and networks that train with them."""

import pytest
import timm
import torch

from finetune import backbones, models
from finetune.config import FinetuneConfig
from finetune.ibn_resnet import InstanceBatchNorm
from finetune.methods import build
from finetune.methods.base import ImageBatch, Parts
from finetune.optim import build_optimizer
from recipes.load import load, recipe_path

RECIPES = {path.stem: path for path in sorted(recipe_path("finetune").glob("cluster_contrast_*.yaml"))}
PUBLISHED = {
    # eps, update, momentum, P, Z, iterations, optimiser
    "cluster_contrast_market1501": (0.6, "hard", 0.2, 32, 8, 200, "sgd"),
    "cluster_contrast_msmt17": (0.7, "hard", 0.2, 32, 8, 400, "sgd"),
    "cluster_contrast_msmt17_to_market1501": (0.6, "hard", 0.2, 32, 8, 200, "sgd"),
    "cluster_contrast_folder": (0.6, "hard", 0.2, 32, 8, 200, "sgd"),
    "cluster_contrast_cuhk03_np": (0.6, "hard", 0.2, 32, 8, 100, "sgd"),
    "cluster_contrast_market1501_r50": (0.6, "momentum", 0.1, 16, 16, 200, "adam"),
    "cluster_contrast_market1501_r50ibn": (0.4, "hard", 0.1, 16, 16, 400, "adam"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_without_labels_and_have_the_published_settings(name):
    config = load(FinetuneConfig, RECIPES[name])
    assert config.identities.labels == "none"
    assert config.validation.identities == 0
    section = build_config(config)
    assert section.cluster_memory.temperature == 0.05
    assert section.clusters.min_samples == 4
    assert section.cluster_sampling.cameras == ("any" if name == "cluster_contrast_folder" else "other")
    if name not in PUBLISHED:
        assert name.endswith(("_cpu", "_figures"))
        return
    found = (section.clusters.eps, section.cluster_memory.update, section.cluster_memory.momentum)
    found += (config.sampling.identities_per_batch, config.sampling.images_per_identity)
    found += (section.cluster_sampling.iterations, config.optim.kind)
    assert found == PUBLISHED[name]
    assert (config.optim.lr, config.optim.weight_decay, config.optim.epochs) == (3.5e-4, 5e-4, 50)
    assert (config.optim.schedule, config.optim.steps, config.optim.warmup_epochs) == ("steps", (20, 40), 0)
    cnn = config.optim.kind == "adam"
    assert config.backbone.drop_path == (0 if cnn else 0.3)
    assert section.norm_images == (64 if cnn else None)
    assert config.augment.mean[0] == (0.485 if cnn else 0.5)


def build_config(config: FinetuneConfig):
    """The method's section, validated as `build` does it."""
    backbone = config.backbone.model_copy(update={"name": "resnet10t", "last_stride": 1, "drop_path": 0.0})
    backbone = backbone.model_copy(update=dict.fromkeys(("embed_dim", "depth", "num_heads")))
    made = backbones.build(backbones.arguments_of(backbone, (64, 32)))
    return build(config.method, Parts(made, 0, 1, config.sampling, 0)).config


@pytest.mark.parametrize("name", ["cluster_contrast_market1501", "cluster_contrast_market1501_r50ibn"])
def test_two_steps_with_a_recipe(name):
    config = load(FinetuneConfig, RECIPES[name])
    smaller = {"embed_dim": 32, "depth": 2, "num_heads": 2} if name == "cluster_contrast_market1501" else {}
    backbone, _ = models.start_backbone("none", config.backbone.model_copy(update=smaller), (64, 32), 0)
    section = config.method | ({"norm_images": 2} if config.method.get("norm_images") else {})
    model = build(section, Parts(backbone, 0, 1, config.sampling, 0))
    optimizer, labels = build_optimizer(model, config.optim), torch.arange(2).repeat_interleave(2)
    model.memory.begin(0, labels.numpy(), torch.eye(2, model.pooling.dim))
    losses = []
    for _ in range(2):
        batch = ImageBatch(torch.randn(4, 3, 64, 32), labels, torch.rand(4, model.draws), labels)
        losses.append(model.train()(batch)["nce"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        model.end_step()
    assert all(loss.isfinite() for loss in losses)
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    found = model.eval().embed(torch.randn(2, 3, 64, 32))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_half_of_the_channels_forget_contrast_and_colour():
    layer = InstanceBatchNorm(4).train()
    maps = torch.randn(3, 4, 6, 5)
    other = (
        maps * torch.tensor([3.0, 1.0, 0.5])[:, None, None, None] + torch.tensor([1.0, 0.0, -2.0])[:, None, None, None]
    )
    ours, theirs = layer(maps), layer(other)
    torch.testing.assert_close(ours[:, :2], theirs[:, :2], atol=1e-3, rtol=1e-3)
    assert (ours[:, 2:] - theirs[:, 2:]).abs().mean() > 0.1
    torch.testing.assert_close(ours[:, 2:].mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)


def test_ibn_stands_in_three_stages_under_the_names_of_its_authors():
    model = timm.create_model("resnet50_ibn_a", num_classes=0)
    found = [name for name, part in model.named_modules() if isinstance(part, InstanceBatchNorm)]
    assert found == [
        f"layer{stage}.{block}.bn1" for stage, blocks in ((1, 3), (2, 4), (3, 6)) for block in range(blocks)
    ]
    names, plain = model.state_dict(), timm.create_model("resnet50", num_classes=0).state_dict()
    assert {"layer1.0.bn1.IN.weight", "layer1.0.bn1.BN.running_var"} <= names.keys()
    assert names["layer3.5.bn1.IN.bias"].shape == (128,)
    assert names.keys() - plain.keys() == {name for name in names if ".bn1.IN." in name or ".bn1.BN." in name}
    with pytest.raises(RuntimeError, match="give a file of weights to --ckpt"):
        timm.create_model("resnet50_ibn_a", pretrained=True)
