"""Files of other projects: every key is taken or left out for a reason, everything else is refused, nothing runs."""

import argparse
import pickle

import pytest
import strangers
import torch
from strangers import DIM, SQUARE, TALL, backbone, put, training, written

from pretrain import architecture, checkpoint, foreign
from pretrain.backbone import create_vit
from recipes.errors import UserError

ALL = strangers.strangers()


def state_of(content: dict) -> dict:
    """The innermost dictionary of weights."""
    for key in ("model", "state_dict", "module", "teacher", "target_encoder"):
        content = content[key] if isinstance(content.get(key), dict) else content
    return content


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.row("R23")
def test_every_key_is_taken_or_left_out_for_a_reason(kind, tmp_path):
    stranger = ALL[kind]
    found = foreign.read(written(tmp_path, stranger.content))
    assert found.tensors.keys() == stranger.backbone.keys() == found.report.taken.keys()
    for name, tensor in stranger.backbone.items():
        assert torch.equal(found.tensors[name], tensor), name
    assert set(found.report.left_out) == stranger.left_out
    assert all(found.report.left_out.values())
    assert stranger.style in found.report.style
    assert stranger.style in str(found.report)
    vit = create_vit(found.arguments)
    vit.load_state_dict(found.tensors, strict=True)
    assert vit.blocks[0].attn.num_heads == DIM // 64


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.row("R23")
def test_a_missing_a_strange_and_a_reshaped_key_are_refused(kind, tmp_path):
    content = state = None
    for fault in ("missing", "strange", "reshaped"):
        content = pickle.loads(pickle.dumps(ALL[kind].content))
        state = state_of(content)
        victim = next(key for key in state if key.endswith("attn.proj.bias"))
        if fault == "missing":
            del state[victim]
            told = r"1 missing \(blocks\.0\.attn\.proj\.bias\)"
        elif fault == "strange":
            # "head" and "dist" inside a name are no reason to drop it
            state[victim.replace("attn.proj.bias", "attn.head_distance")] = torch.zeros(2)
            told = r"1 not expected \(blocks\.0\.attn\.head_distance\)"
        else:
            state[victim] = torch.zeros(DIM + 1)
            told = rf"1 of another shape \(blocks\.0\.attn\.proj\.bias \({DIM + 1},\) for \({DIM},\)\)"
        with pytest.raises(UserError, match=f"is not exactly one plain ViT: by timm's names, {told}"):
            foreign.read(written(tmp_path, content))


@pytest.mark.row("R23")
def test_what_lies_outside_of_the_backbone_must_be_known(tmp_path):
    content = training().content
    content["teacher"] |= {f"decoder.{n}": torch.zeros(1) for n in range(7)}
    with pytest.raises(UserError) as caught:
        foreign.read(written(tmp_path, content))
    assert "7 keys (decoder.0, decoder.1, decoder.2, decoder.3, decoder.4, ...) are unknown to this style" in str(
        caught.value
    )
    # the local branch of TransReID is what its features come from; base alone would be another model
    jigsaw = put("base.", backbone(TALL)) | {"b1.0.norm1.weight": torch.zeros(DIM)}
    with pytest.raises(UserError, match=r"fine-tuned .*1 key \(b1\.0\.norm1\.weight\) is unknown to this style"):
        foreign.read(written(tmp_path, jigsaw))
    with pytest.raises(UserError, match=r"1 not expected \(sie_embed\)"):
        foreign.read(written(tmp_path, put("base.", backbone(TALL) | {"sie_embed": torch.zeros(6, 1, DIM)})))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_other_networks_are_refused(tmp_path):
    swin = {"patch_embed.proj.weight": torch.zeros(96, 3, 4, 4), "layers.0.blocks.0.norm1.weight": torch.zeros(96)}
    with pytest.raises(
        UserError, match=r"holds no Vision Transformer .* lacks cls_token, pos_embed, norm\.weight; it holds"
    ):
        foreign.read(written(tmp_path, swin))
    for content, told in (
        ({"student": backbone()}, r"holds student \(a student without its teacher"),
        ({"epoch": 3}, "holds epoch"),
        ([1, 2], "holds list"),
        ({**backbone(), "note": "text"}, "note is a str, not a tensor"),
        ({**backbone(), 3: torch.zeros(1)}, "the key 3 is no name"),
        ({**backbone(), "norm.bias": torch.zeros(1).expand(10**12)}, "norm.bias of shape .* is no plain tensor"),
        ({**backbone(), "norm.bias": torch.zeros(64).to_sparse()}, "norm.bias of shape .* is no plain tensor"),
        ({**backbone(), "blocks.7.0.norm1.bias": torch.zeros(DIM)}, "are both blocks.0.norm1.bias in timm"),
        ({key: value for key, value in strangers.pass_backbone()[0].items() if key != "cls_pos"}, "no fitting cls_pos"),
    ):
        with pytest.raises(UserError, match=told):
            foreign.read(written(tmp_path, content))


