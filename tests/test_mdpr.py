"""MDPR as a whole: branches, streams, losses."""

import numpy as np
import pytest
import torch

from finetune import backbones, models
from finetune.augment import Augment, AugmentConfig
from finetune.backbones import BackboneConfig
from finetune.id_losses import batch_hard_triplet, smoothed_cross_entropy
from finetune.methods import build
from finetune.methods.base import ImageBatch, Parts
from finetune.optim import OptimConfig, build_optimizer
from finetune.sampling import SamplingConfig
from recipes.errors import UserError
from shards.sources import figures

SIZE, CLASSES = (64, 32), 3
VIT = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2}
RESNET = {"name": "resnet18_ibn_a", "last_stride": 1, "drop_path": 0.0}
HEADS = {"whole", "part_1", "part_2", "last", "mid", "seen_last", "seen_mid", "fusion"}


def method(section: dict | None = None, size: tuple[int, int] = SIZE, classes: int = CLASSES, **backbone):
    torch.manual_seed(0)
    config = BackboneConfig(**(backbone or VIT))
    made = backbones.build(backbones.arguments_of(config, size), config.drop_path)
    return build({"name": "mdpr", "dim": 16, **(section or {})}, Parts(made, classes, 0, SamplingConfig(), 0))


def batch(draws: int, size: tuple[int, int] = SIZE) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, *size, generator=generator)
    drops = torch.rand(6, draws, generator=generator)
    return ImageBatch(images, torch.tensor([0, 0, 1, 1, 2, 2]), drops, torch.zeros(6, dtype=torch.int64))


def trained(model, *names: str) -> None:
    """Backward of some losses."""
    model.zero_grad()
    losses = model(batch(model.draws))
    sum(losses[name] for name in names or losses).backward()


@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_every_stream_has_its_losses_and_every_weight_its_gradient(backbone):
    model = method(**backbone)
    assert set(model.heads) == HEADS
    losses = model(batch(model.draws))
    ids, triplets = (
        {name.removeprefix(kind) for name in losses if name.startswith(kind)} for kind in ("id_", "triplet_")
    )
    assert ids == HEADS
    assert triplets == HEADS - {"seen_last", "seen_mid"}
    assert set(losses) - {f"id_{n}" for n in ids} - {f"triplet_{n}" for n in triplets} == {
        "diversity_mid", "diversity_last", "distillation"}  # fmt: skip
    sum(losses.values()).backward()
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    features = model.eval().embed(batch(0).images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    assert dict(model.streams) == {"global": 16, "parts": 32, "last": 16, "mid": 16, "fusion": 64}
    assert features.shape == (6, 144)


@pytest.mark.parametrize("size", [(384, 192), (256, 128)], ids=["24 x 12", "16 x 8"])
def test_resnet101_has_the_published_size(size):
    """42.50 million weights in the trunk, 164 in all for the 751 people of Market-1501, 4,608 numbers an image."""
    with torch.device("meta"):
        model = method({"dim": 512}, size, 751, name="resnet101_ibn_a", last_stride=1, drop_path=0.0)
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.backbone, model)]
    assert millions == pytest.approx([42.50, 164.2], abs=0.05)
    assert dict(model.streams) == {"global": 512, "parts": 1024, "last": 512, "mid": 512, "fusion": 2048}
    assert sum(model.streams.values()) == 4608
    shared = model.branch.shared(model.backbone, torch.zeros(2, 3, *size, device="meta"), None)
    levels = model.branch(model.backbone, shared, None)
    grid = size[0] // 16, size[1] // 16
    assert (levels.mid.shape, levels.last.shape) == ((2, 1024, *grid), (2, 2048, *grid))


