"""AlignedReID from end to end: shapes on a ViT and a ResNet, whose weights each loss reaches, resume, the model."""

import pytest
import small
import torch
from safetensors.torch import load_file
from test_two_processes import launch

from finetune import backbones, models
from finetune.aligned_distance import pairwise
from finetune.backbones import BackboneConfig
from finetune.config import FinetuneConfig
from finetune.local_heads import LocalHeadsConfig, rows_and_columns, stripes
from finetune.methods import build
from finetune.methods.base import ImageBatch, Parts
from finetune.sampling import SamplingConfig
from pretrain import checkpoint
from recipes.errors import UserError
from recipes.load import load

SIZE, CLASSES = (64, 32), 3
VIT = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
RESNET = {"name": "resnet10t", "last_stride": 1}
TINY = ["backbone.embed_dim=32", "backbone.depth=2", "backbone.num_heads=2", "benchmark.draw=null", "log_every=1"]
QUICK = [*TINY, "benchmark.strips=0", "benchmark.bootstrap=0", "optim.epochs=4", "optim.warmup_epochs=0",
         "resume.every_epochs=1", "sampling.identities_per_batch=4", "method.local_heads.dim=16"]  # fmt: skip
RECIPES = sorted(path.name for path in (small.ROOT / "recipes/finetune").glob("aligned_*.yaml"))


def method(section: dict | None = None, seed: int = 0, **backbone):
    torch.manual_seed(0)
    made = backbones.build(backbones.arguments_of(BackboneConfig(**(backbone or VIT)), SIZE), 0.0)
    given = {"local_heads": {"stripes": 4, "dim": 16}, **(section or {})}
    return build({"name": "aligned", **given}, Parts(made, CLASSES, 0, SamplingConfig(), seed))


def batch(draws: int = 0, size: tuple[int, int] = SIZE) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, *size, generator=generator)
    return ImageBatch(images, torch.tensor([0, 0, 1, 1, 2, 2]), torch.rand(6, draws), torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize(("backbone", "dim"), [(VIT, 32), (RESNET, 512)], ids=["vit", "resnet"])
def test_global_and_local_features_of_one_backbone(backbone, dim):
    model = method(**backbone).eval()
    features, parts = model.embed(batch().images), model.embed_local(batch().images)
    assert features.shape == (6, dim)
    assert parts.shape == (6, 4, 16) == (6, *model.local_shape)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(model.local_distance(parts, parts[:2]), pairwise(parts, parts[:2]))
    losses = model.train()(batch(model.draws))
    assert set(losses) == {"id", "triplet", "local"}
    sum(losses.values()).backward()
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]


def test_stripes_by_hand():
    """4 x 2 patches of one number each, row by row."""
    patches = torch.arange(8.0).view(1, 8, 1)
    mean, most = LocalHeadsConfig(stripes=2), LocalHeadsConfig(stripes=2, pooling="max")
    assert stripes(patches, (64, 32), mean)[0, :, 0].tolist() == [1.5, 5.5]
    assert stripes(patches, (64, 32), most)[0, :, 0].tolist() == [3, 7]
    assert stripes(patches, (64, 32), LocalHeadsConfig(stripes=None))[0, :, 0].tolist() == [0.5, 2.5, 4.5, 6.5]
    with pytest.raises(UserError, match="more than the 4 rows"):
        stripes(patches, (64, 32), LocalHeadsConfig(stripes=5))


@pytest.mark.parametrize(("count", "size", "grid"), [
    (128, (256, 128), (16, 8)), (32, (256, 128), (8, 4)), (49, (224, 224), (7, 7)), (192, (384, 128), (24, 8)),
    (288, (384, 192), (24, 12)),
])  # fmt: skip
def test_the_grid_of_square_patches(count, size, grid):
    assert rows_and_columns(count, size) == grid
    with pytest.raises(UserError, match="grid of square patches"):
        rows_and_columns(210, (256, 128))


def test_a_classifier_without_a_loss_waits_for_no_gradient():
    model = method({"head": "plain", "id_losses": {"id_weight": 0.0}})
    losses = model(batch(model.draws))
    assert set(losses) == {"triplet", "local"}
    sum(losses.values()).backward()
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    without = method({"local_triplet": {"weight": 0.0}})
    assert without.local_shape is None
    assert set(without(batch(without.draws))) == {"id", "triplet"}


MUTUAL = {"mutual": {"networks": 3, "local_weight": 0.5}}


def test_each_loss_reaches_only_its_own_network():
    model = method(MUTUAL)
    assert [len(list(part.parameters())) for part in model.optimisers()] == [
        len(list(model.backbone.parameters())) + len(list(model.heads.parameters()))
    ] * 3
    weights = [set(part.parameters()) for part in model.optimisers()]
    assert not weights[0] & weights[1]
    assert set.union(*weights) == set(model.parameters())
    for number, suffix in enumerate(["", "_1", "_2"]):
        model.zero_grad()
        losses = model(batch(model.draws))
        sum(losses[f"{name}{suffix}"] for name in ("id", "triplet", "local")).backward()
        reached = [any(p.grad is not None and p.grad.abs().sum() for p in own) for own in weights]
        assert reached == [i == number for i in range(3)]
    assert {"mutual_class", "mutual_metric", "mutual_local"} <= set(losses)


