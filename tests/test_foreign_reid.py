"""Models fine-tuned elsewhere: every key is accounted for, and the features are those of the published networks."""

import pickle

import published
import pytest
import strangers_reid
import torch
import torch.nn.functional as F
from strangers import DEPTH, DIM, TALL, backbone, put, written
from strangers_reid import CLASSES, SWIN, norm, resnet

from finetune import models
from finetune.augment import AugmentConfig
from finetune.backbones import BackboneConfig
from finetune.foreign import reid as foreign_reid
from finetune.foreign import swin as foreign_swin
from finetune.foreign.draft import Choices
from pretrain.checkpoint import load_backbone
from recipes.errors import UserError

ALL = strangers_reid.strangers()
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def state_of(content: dict) -> dict:
    """The weights, without wrappers."""
    for key in ("model", "state_dict"):
        content = content[key] if isinstance(content.get(key), dict) else content
    return content


def bare(content: dict) -> dict:
    """The weights by the keys of their project."""
    return {key.removeprefix("module."): value for key, value in state_of(content).items()}


def images(height: int, width: int) -> torch.Tensor:
    """Two, with fine and coarse patterns."""
    rng = torch.Generator().manual_seed(1)
    coarse = F.interpolate(torch.randn(2, 3, 6, 3, generator=rng), size=(height, width), mode="bilinear")
    return torch.randn(2, 3, height, width, generator=rng) + 3 * coarse


def expected(kind: str, w: dict[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """The published feature before it is normalised; of two images."""
    view = images(*size)
    if kind.startswith("PASS"):
        return published.pass_vit(w, view, DEPTH, 1)
    if kind == "TransReID":
        return published.transreid(w, view, [4, 0], DEPTH, 1)
    if kind == "PersonViT":
        return published.personvit(w, view, DEPTH, 1)
    if kind == "SOLIDER":
        own = {key.removeprefix("base."): value for key, value in w.items()}
        return published.solider(own, view, SWIN["num_heads"], SWIN["depths"], 0.2)
    prefix, stride = {"torchreid": ("", 2), "strong baseline": ("base.", 1)}.get(kind, ("backbone.", 1))
    found = published.resnet18(w, prefix, view, stride, kind != "strong baseline", kind.startswith("fast-reid"))
    if kind == "fast-reid IBN GeM":
        pooled = found.clamp(min=1e-6).pow(2.5).mean(dim=(2, 3)).pow(1 / 2.5)
    else:
        pooled = found.mean(dim=(2, 3))
    necks = {"fast-reid": "heads.bottleneck.0", "fast-reid IBN GeM": "heads.bnneck", "strong baseline": "bottleneck"}
    return published.batch_norm(w, necks[kind], pooled) if kind in necks else pooled


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.row("R23")
def test_every_key_is_taken_or_left_out_for_a_reason(kind, tmp_path):
    stranger = ALL[kind]
    path = written(tmp_path, stranger.content)
    found = foreign_reid.read(path)
    assert set(found.report.left_out) == stranger.left_out
    assert all(found.report.left_out.values())
    assert found.report.style == stranger.style
    assert found.report.taken.keys() == found.tensors.keys()
    made = {name for name, told in found.report.taken.items() if told.startswith("no key")}
    assert made == stranger.made
    keys = {key for told in found.report.taken.values() for part in told.split(" and ") for key in [part]}
    assert (keys - {"no key: made, as the project has none"}) | stranger.left_out == bare(stranger.content).keys()
    assert f"{len(found.tensors)} tensors of the model" in str(found.report)
    assert found.config["classes"] == CLASSES
    assert str(tmp_path) not in found.config["source"]


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "TransReID-SSL ICS"])
@torch.no_grad()
def test_features_are_those_of_the_published_network(kind, tmp_path):
    path = written(tmp_path, ALL[kind].content)
    model, augment = models.load_stored(path)
    model.eval()
    assert (augment.height, augment.width) == ((384, 128) if kind == "SOLIDER" else (256, 128))
    size = (96, 64) if kind in ("fast-reid", "fast-reid IBN GeM", "torchreid", "strong baseline") else (256, 128)
    size = (384, 128) if kind == "SOLIDER" else size
    if kind == "fast-reid IBN GeM":  # its file tells, of pixels in 0..255
        assert augment.mean == pytest.approx((120 / 255, 110 / 255, 100 / 255), abs=1e-6)
        assert augment.std == pytest.approx((0.2, 0.2, 0.1), abs=1e-6)
    else:
        convolutional = kind in ("fast-reid", "torchreid", "strong baseline")
        assert (augment.mean, augment.std) == (IMAGENET if convolutional else HALVES)
    wanted = F.normalize(expected(kind, bare(ALL[kind].content), size), dim=1)
    given = model.embed(images(*size), torch.tensor([4, 0]))
    assert torch.allclose(given, wanted, atol=2e-5)
    # the two images are not alike, or the lines above would show nothing
    assert (wanted[0] - wanted[1]).abs().max() > 2e-4
    # as with --ckpt of a recipe whose sizes are others
    again, own = models.load_embedder(path, BackboneConfig(), AugmentConfig(height=32, width=32), 0)
    assert own == augment
    assert models.fingerprint(again) == models.fingerprint(model)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.row("R23")
