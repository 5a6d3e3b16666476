"""What Cluster Contrast plans for an epoch, what a step does, and what it refuses."""

import numpy as np
import pytest
import torch

from finetune import backbones, clusters
from finetune.backbones import BackboneConfig
from finetune.cluster_memory import means
from finetune.clusters import NOISE, Found
from finetune.identities import IdentitiesConfig, select_identities
from finetune.methods import build
from finetune.methods.base import ImageBatch, Parts
from finetune.methods.cluster_contrast import ClusterContrast
from finetune.sampling import SamplingConfig
from finetune.unlabelled import training_splits
from finetune.validation import ValidationConfig
from recipes.errors import UserError
from shards.schema import UNKNOWN


def method(**section) -> ClusterContrast:
    torch.manual_seed(0)
    config = BackboneConfig(name="vit_tiny_patch16_224", patch_size=8, embed_dim=32, depth=2, num_heads=2)
    backbone = backbones.build(backbones.arguments_of(config, (64, 32)))
    sampling = SamplingConfig(identities_per_batch=2, images_per_identity=4)
    return build({"name": "cluster_contrast", **section}, Parts(backbone, 0, 2, sampling, 0))


def features(count: int) -> np.ndarray:
    return torch.nn.functional.normalize(torch.randn(count, 32, generator=torch.Generator().manual_seed(0))).numpy()


def unlabelled(count: int, camids=None):
    camids = np.arange(count) % 2 if camids is None else camids
    return select_identities(IdentitiesConfig(labels="none"), np.full(count, UNKNOWN), camids)


def test_clusters_of_the_epoch_before_are_kept_where_there_are_none(monkeypatch):
    rows, model = unlabelled(20), method()
    labels = np.repeat([0, 1, NOISE, 2], 5)
    answers = iter([Found(labels, 0.6), Found(np.full(20, NOISE), 0.6), Found(np.zeros(20, np.int64), 0.7)])
    monkeypatch.setattr(clusters, "find", lambda *given: next(answers))
    first = model.epoch(0, rows, lambda: features(20))
    assert model.memory.centroids.shape == (3, 32)
    torch.testing.assert_close(model.memory.centroids, means(features(20), labels))
    for number, found in ((1, "0 cluster(s) and 20 of 20 images in none"), (2, "1 cluster(s) and 0 of 20")):
        plan = model.epoch(number, rows, lambda: features(20)[::-1].copy())
        assert np.array_equal(plan.labels, first.labels)
        assert found in plan.notes[1]
        assert "the clusters of the epoch before are kept" in plan.notes[1]
        torch.testing.assert_close(model.memory.centroids, means(features(20)[::-1].copy(), labels))
    assert not np.array_equal(plan.batches, first.batches), "batches are drawn anew"


def test_eps_that_was_moved_and_few_clusters_are_told(monkeypatch):
    rows, model = unlabelled(20), method()
    model.sampling = SamplingConfig(identities_per_batch=4, images_per_identity=2)
    monkeypatch.setattr(clusters, "find", lambda *given: Found(np.repeat([0, 1], 10), 0.75))
    plan = model.epoch(0, rows, lambda: features(20))
    assert "2 clusters (a batch has 4, so each comes several times)" in plan.notes[0]
    assert "eps = 0.6 gave no two clusters; this epoch has those of eps = 0.75" in plan.notes[1]
    assert "batches of 8 images are smaller than any published" in plan.notes[2]
    assert plan.told["eps"] == 0.75
    assert plan.batches.shape == (200, 8)


def test_shape_needs_no_features_and_cameras_need_labels():
    model = method(cluster_sampling={"iterations": 7})
    assert model.shape(unlabelled(20)) == (7, 8)
    with pytest.raises(UserError, match="cameras = other needs camera labels"):
        model.shape(unlabelled(20, np.full(20, UNKNOWN)))
    blind = method(cluster_sampling={"iterations": 7, "cameras": "any"})
    assert blind.shape(unlabelled(20, np.full(20, UNKNOWN))) == (7, 8)


def test_a_step_moves_the_memory_by_the_features_of_the_batch(monkeypatch):
    labels = np.repeat([0, 1], 10)
    monkeypatch.setattr(clusters, "find", lambda *given: Found(labels, 0.6))
    model = method(cluster_memory={"update": "mean", "momentum": 0.0})
    model.epoch(0, unlabelled(20), lambda: features(20))
    images, names = torch.randn(8, 3, 64, 32), torch.tensor([0, 1] * 4)
    batch = ImageBatch(images, names, torch.zeros(8, model.draws), torch.zeros(8, dtype=torch.int64))
    losses = model.train()(batch)
    assert losses.keys() == {"nce"}
    losses["nce"].backward()
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    before = model.memory.centroids.clone()
    (found, _), *_ = model.memory.seen
    model.end_step()
    wanted = torch.stack([found[names == name].mean(dim=0) for name in (0, 1)])
    torch.testing.assert_close(model.memory.centroids, torch.nn.functional.normalize(wanted))
    assert not torch.equal(model.memory.centroids, before)


def test_norm_images_gives_each_part_its_own_statistics():
    whole, parts = method(), method(norm_images=4)
    images = torch.randn(8, 3, 64, 32)
    pooled = parts.pooling(parts.backbone(images, patches="none")).detach()
    labels, drops = torch.zeros(8, dtype=torch.int64), torch.zeros(8, whole.draws)
    for model in (whole, parts):
        model.memory.begin(0, np.zeros(8, np.int64), torch.eye(2, 32))
        model.train()(ImageBatch(images, labels, drops, labels))
    for half in (slice(0, 4), slice(4, 8)):
        rows = pooled[half]
        wanted = (rows - rows.mean(dim=0)) / (rows.var(dim=0, unbiased=False) + 1e-5).sqrt()
        found = parts.memory.seen[0][0][half]
        torch.testing.assert_close(found, torch.nn.functional.normalize(wanted), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(whole.memory.seen[0][0], parts.memory.seen[0][0], atol=1e-3)


def test_images_that_norm_images_does_not_divide_are_told():
    model = method(norm_images=5)
    labels = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(UserError, match="norm_images = 5 does not divide the 8 images of a process"):
        model(ImageBatch(torch.randn(8, 3, 64, 32), labels, torch.zeros(8, model.draws), labels))


def test_what_would_need_labels_is_refused():
    none = IdentitiesConfig(labels="none")
    with pytest.raises(UserError, match=r"validation\.identities holds out identities"):
        training_splits(none, ValidationConfig(identities=3))
    assert training_splits(none, ValidationConfig()) == ("train", "unlabeled")
    assert training_splits(IdentitiesConfig(), ValidationConfig(identities=3)) == ("train",)
    for limit in ("max_identities", "images_per_identity"):
        with pytest.raises(UserError, match="trains on all images"):
            select_identities(IdentitiesConfig(labels="none", **{limit: 2}), np.arange(9))
    with pytest.raises(UserError, match=r"set necks\.feature=after"):
        method(necks={"feature": "before"})


def test_without_labels_all_images_are_rows():
    chosen = select_identities(IdentitiesConfig(labels="none"), np.array([3, -1, 0, UNKNOWN, 3]), np.arange(5))
    assert chosen.rows.tolist() == [0, 1, 2, 3, 4], "junk and distractors as well: nobody knows what they are"
    assert set(chosen.labels.tolist()) == {UNKNOWN}
    assert (chosen.classes, chosen.sentence) == (0, "5 images without labels")
    assert chosen.cameras.tolist() == [0, 1, 2, 3, 4]