def test_what_a_network_learns_from_its_peers_is_its_gradient_alone(monkeypatch):
    """The gradient of the whole loss for the first network is that with peers that cannot move."""
    model = method(MUTUAL)
    sum(model(batch(model.draws)).values()).backward()
    together = [p.grad.clone() for p in model.optimisers()[0].parameters() if p.requires_grad]
    model.zero_grad()
    model.peers.requires_grad_(False)
    sum(model(batch(model.draws)).values()).backward()
    for found, expected in zip(
        (p.grad for p in model.optimisers()[0].parameters() if p.requires_grad), together, strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_networks_begin_with_the_same_backbone_and_other_heads():
    model, other = method(MUTUAL), method(MUTUAL, seed=5)
    first, second = (list(part.parameters()) for part in (model.backbone, model.peers[0].backbone))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    own, theirs = model.heads.neck.classifier.weight, model.peers[0].heads.neck.classifier.weight
    assert not torch.equal(own, theirs)
    assert not torch.equal(theirs, model.peers[1].heads.neck.classifier.weight)
    assert not torch.equal(theirs, other.peers[0].heads.neck.classifier.weight)


def test_without_its_peers_the_model_is_the_same():
    model = method(MUTUAL).eval()
    tensors, section = model.exported({"name": "aligned", "local_heads": {"stripes": 4, "dim": 16}, **MUTUAL})
    assert not [name for name in tensors if "peers" in name]
    alone = method({key: value for key, value in section.items() if key != "name"}, seed=9)
    alone.load_state_dict(tensors)
    images = batch().images
    assert torch.equal(alone.eval().embed(images), model.embed(images))
    assert torch.equal(alone.embed_local(images), model.embed_local(images))


def test_global_mining_is_refused():
    with pytest.raises(UserError, match="mining = 'global'"):
        method({"id_losses": {"mining": "global"}})


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)


def command(out, people, *more: str) -> list[str]:
    recipe = str(small.ROOT / "recipes/finetune/aligned_figures.yaml")
    given = [f"benchmark.shards={people}", *QUICK, "method.mutual={}", "backbone.drop_path=0.2", *more]
    return [str(small.ROOT / "finetune/run.py"), "--recipe", recipe, "--out", str(out), "--ckpt", "none", *given]


@pytest.mark.parametrize(
    "more", [[], ["validation.identities=4", "validation.every_epochs=1"]], ids=["plain", "chosen"]
)
def test_two_networks_are_stopped_and_go_on_to_the_bit(people, tmp_path, more):
    assert small.run(command(tmp_path / "whole", people, *more)) == 0
    small.interrupted_and_gone_on(command(tmp_path / "run", people, *more))
    states = [checkpoint.states(tmp_path / name / "checkpoints")[-1] for name in ("run", "whole")]
    first, second = (load_file(next(state.glob("*.safetensors"))) for state in states)
    assert any(name.startswith("method.peers.0.") for name in first)
    assert any(name.startswith("optimizer.peers.0.") for name in first), "each has an optimiser of its own"
    assert all(torch.equal(first[name], second[name]) for name in second)
    weights, config = checkpoint.load_model(tmp_path / "run")
    assert config["method"]["mutual"] is None
    assert all(
        torch.equal(value, checkpoint.load_model(tmp_path / "whole")[0][name]) for name, value in weights.items()
    )
    assert not [name for name in weights if "peers" in name]
    last, _ = models.load_stored(str(states[0]))
    model, _ = models.load_stored(str(tmp_path / "run"))
    same = models.fingerprint(last) == models.fingerprint(model)
    assert same or more, "unless an earlier epoch was better"


def test_two_processes_learn_what_one_does(people, tmp_path):
    """Per process BatchNorm and triplets differ, so this is about all losses being finite and alike on both."""
    launch("torchrun", command(tmp_path / "two", people, "optim.epochs=1"))
    lines = small.metrics(tmp_path / "two")
    assert {"id", "id_1", "local", "local_1", "mutual_class", "mutual_metric"} <= set(lines[-1])


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build_their_method(name):
    config = load(FinetuneConfig, str(small.ROOT / "recipes/finetune" / name), ["ckpt=none"])
    small_vit = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    given = config.backbone.model_dump() | (small_vit if "vit" in config.backbone.name else {"name": "resnet10t"})
    made = backbones.build(backbones.arguments_of(BackboneConfig(**given), config.augment.size), 0.0)
    model = build(config.method, Parts(made, CLASSES, 0, config.sampling, 0))
    losses = model(batch(model.draws, config.augment.size))
    assert "local" in losses
    sum(losses.values()).backward()
    stripe, _ = model.local_shape
    assert model.eval().embed_local(batch(0, config.augment.size).images).shape == (6, *model.local_shape)
    assert stripe == {"aligned_market1501_r50_paper.yaml": 7}.get(name, 8)