def test_a_missing_a_strange_and_a_reshaped_key_are_refused(kind, tmp_path):
    for fault, told in (
        ("missing", "1 missing \\(neck.classifier.weight\\)|has no classifier|1 missing"),
        ("strange", "1 not expected|is unknown to this style"),
        ("reshaped", "1 of another shape"),
    ):
        content = pickle.loads(pickle.dumps(ALL[kind].content))
        state = state_of(content)
        ends = ("blocks.0.norm1.bias", "stages.2.blocks.3.norm1.bias", "b2.0.norm1.bias", "layer2.0.bn2.bias")
        victim = next(key for key in reversed(state) if key.endswith(ends))
        if fault == "missing":
            del state[victim]
        elif fault == "strange":
            state[victim.replace("bias", "colour")] = torch.zeros(2)
        else:
            state[victim] = torch.zeros(3)
        with pytest.raises(UserError, match=told):
            models.load_stored(written(tmp_path, content, f"{fault}.pth"))


def test_what_lies_outside_is_refused(tmp_path):
    for kind, extra, told in (
        ("PersonViT", {"decoder.weight": torch.zeros(1)}, r"1 key \(decoder.weight\) is unknown to this style"),
        ("fast-reid", {"heads.attention.weight": torch.zeros(1)}, "heads.attention.weight"),
        ("fast-reid", {"backbone.NL_2.0.g.weight": torch.zeros(1)}, "non-local blocks"),
        ("fast-reid", {"backbone.layer1.0.se.fc.0.weight": torch.zeros(1)}, "squeeze-and-excitation"),
        ("fast-reid", {"heads.bottleneck.0.weight": torch.zeros(64, 512, 1, 1)}, "shortens the feature"),
        ("torchreid", {"module.fc.0.weight": torch.zeros(64, 512)}, "shortens the feature"),
        ("PASS", {"base.sie_embed": torch.zeros(6, 1, DIM)}, "beside TransReID's cameras or branches"),
        ("PASS", {"classifier.weight": torch.zeros(CLASSES, DIM)}, "adds CLS and the part tokens of PASS up"),
        ("PersonViT", {"base.pos_embed": torch.zeros(1, 211, DIM)}, r"overlap \(stride 12\)"),
        ("SOLIDER", {"base.stages.0.blocks.0.attn.w_msa.relative_position_index": torch.zeros(49, 49)}, "usual order"),
    ):
        content = dict(state_of(ALL[kind].content)) | extra
        with pytest.raises(UserError, match=told):
            foreign_reid.read(written(tmp_path, content))
    lacking = dict(ALL["PersonViT"].content)
    del lacking["classifier.weight"]
    with pytest.raises(UserError, match="has no classifier"):
        foreign_reid.read(written(tmp_path, lacking))
    deeper = state_of(ALL["torchreid"].content) | {"module.layer3.2.conv1.weight": torch.zeros(256, 256, 3, 3)}
    with pytest.raises(UserError, match=r"stages have \(2, 2, 3, 2\) blocks"):
        foreign_reid.read(written(tmp_path, deeper))


def test_other_files_are_left_to_others(tmp_path):
    assert foreign_reid.read(written(tmp_path, backbone())) is None
    assert foreign_reid.read(written(tmp_path, resnet() | {"fc.weight": torch.zeros(2, 512)})) is None
    assert foreign_reid.read(written(tmp_path, {"epoch": 3})) is None
    assert foreign_reid.read(tmp_path) is None
    assert foreign_reid.read("timm:resnet50") is None


