"""Cluster Contrast (Dai et al. 2021, arXiv 2103.11568): person re-identification without any label.

Each epoch: features of all images -> clusters -> a centroid each -> a fixed number of batches, P clusters of Z images:
backbone -> BatchNorm -> L2 -> ClusterNCE against all centroids, which every batch moves. The clusters are the classes
of that epoch only; images in no cluster sit it out.

Started from a model that was fine-tuned on another set with labels, the same is domain adaptation.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from finetune import clusters
from finetune.cluster_memory import ClusterMemory, ClusterMemoryConfig, means
from finetune.cluster_sampling import ClusterSamplingConfig, cluster_batches
from finetune.clusters import ClustersConfig
from finetune.identities import Identities
from finetune.methods.base import Features, ImageBatch, Method, Parts, Plan
from finetune.necks import NecksConfig, Pooling
from finetune.shared_work import by_first
from recipes.errors import UserError
from recipes.load import Section

TRIED = 128  # images a batch: with fewer, users of the published code report a steep loss


class Config(Section):
    """Feature, clusters, memory, batches."""

    necks: NecksConfig = NecksConfig(feature="after")
    clusters: ClustersConfig = ClustersConfig()
    cluster_memory: ClusterMemoryConfig = ClusterMemoryConfig()
    cluster_sampling: ClusterSamplingConfig = ClusterSamplingConfig()
    # images that share the statistics of a BatchNorm in training: the published ResNets have 64, 256 over 4 GPUs; null:
    # all of a process
    norm_images: int | None = Field(None, ge=2)

    @field_validator("necks")
    @classmethod
    def _after(cls, necks: NecksConfig) -> NecksConfig:
        if necks.feature != "after":
            raise ValueError("the feature of Cluster Contrast is the one after the BatchNorm; set necks.feature=after")
        return necks


class ClusterContrast(Method):
    """Backbone and BatchNorm; the classes come and go with the epochs."""

    def __init__(self, config: Config, parts: Parts):
        super().__init__(parts)
        self.config = config
        self.pooling = Pooling(config.necks, parts.backbone.dim)
        self.norm = nn.BatchNorm1d(self.pooling.dim)
        self.norm.bias.requires_grad_(False)
        self.memory = ClusterMemory(config.cluster_memory)
        self.patches = "none" if config.necks.pooling in (None, "cls") else "all"

    def apart(self) -> Mapping[str, Any]:
        return {"cluster_memory": self.memory}

    def shape(self, identities: Identities) -> tuple[int, int]:
        if identities.classes:
            raise UserError("cluster_contrast trains without labels; say so: identities.labels=none")
        sampling = self.config.cluster_sampling
        if sampling.cameras == "other" and (identities.cameras is None or (identities.cameras < 0).all()):
            raise UserError("method.cluster_sampling.cameras = other needs camera labels, and the training images have "
                            "none; set it to any")  # fmt: skip
        return sampling.iterations, self.sampling.identities_per_batch * self.sampling.images_per_identity

    def epoch(self, number: int, identities: Identities, features: Features) -> Plan:
        """The clusters of the features as they are now; those of the state where a run goes on inside `number`."""
        told, notes = {}, ()
        if self.memory.epoch != number:
            now = features()
            labels, centroids, told, notes = by_first(lambda: self._group(number, identities, now))
            self.memory.begin(number, labels, centroids)
        labels, sampling = self.memory.labels.numpy(), self.config.cluster_sampling
        cameras = identities.cameras if sampling.cameras == "other" else None
        shape = self.sampling.identities_per_batch, self.sampling.images_per_identity
        batches = cluster_batches(labels, cameras, shape, sampling.iterations, self.seed, number)
        return Plan(batches, labels, told, notes)

    def _group(
        self, number: int, identities: Identities, features: np.ndarray
    ) -> tuple[np.ndarray, Tensor, dict[str, Any], tuple[str, ...]]:
        """Labels, centroids, what to tell; UserError where nothing can be learned."""
        config, notes = self.config.clusters, []
        found = clusters.find(features, config, self.seed)
        labels = found.labels
        if found.count < 2:
            labels = self.memory.labels.numpy()
            if not len(labels):
                raise UserError(_nothing(found, config))
            notes.append(f"{_few(found)}: the clusters of the epoch before are kept")
        elif found.eps not in (None, config.eps):
            notes.append(f"eps = {config.eps:g} gave no two clusters; this epoch has those of eps = {found.eps:g}")
        told = clusters.statistics(labels, identities.told, identities.cameras)
        told |= {} if found.eps is None else {"eps": found.eps}
        per_batch, images = self.sampling.identities_per_batch, self.sampling.images_per_identity
        if number == 0 and per_batch * images < TRIED:
            notes.append(f"batches of {per_batch * images} images are smaller than any published (256); users report "
                         f"much worse models below {TRIED}, and a smaller batch wants a smaller optim.lr")  # fmt: skip
        return labels, means(features, labels), told, (_sentence(number, told, per_batch), *notes)

    def features(self, images: Tensor, drops: Tensor | None) -> Tensor:
        """L2-normalised features after the BatchNorm, float32 [B, F]."""
        pooled = self.pooling(self.backbone(images, drops=drops, patches=self.patches))
        with torch.autocast(images.device.type, enabled=False):
            return F.normalize(self.norm(pooled.float()), dim=1)

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        size = self.config.norm_images or len(batch.images)
        if len(batch.images) % size:
            raise UserError(f"method.norm_images = {size} does not divide the {len(batch.images)} images of a process")
        parts = zip(batch.images.split(size), batch.drops.split(size), strict=True)
        return {"nce": self.memory.loss(torch.cat([self.features(*part) for part in parts]), batch.labels)}

    def end_step(self) -> None:
        self.memory.move()

    def embed(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        return self.features(images, None)


def _few(found: clusters.Found) -> str:
    noise, count = int((found.labels == clusters.NOISE).sum()), len(found.labels)
    return f"clustering found {found.count} cluster(s) and {noise} of {count} images in none"


def _nothing(found: clusters.Found, config: ClustersConfig) -> str:
    tried = f" with eps in {config.eps_range[0]:g}..{config.eps_range[1]:g}" if config.kind == "dbscan" else ""
    return (
        f"{_few(found)}{tried}, so there is nothing to learn. Start from a pretrained teacher (--ckpt), or set "
        "method.clusters.min_samples lower, k1 to about the images of a person, or kind=kmeans and a number of clusters"
    )


def _sentence(number: int, told: Mapping[str, Any], per_batch: int) -> str:
    """The statistics of an epoch for the terminal. per_batch: P."""
    names = {"purity": "purity", "ari": "ARI", "camera_purity": "camera purity"}
    known = "".join(f", {name} {told[key]:.3f}" for key, name in names.items() if key in told)
    few = f" (a batch has {per_batch}, so each comes several times)" if told["clusters"] < per_batch else ""
    return (
        f"epoch {number}: {told['clusters']} clusters{few} of {told['mean_size']:.1f} images each, {told['noise']} "
        f"images in none{known}"
    )


def build(config: Config, parts: Parts) -> ClusterContrast:
    """Called by finetune.methods.build."""
    return ClusterContrast(config, parts)
