"""Weights of timm: by name, as safetensors, as a folder of the Hub, and with registers as timm reads them."""

import pytest
import strangers
import timm
import torch
from strangers import DIM, written

from pretrain import architecture, checkpoint, foreign
from pretrain.backbone import Backbone, BackboneConfig, create_vit, timm_arguments
from recipes.errors import UserError

ALL = strangers.strangers()


@torch.no_grad()
def test_registers_give_what_timm_gives_for_the_same_file(tmp_path):
    content = ALL["DINOv2 with registers"].content
    own = Backbone(foreign.read(written(tmp_path, content)).arguments).eval()
    own.vit.load_state_dict(foreign.read(tmp_path / "file.pth").tensors)
    size = {"img_size": 224, "patch_size": 16, "embed_dim": DIM, "depth": 2, "num_heads": 1}
    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **size).eval()
    assert theirs.no_embed_class
    theirs.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(content), theirs), strict=True)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = theirs.forward_features(images)
    assert torch.allclose(own(images).cls, expected[:, 0], atol=1e-5)
    assert torch.allclose(own(images).patches, expected[:, 5:], atol=1e-5)
    # a model whose positions have no places for CLS and registers can be built from them as well, and back
    arguments = {**own.arguments, "no_embed_class": True}
    folded = checkpoint.build_backbone("x", own.vit.state_dict(), own.arguments, arguments).eval()
    assert folded.vit.pos_embed.shape[1] == 196
    assert torch.allclose(folded(images).cls, own(images).cls, atol=1e-5)
    back = checkpoint.build_backbone("x", folded.vit.state_dict(), arguments, own.arguments).eval()
    assert torch.allclose(back(images).cls, own(images).cls, atol=1e-5)


def test_safetensors_and_folders_of_the_hub(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), num_classes=3, depth=2)
    path = written(tmp_path, model.state_dict(), "some.safetensors")
    found = foreign.read(path)
    assert set(found.report.left_out) == {"head.weight", "head.bias"}
    assert found.arguments["img_size"] == [64, 32]
    assert "those of the recipe are used" in str(found.report)
    timm.models.save_for_hf(
        model, tmp_path / "hub", model_args={"img_size": [64, 32], "depth": 2}, safe_serialization=True
    )
    for name in (tmp_path / "hub", tmp_path / "hub" / "model.safetensors", f"timm:local-dir:{tmp_path / 'hub'}"):
        again = foreign.read(name)
        assert again.normalize == {"mean": [0.5] * 3, "std": [0.5] * 3}
        assert again.arguments["model_name"] == "vit_tiny_patch16_224"
        assert torch.equal(again.tensors["pos_embed"], model.pos_embed)
        backbone_, config = checkpoint.load_backbone(name)
        assert backbone_.grid == (4, 2)
        assert "normalize" in config


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"]
)
def test_the_published_sizes_of_dinov2_fit_timms_names(name):
    wanted = timm_arguments(BackboneConfig(name=name, patch_size=14), (252, 126))
    tensors = architecture.empty_vit(wanted).state_dict()
    found = architecture.timm_arguments_of(tensors, (18, 9), "x")
    assert architecture.differences(found, wanted) == []
    plain = timm_arguments(BackboneConfig(name="vit_small_patch16_224", patch_size=14), (252, 126))
    assert "layer scale is True, the recipe asks for False" in architecture.differences(found, plain)


def test_weights_of_timm_by_name(tmp_path, monkeypatch):
    create = timm.create_model

    asked = []

    def fetched(name, pretrained, **more):
        asked.append((name, pretrained))
        return create(name, pretrained=False, **more)

    monkeypatch.setattr(timm, "create_model", fetched)
    found = foreign.read("timm:vit_tiny_patch16_224.augreg_in21k")
    monkeypatch.undo()
    assert ("vit_tiny_patch16_224.augreg_in21k", True) in asked
    assert found.arguments["model_name"] == "vit_tiny_patch16_224"
    assert found.arguments["img_size"] == [224, 224]
    assert found.normalize["mean"] == [0.5, 0.5, 0.5]
    create_vit(found.arguments).load_state_dict(found.tensors, strict=True)
    # as without a connection, and with nothing fetched before
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("vit_tiny_patch16_224.no_such_weights", "no_such_model", "resnet10t"):
        with pytest.raises(UserError, match=rf"timm:{name}: timm cannot give these weights .*fetch them elsewhere"):
            foreign.read(f"timm:{name}")
