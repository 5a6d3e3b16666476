"""BoT with TransReID's additions: the camera embedding and the jigsaw patches."""

import pytest
import torch

from finetune import backbones, jpm
from finetune.backbones import BackboneConfig
from finetune.methods import build
from finetune.methods.base import ImageBatch, Parts
from finetune.sampling import SamplingConfig
from recipes.errors import UserError
from shards.schema import UNKNOWN

SIZE, CLASSES, CAMERAS = (64, 32), 3, 2
TINY = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def method(section: dict, cameras: int = CAMERAS, **backbone):
    """BoT on a small ViT, or on what `backbone` names."""
    torch.manual_seed(0)
    made = backbones.build(backbones.arguments_of(BackboneConfig(**(backbone or TINY)), SIZE), 0.2)
    return build({"name": "bot", **section}, Parts(made, CLASSES, cameras, SamplingConfig(), 0))


def batch(draws: int) -> ImageBatch:
    """Six images of three people on two cameras."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, *SIZE, generator=generator)
    drops = torch.rand(6, draws, generator=generator)
    return ImageBatch(images, torch.tensor([0, 0, 1, 1, 2, 2]), drops, torch.tensor([0, 1] * 3))


@pytest.mark.parametrize(
    ("section", "dim"),
    [({}, 32), ({"sie": {}}, 32), ({"jpm": {}}, 5 * 32), ({"sie": {}, "jpm": {"slices": 2}}, 3 * 32)],
    ids=["plain", "sie", "jpm", "both"],
)
def test_losses_reach_every_weight_and_features_have_length_one(section, dim):
    model = method(section)
    losses = model(batch(model.draws))
    sum(losses.values()).backward()
    # the published classifiers act on the features after the neck; nothing is left out
    idle = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not idle
    features = model.eval().embed(batch(0).images, batch(0).cameras)
    assert features.shape == (6, dim)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))


def test_without_patches_the_result_is_that_with_them():
    plain = method({}).eval()
    images = batch(0).images
    whole = plain.neck.embed(plain.pooling(plain.backbone(images)))
    torch.testing.assert_close(plain.embed(images), whole)


def test_an_unknown_camera_gets_the_mean_vector():
    model = method({"sie": {"scale": 3.0}}).eval()
    vectors = model.sie.vectors
    found = model.sie(torch.tensor([1, UNKNOWN, 7]), 3)
    torch.testing.assert_close(found[0], 3 * vectors[1])
    torch.testing.assert_close(found[1], 3 * vectors.mean(dim=0))
    assert torch.equal(found[1], found[2])
    images = batch(0).images
    known = model.embed(images, torch.zeros(6, dtype=torch.int64))
    assert not torch.allclose(known, model.embed(images)), "the camera must matter"
    assert torch.equal(model.embed(images), model.embed(images, torch.full((6,), UNKNOWN)))


def test_the_order_of_the_slices_by_hand():
    patches = torch.arange(8.0)[None, :, None]
    # the first four go to the end: 4 5 6 7 0 1 2 3; two groups read across: 4 0 5 1 6 2 7 3
    assert jpm.rearranged(patches, shift=5, groups=2).flatten().tolist() == [4, 0, 5, 1, 6, 2, 7, 3]
    assert jpm.rearranged(patches, shift=1, groups=1).flatten().tolist() == list(range(8))
    # seven: the last but one stands in for the eighth, as published: 4 5 6 0 | 1 2 3 2
    assert jpm.rearranged(patches[:, :7], shift=5, groups=2).flatten().tolist() == [4, 1, 5, 2, 6, 3, 0, 2]


def test_jigsaw_losses_are_halves_and_features_are_scaled():
    model = method({"jpm": {}, "id_losses": {"triplet_weight": 0.0}})
    given = batch(model.draws)
    with torch.no_grad():
        first, *local = model.features(given.images, given.drops, given.cameras)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        parts = [model.losses(model.neck(first), first, given.labels)["id"]]
        parts += [
            model.local_losses(n(f), f, given.labels)["id"] for n, f in zip(model.local_necks, local, strict=True)
        ]
        model.load_state_dict(state)
        total = model(given)["id"]
    torch.testing.assert_close(total, 0.5 * parts[0] + 0.5 * torch.stack(parts[1:]).mean())
    model.eval()
    with torch.no_grad():
        first, *local = model.features(given.images, None, None)
        joined = torch.cat([first, *(part / 4 for part in local)], dim=1)
        torch.testing.assert_close(model.embed(given.images), torch.nn.functional.normalize(joined, dim=1))


def test_the_local_branch_starts_as_a_copy_of_the_last_block():
    model = method({"jpm": {"slices": 1, "shift": 1, "groups": 1}}).eval()
    with torch.no_grad():
        first, local = model.features(batch(0).images, None, None)
    torch.testing.assert_close(first, local)  # one slice holds all patches in their order


def test_what_a_network_cannot_do_is_refused():
    with pytest.raises(UserError, match=r"method\.sie needs a Vision Transformer; convnext_atto"):
        method({"sie": {}}, name="convnext_atto")
    with pytest.raises(UserError, match="no camera labels"):
        method({"sie": {}}, cameras=0)
    with pytest.raises(UserError, match="cannot cut 8 x 4 patches into 64 slices"):
        method({"jpm": {"slices": 64}})