def test_instance_norm_is_in_the_first_three_stages():
    model = method(**RESNET).backbone.model
    halves = [type(block.bn1).__name__ for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
    assert set(halves) == {"InstanceBatchNorm"}
    assert {type(block.bn1).__name__ for block in model.layer4} == {"BatchNorm2d"}
    assert model.layer4[0].conv1.stride == (1, 1)


@pytest.mark.parametrize("backbone", [VIT, RESNET], ids=["vit", "resnet"])
def test_branches_begin_with_the_same_weights_and_go_their_own_ways(backbone):
    model = method(**backbone).eval()
    images = batch(0).images
    shared = model.branch.shared(model.backbone, images, None)
    hard, _ = model.branch.hard(model.backbone, shared, None)
    assert torch.equal(hard, model.branch(model.backbone, shared, None).last)
    torch.testing.assert_close(hard.flatten(2).transpose(1, 2), model.backbone(images).patches, rtol=1e-4, atol=1e-4)
    copies = dict(model.branch.named_parameters())
    origins = dict(model.backbone.named_parameters())
    assert all(torch.equal(value, origins[model.branch.origin(name)]) for name, value in copies.items())
    assert not {p.data_ptr() for p in copies.values()} & {p.data_ptr() for p in origins.values()}
    model.train()
    trained(model, "id_last", "id_mid")
    assert all(weight.grad is not None for weight in copies.values())
    assert sum(weight.grad.abs().sum() for weight in copies.values()) > 0
    deep = {model.branch.origin(name) for name in copies} - {"vit.norm.weight", "vit.norm.bias"}
    assert not [name for name in deep if origins[name].grad is not None and origins[name].grad.abs().sum()]


def test_blocks_are_shared_as_on_a_resnet():
    """Of 6 blocks 4 are shared and the mid level comes after 5; of 12 it is 8 and 10."""
    branch = method().branch
    assert (branch.start, branch.middle, len(branch.blocks)) == (4, 5, 2)
    with torch.device("meta"):
        twelve = method(None, SIZE, CLASSES, **VIT | {"depth": 12}).branch
    assert (twelve.start, twelve.middle) == (8, 10)
    least = method(None, SIZE, CLASSES, **VIT | {"depth": 2})
    assert (least.branch.start, least.branch.middle) == (0, 1), "all blocks are doubled"
    trained(least)
    own = method({"branches": {"branch_from": 2, "mid_block": 3}}).branch
    assert (own.start, own.middle, len(own.blocks)) == (2, 3, 4)
    assert own.origin("blocks.3.attn.qkv.weight") == "vit.blocks.3.attn.qkv.weight"
    assert own.origin("mid_norm.weight") == "vit.norm.weight"


def test_stochastic_depth_has_draws_of_its_own_in_each_branch():
    model = method(None, SIZE, CLASSES, **VIT | {"drop_path": 0.5})
    assert model.draws == 12 + 4
    given = batch(model.draws)
    first = model(given)
    given.drops[:, 12:] = 1 - given.drops[:, 12:]
    second = model(given)
    assert torch.equal(first["id_whole"], second["id_whole"])
    assert not torch.equal(first["id_last"], second["id_last"])


@pytest.mark.parametrize(("key", "without"), [
    ("distillation", {"distillation"}), ("fusion", {"id_fusion", "triplet_fusion"}),
    ("attention_maker", {"id_seen_last", "id_seen_mid", "diversity_last", "diversity_mid"}),
])  # fmt: skip
def test_parts_can_be_switched_off(key, without):
    model, whole = method({key: None}), method()
    assert set(whole(batch(whole.draws))) - set(model(batch(model.draws))) == without
    trained(model)
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert model.eval().embed(batch(0).images).shape[1] == sum(model.streams.values())


def test_losses_are_those_of_the_feature_after_the_norm():
    model = method(None, SIZE, CLASSES, **VIT | {"drop_path": 0.0})
    given = batch(model.draws)
    model.backbone.eval(), model.branch.eval()
    losses = model(given)
    for norm in (m for m in model.modules() if isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d))):
        norm.reset_running_stats()
    shared = model.branch.shared(model.backbone, given.images, None)
    compared = model.heads["whole"].feature(model._hard(shared, None)["whole"])
    triplet = batch_hard_triplet(compared, given.labels, 0.05)
    assert losses["triplet_whole"].item() == pytest.approx(triplet.item(), rel=1e-5)
    logits = model.heads["whole"].classifier(compared, given.labels)
    entropy = smoothed_cross_entropy(logits, given.labels, 0.1, "others")
    assert losses["id_whole"].item() == pytest.approx(entropy.item(), rel=1e-5)


def test_streams_can_be_chosen():
    model, images = method().eval(), batch(0).images
    lengths, features = dict(model.streams), model.embed(images)
    start = 0
    for stream, length in lengths.items():
        model.search_by([stream])
        part = features[:, start : start + length]
        torch.testing.assert_close(model.embed(images), part / part.norm(dim=1, keepdim=True))
        start += length
    model.search_by(["fusion", "global"])
    assert model.embed(images).shape == (6, 80)
    assert model.told_streams == "; feature: 64 fusion + 16 global"
    for wrong in (["fusion", "fusion"], [], ["cls"]):
        with pytest.raises(UserError, match="global, parts, last, mid, fusion"):
            model.search_by(wrong)
    with pytest.raises(UserError, match="streams = :"):
        method({"streams": []})
    with pytest.raises(UserError, match="streams = fusion"):
        method({"fusion": None, "streams": ["fusion"]})