def test_what_no_file_tells_can_be_chosen(tmp_path):
    path = written(tmp_path, ALL["fast-reid"].content)
    choices = Choices((384, 128), "before", "gem", 2, None, {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]})
    found = foreign_reid.read(path, choices)
    assert found.config["method"]["necks"] == {"feature": "before", "pooling": "gem"}
    assert found.config["timm"] == {
        **{"model_name": "reid_resnet", "num_classes": 0, "depth": 18, "stem_padding": 0, "last_stride": 2}
    }
    assert found.tensors["pooling.p"] == 3  # a fixed power is in no file
    assert (found.config["augment"]["height"], found.config["augment"]["mean"]) == (384, [0.1, 0.2, 0.3])
    tall = put("base.", backbone((24, 8))) | norm("bottleneck.", DIM) | {"classifier.weight": torch.zeros(3, DIM)}
    assert foreign_reid.read(written(tmp_path, tall)).config["timm"]["img_size"] == [384, 128]
    square = put("base.", backbone((18, 8))) | norm("bottleneck.", DIM) | {"classifier.weight": torch.zeros(3, DIM)}
    found = foreign_reid.read(written(tmp_path, square), Choices(size=(288, 128)))
    assert found.config["timm"]["img_size"] == [288, 128]
    swin = written(tmp_path, ALL["SOLIDER"].content)
    one, other = (foreign_reid.read(swin, Choices(semantic_weight=w)).tensors for w in (0.2, 1.0))
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {f"backbone.model.layers.{n}.{what}" for n in (1, 2, 3) for what in ("scale", "shift")}


@torch.no_grad()
def test_a_swin_transformer_without_semantic_weights(tmp_path):
    plain = strangers_reid.solider(semantic=False)
    content = put("base.", plain) | norm("bottleneck.", 64) | {"classifier.weight": torch.zeros(3, 64)}
    model, _ = models.load_stored(written(tmp_path, content))
    view = images(384, 128)
    wanted = F.normalize(published.solider(plain, view, SWIN["num_heads"], SWIN["depths"], 0.2), dim=1)
    assert torch.allclose(model.eval().embed(view), wanted, atol=2e-5)


def test_merging_order_by_hand():
    # two channels; torch's unfold: channel, row, column; timm: column, row, channel
    theirs = torch.tensor([0.0, 1, 2, 3, 10, 11, 12, 13])  # channel 0: (row, column) 00 01 10 11, then channel 1
    assert foreign_swin.merging_order(theirs).tolist() == [0, 10, 2, 12, 1, 11, 3, 13]


def test_a_training_starts_from_their_backbone(tmp_path):
    path = written(tmp_path, ALL["PersonViT"].content)
    config = BackboneConfig(name="vit_tiny_patch16_224", embed_dim=DIM, depth=DEPTH, num_heads=1)
    found, _ = models.start_backbone(path, config, (256, 128), 0)
    assert torch.equal(found.vit.norm.bias, ALL["PersonViT"].content["base.norm.bias"])
    # of PASS with its part tokens, which a recipe without them does not take
    path = written(tmp_path, ALL["PASS"].content)
    with pytest.raises(UserError, match="registers is 3, the recipe asks for 0"):
        models.start_backbone(path, config, (256, 128), 0)
    found, _ = models.start_backbone(path, config.model_copy(update={"registers": 3}), (384, 128), 0)
    assert (found.grid, found.vit.pos_embed.shape[1]) == ((24, 8), 4 + 192)
    assert torch.equal(found.vit.pos_embed[:, :4], load_backbone(path)[0].vit.pos_embed[:, :4])
    assert load_backbone(path)[0].grid == TALL


def test_a_training_of_a_resnet_starts_from_files(tmp_path):
    config = BackboneConfig(name="resnet18", drop_path=0, last_stride=1)
    own = resnet() | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    found, facts = models.start_backbone(written(tmp_path, own), config, (256, 128), 0)
    assert torch.equal(found.model.layer4[1].conv2.weight, own["layer4.1.conv2.weight"])
    assert facts == {"source": "120 tensors of file.pth without its classifier"}
    path = written(tmp_path, ALL["torchreid"].content)
    found, facts = models.start_backbone(path, config, (256, 128), 0)
    assert torch.equal(found.model.layer4[1].conv2.weight, own["layer4.1.conv2.weight"])
    assert facts["normalize"]["mean"] == [0.485, 0.456, 0.406]
    del own["bn1.weight"]
    with pytest.raises(UserError, match=r"does not fit backbone.name = 'resnet18': 1 missing \(bn1.weight\)"):
        models.start_backbone(written(tmp_path, own), config, (256, 128), 0)