def test_numbers_become_float32_and_counters_stay(tmp_path):
    half = {name: tensor.half() for name, tensor in backbone().items()}
    found = foreign.read(written(tmp_path, half))
    assert all(torch.equal(found.tensors[name], tensor.float()) for name, tensor in half.items())
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    ics = foreign.read(written(tmp_path, ALL["TransReID-SSL ICS"].content))
    assert ics.tensors["patch_embed.conv.7.num_batches_tracked"].dtype == torch.int64
    assert (ics.arguments["stem"], ics.arguments["patch_size"]) == ("ics", 16)


def test_the_teacher_is_taken_with_its_head_centres_and_the_students_mask(tmp_path):
    content = training(TALL).content
    found = foreign.read(written(tmp_path, content))
    assert torch.equal(found.head["last_layer2.weight_v"], content["teacher"]["head.last_layer2.weight_v"])
    assert found.head.keys() == strangers.head(twice=True).keys()
    assert torch.equal(found.centres["cls"], content["ibot_loss"]["center"][0])
    assert torch.equal(found.centres["patches"], content["ibot_loss"]["center2"][0, 0])
    assert torch.equal(found.mask, content["student"]["module.backbone.masked_embed"])
    assert found.settings["lambda2"] == 0.5
    assert found.arguments["img_size"] == [256, 128]
    assert found.normalize["mean"] == [0.485, 0.456, 0.406]
    assert "221 epochs done, by the count in the file" in str(found.report)
    assert "not read: fp16_scaler, optimizer" in str(found.report)
    newer = {key.replace("weight_g", "parametrizations.weight.original0"): v for key, v in content["teacher"].items()}
    newer = {key.replace("weight_v", "parametrizations.weight.original1"): v for key, v in newer.items()}
    again = foreign.read(written(tmp_path, {"teacher": newer}))
    assert again.head.keys() == found.head.keys()
    assert (again.centres, again.mask, again.settings) == ({}, None, {})


def test_the_grid_of_the_positions(tmp_path):
    long = backbone((24, 8))
    path = written(tmp_path, long)
    with pytest.raises(UserError, match=r"192 patches, which may be no square and not 2:1; .*--grid ROWS COLUMNS"):
        foreign.read(path)
    assert foreign.read(path, (24, 8)).arguments["img_size"] == [384, 128]
    assert foreign.read(path, likely=(24, 8)).arguments["img_size"] == [384, 128]
    with pytest.raises(UserError, match=r"192 patches, not for a grid of 16 x 8"):
        foreign.read(path, (16, 8))
    # 144 patches are 12 x 12, unless the recipe's 18 x 8 was meant
    path = written(tmp_path, backbone((12, 12)))
    assert foreign.read(path, likely=(16, 8)).arguments["img_size"] == [192, 192]
    with pytest.raises(UserError, match="may be 12 x 12 and 18 x 8; tell the grid"):
        foreign.read(path, likely=(18, 8))
    # TransReID-SSL stores what its images measure
    told = training((18, 8), ibot=False, args=argparse.Namespace(height=288, width=128, patch_size=16))
    assert foreign.read(written(tmp_path, told.content)).arguments["img_size"] == [288, 128]


