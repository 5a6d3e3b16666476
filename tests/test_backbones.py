"""Any model of timm as the backbone of a fine-tune: features, BoT's last stride, errors."""

import pytest
import timm
import torch

from finetune import backbones, models
from finetune.backbones import BackboneConfig, TimmBackbone
from finetune.methods.base import Direct
from pretrain.backbone import Backbone
from recipes.errors import UserError

SIZE = (64, 32)


def built(name: str, **more) -> Backbone | TimmBackbone:
    """Random weights, no stochastic depth."""
    torch.manual_seed(0)
    return backbones.build(backbones.arguments_of(BackboneConfig(name=name, **more), SIZE)).eval()


@pytest.mark.parametrize(
    ("name", "dim", "grid"),
    [
        ("resnet18", 512, (8, 4)),
        ("convnext_atto", 320, (8, 4)),
        ("swin_tiny_patch4_window7_224", 768, (2, 1)),
        ("vit_tiny_patch16_224", 192, (4, 2)),
    ],
)
def test_every_family_gives_a_feature_and_places(name, dim, grid):
    backbone = built(name)
    found = backbone(torch.randn(2, 3, *SIZE))
    assert backbone.dim == dim
    assert backbone.grid == grid
    assert found.cls.shape == (2, dim)
    assert found.patches.shape[::2] == (2, dim)
    features = Direct(backbone).embed(torch.randn(3, 3, *SIZE))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_the_feature_is_timms_own():
    backbone = built("resnet18")
    plain = timm.create_model("resnet18", num_classes=0).eval()
    plain.load_state_dict(backbone.model.state_dict())
    images = torch.randn(2, 3, *SIZE)
    torch.testing.assert_close(backbone(images).cls, plain(images))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet10t"])
def test_bots_last_stride_keeps_the_weights_and_doubles_the_map(name):
    usual, bot = built(name), built(name, last_stride=1)
    images = torch.randn(1, 3, 128, 64)
    assert usual(images).patches.shape[1] == 4 * 2
    assert bot(images).patches.shape[1] == 8 * 4
    assert bot.model.state_dict().keys() == usual.model.state_dict().keys()
    dilated = [layer for layer in bot.model.modules() if getattr(layer, "dilation", (1, 1)) not in (1, (1, 1))]
    assert not dilated, "timm's output_stride would dilate, which BoT does not"


def test_the_probe_does_not_touch_running_statistics():
    torch.manual_seed(0)
    backbone = TimmBackbone({"model_name": "resnet18", "num_classes": 0})
    assert backbone.training
    assert torch.equal(backbone.model.bn1.running_mean, torch.zeros(64))
    assert torch.equal(backbone.model.layer4[1].bn2.running_var, torch.ones(512))


def test_stochastic_depth_follows_torchs_seed():
    backbone = backbones.build(backbones.arguments_of(BackboneConfig(name="convnext_atto"), SIZE), drop_path=0.5)
    images = torch.randn(8, 3, *SIZE)
    torch.manual_seed(1)
    first = backbone(images).cls
    torch.manual_seed(1)
    assert torch.equal(backbone(images).cls, first)
    assert not torch.equal(backbone(images).cls, first)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"name": "resnet18", "depth": 3}, "backbone.depth is for Vision Transformers"),
        ({"name": "resnet18", "stem": "ics"}, "backbone.stem is for Vision Transformers"),
        ({"name": "vit_tiny_patch16_224", "last_stride": 1}, "backbone.last_stride is for ResNets"),
        ({"name": "convnext_atto", "last_stride": 1}, "backbone.last_stride is for ResNets"),
        ({"name": "resnet1000"}, "is no timm model"),
    ],
)
def test_keys_that_do_not_fit_are_named(given, told):
    with pytest.raises(UserError, match=told):
        built(**given)


def test_a_model_without_stochastic_depth_is_told():
    with pytest.raises(UserError, match="drop_path=0"):
        backbones.build({"model_name": "vgg11", "num_classes": 0}, drop_path=0.1)


@pytest.fixture
def pretrained(monkeypatch):
    """timm's pretrained weights of one model, as if they had been fetched; of any other there is no connection."""
    made = timm.create_model("resnet10t", num_classes=0)
    create = timm.create_model

    def fetched(name, pretrained=False, **given):
        if pretrained and name == "resnet10t.c3_in1k":
            return made
        if pretrained:
            raise OSError("no connection")
        return create(name, pretrained=False, **given)

    monkeypatch.setattr(timm, "create_model", fetched)
    return made


def test_pretrained_weights_of_timm(pretrained):
    start, stored = models.start_backbone(
        "timm:resnet10t.c3_in1k", BackboneConfig(name="resnet10t", last_stride=1, drop_path=0.0), SIZE, 0
    )
    assert stored["normalize"]["mean"] == list(pretrained.pretrained_cfg["mean"])
    theirs = pretrained.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in start.model.state_dict().items())
    model, augment = models.load_stored("timm:resnet10t.c3_in1k")
    assert (augment.height, augment.width, augment.mean) == (256, 128, pretrained.pretrained_cfg["mean"])
    images = torch.randn(2, 3, *SIZE)
    expected = torch.nn.functional.normalize(pretrained.eval()(images), dim=1)
    torch.testing.assert_close(model.eval().embed(images), expected)


def test_weights_that_cannot_be_had_or_do_not_fit(pretrained):
    with pytest.raises(UserError, match=r"timm:resnet18.a1_in1k: timm cannot give these weights \(no connection\)"):
        models.load_stored("timm:resnet18.a1_in1k")
    with pytest.raises(UserError, match=r"does not fit backbone\.name = 'resnet18'"):
        models.start_backbone("timm:resnet10t.c3_in1k", BackboneConfig(name="resnet18", drop_path=0.0), SIZE, 0)