def test_the_class_token_can_be_a_stream():
    model = method({"cls": True, "streams": ["cls"]}).eval()
    assert dict(model.streams) == {"cls": 32}
    images = batch(0).images
    expected = model.heads["cls"].norm(model.backbone(images).cls)
    torch.testing.assert_close(model.embed(images), expected / expected.norm(dim=1, keepdim=True))
    with pytest.raises(UserError, match="class token"):
        method({"cls": True}, **RESNET)


@pytest.mark.parametrize(("section", "backbone", "told"), [
    ({"branches": {"branch_from": 5}}, VIT, "0 <= branch_from < mid_block < 6"),
    ({"branches": {"ceil_pool": True}}, VIT, "ceil_pool is for ResNets"),
    ({"branches": {"branch_from": 5}}, RESNET, "for Vision Transformers"),
    ({}, {"name": "mobilenetv3_small_050", "drop_path": 0.0}, "mobilenetv3_small_050 is none"),
    ({"parts": 9}, VIT, "more than the 8 rows"),
    ({}, VIT | {"depth": 1}, "0 <= branch_from"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(section, backbone, told):
    with pytest.raises(UserError, match=told):
        method(section, **backbone)


def test_copies_train_at_the_rate_of_what_they_copy():
    model = method()
    optimizer = build_optimizer(model, OptimConfig(kind="adamw", layer_decay=0.5))
    scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    origins = dict(model.backbone.named_parameters())
    for name, weight in model.branch.named_parameters():
        assert scale[id(weight)] == scale[id(origins[model.branch.origin(name)])]
    assert {scale[id(p)] for p in model.branch.blocks[0].parameters()} == {0.25}


def test_a_resnet_without_ibn_gives_its_weights_and_says_so(tmp_path):
    torch.manual_seed(0)
    plain = backbones.build(backbones.arguments_of(BackboneConfig(name="resnet18", drop_path=0.0), SIZE), 0.0).model
    for norm in (m for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.running_mean)
    state = {f"module.encoder_q.{name}": value for name, value in plain.state_dict().items()}
    state |= {"module.encoder_q.fc.0.weight": torch.zeros(4, 512), "module.queue": torch.zeros(4, 8)}
    torch.save({"state_dict": state, "arch": "resnet18"}, tmp_path / "moco.pth")
    wanted = BackboneConfig(**RESNET)
    backbone, stored = models.start_backbone(str(tmp_path / "moco.pth"), wanted, SIZE, 0)
    assert "a ResNet without IBN: 6 norms were split" in stored["source"]
    norm, origin = backbone.model.layer2[1].bn1, plain.layer2[1].bn1
    assert torch.equal(norm.IN.weight, origin.weight[:64])
    assert torch.equal(norm.BN.weight, origin.weight[64:])
    assert torch.equal(norm.BN.running_mean, origin.running_mean[64:])
    assert torch.equal(backbone.model.layer4[0].conv1.weight, plain.layer4[0].conv1.weight)


def test_eight_drawn_people_are_fitted():
    """40 steps on four images of each, from four cameras: every classifier knows them, and the branches agree."""
    drawn = figures.Config(identities=8, height=SIZE[0], width=SIZE[1])
    augment, labels = Augment(AugmentConfig(height=SIZE[0], width=SIZE[1])), torch.arange(8).repeat_interleave(4)
    views = [augment.test_view(figures.render(drawn, pid, camid, 0)) for pid in range(1, 9) for camid in range(4)]
    images = torch.from_numpy(np.stack(views))
    model, told = method(None, SIZE, 8, **VIT | {"drop_path": 0.0}), []
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    given = ImageBatch(images, labels, torch.rand(32, model.draws), torch.zeros_like(labels))
    for step in range(40):
        if step == 30:  # what the norms remember then is what they see
            optimizer.param_groups[0]["lr"] = 2e-4
        losses = model(given)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        told.append({name: loss.item() for name, loss in losses.items()})
    ids = [name for name in told[0] if name.startswith("id_")]
    assert all(told[-1][name] < 1.5 < 40 < told[0][name] for name in ids), "label smoothing leaves 0.8"
    assert told[-1]["distillation"] < told[0]["distillation"] - 0.4
    features = model.eval().embed(images)
    nearest = (features @ features.T - 2 * torch.eye(32)).argmax(1)
    assert bool((labels[nearest] == labels).all())


@pytest.mark.parametrize("section", [{}, {"fusion": None}])
def test_what_is_watched_runs_in_each_step(section):
    """How slow a process is, is told by these modules: one that is never called would tell nothing."""
    model, called = method(section), set()
    for module in model.watched:
        module.register_forward_hook(lambda *given: called.add(given[0]))
    model(batch(model.draws))
    assert called == set(model.watched)