def test_the_heads_of_an_unusual_width(tmp_path):
    path = written(tmp_path, backbone(dim=96))
    with pytest.raises(UserError, match=r"into how many heads its 96 channels are cut; .*--heads N"):
        foreign.read(path)
    assert foreign.read(path, heads=3).arguments["num_heads"] == 3
    for dim, depth, name, heads in ((384, 12, "vit_small_patch16_224", 6), (768, 12, "vit_base_patch16_224", 12)):
        arguments = {"model_name": name, "num_classes": 0, "img_size": [256, 128], "patch_size": 16}
        model = architecture.empty_vit(arguments)
        found = architecture.timm_arguments_of(model.state_dict(), TALL, "x")
        assert found == arguments | {"dynamic_img_size": True}
        assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (dim, depth, heads)


@torch.no_grad()
def test_a_file_is_a_backbone_of_the_recipe(tmp_path):
    path = written(tmp_path, ALL["iBOT"].content)
    wanted = {"model_name": "vit_tiny_patch16_224", "num_classes": 0, "img_size": [256, 128], "patch_size": 16}
    wanted |= {"dynamic_img_size": True, "embed_dim": DIM, "depth": 2, "num_heads": 1}
    found, config = checkpoint.load_backbone(path, wanted)
    old = ALL["iBOT"].backbone["pos_embed"]
    assert torch.equal(found.vit.pos_embed, checkpoint.resize_positions(old, SQUARE, TALL, 1))
    assert config["source"].endswith("pos_embed from 14 x 14 to 16 x 8 patches, bilinear")
    assert config["normalize"]["std"] == [0.229, 0.224, 0.225]
    cubic, _ = checkpoint.load_backbone(path, wanted, kernel="bicubic")
    assert torch.equal(cubic.vit.pos_embed, checkpoint.resize_positions(old, SQUARE, TALL, 1, "bicubic"))
    for key, value, told in (
        ("num_heads", 4, "num_heads is 1, the recipe asks for 4"),
        ("depth", 3, "depth is 2, the recipe asks for 3"),
        ("reg_tokens", 2, "registers is 0, the recipe asks for 2"),
        ("stem", "ics", "stem is patch, the recipe asks for ics"),
        ("init_values", 1e-5, "layer scale is False, the recipe asks for True"),
    ):
        with pytest.raises(UserError, match=f"does not fit the recipe's backbone section: {told}"):
            checkpoint.load_backbone(path, {**wanted, key: value})


def test_bicubic_positions_are_those_of_dino():
    positions = torch.randn(1, 1 + 196, 5, generator=torch.Generator().manual_seed(0))
    found = checkpoint.resize_positions(positions, SQUARE, TALL, 1, "bicubic")
    square = positions[:, 1:].reshape(1, 14, 14, 5).permute(0, 3, 1, 2)
    scale = ((16 + 0.1) / 14, (8 + 0.1) / 14)
    expected = torch.nn.functional.interpolate(square, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1)
    assert torch.equal(found, torch.cat([positions[:, :1], expected.reshape(1, 128, 5)], dim=1))
    plain = torch.nn.functional.interpolate(square, size=TALL, mode="bicubic").permute(0, 2, 3, 1).reshape(1, 128, 5)
    assert not torch.allclose(found[:, 1:], plain, atol=1e-3)  # the 0.1 is not without effect


def test_what_is_ours_is_not_foreign(make_backbone, tmp_path):
    checkpoint.save_teacher(tmp_path / "teacher", make_backbone(), {})
    assert not foreign.is_foreign(tmp_path / "teacher")
    assert not foreign.is_foreign(tmp_path / "teacher" / "model.safetensors")
    (tmp_path / "teacher" / "config.json").write_text("{ cut")
    assert not foreign.is_foreign(tmp_path / "teacher" / "model.safetensors")  # or a damaged config would go unnoticed
    assert not foreign.is_foreign("runs/nothing")
    assert foreign.is_foreign("timm:vit_small_patch16_224.dino")
    with pytest.raises(UserError, match="is no checkpoint"):
        checkpoint.load_model(tmp_path / "missing.pth")
