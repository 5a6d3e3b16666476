"""The memory of Cluster Contrast (Dai et al. 2021, arXiv 2103.11568): one centroid a cluster, moved by every batch.

ClusterNCE pulls an image to the centroid of its cluster and away from all others. The centroids get no gradient: after
each step the batch of all processes moves them, the same way on every process.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from finetune.id_losses import gathered
from recipes.load import Section


class ClusterMemoryConfig(Section):
    """How strongly and by which images the centroids move."""

    # "momentum": by every image of the batch, one after the other; "hard": by the one that is least like its centroid,
    # the paper's first version and what is used with ViTs; "mean": by the mean of the cluster's images in the batch
    update: Literal["momentum", "hard", "mean"] = "momentum"
    momentum: float = Field(0.1, ge=0, lt=1)  # share of the old centroid that a move leaves
    temperature: float = Field(0.05, gt=0)  # of the cosines


def cluster_nce(features: Tensor, labels: Tensor, centroids: Tensor, temperature: float) -> Tensor:
    """ClusterNCE, eq. 4 of the paper: mean over images of -log softmax_k(q . C_k / temperature)[label].

    features: [B, F], L2-normalised. labels: int64 [B] in 0..K-1. centroids: float32 [K, F], L2-normalised, without
    gradient. Returns a scalar.
    """
    with torch.autocast(features.device.type, enabled=False):
        return F.cross_entropy(features.float() @ centroids.T / temperature, labels)


def means(features: np.ndarray, labels: np.ndarray) -> Tensor:
    """The L2-normalised mean of each cluster, float32 [K, F].

    features: float32 [N, F], L2-normalised. labels: int64 [N], 0..K-1 each used, negative where an image belongs to no
    cluster.
    """
    inside = np.flatnonzero(labels >= 0)
    names = torch.from_numpy(labels[inside])
    sums = torch.zeros(int(names.max()) + 1, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, names, torch.from_numpy(features[inside]).double())
    return F.normalize(sums, dim=1).float()  # a sum points where its mean does


def turns(labels: Tensor) -> Tensor:
    """How many earlier images of the batch have the same label, int64 [B]: 0 for the first of each cluster."""
    order = torch.argsort(labels, stable=True)
    _, counts = torch.unique_consecutive(labels[order], return_counts=True)
    starts = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    found = torch.empty_like(labels)
    found[order] = torch.arange(len(labels), device=labels.device) - starts
    return found


def _moved(centroids: Tensor, names: Tensor, features: Tensor, momentum: float) -> None:
    """Move the centroids `names`, each once, towards features [len(names), F]; in place."""
    centroids[names] = F.normalize(momentum * centroids[names] + (1 - momentum) * features, dim=1)


def move_by_each(centroids: Tensor, features: Tensor, labels: Tensor, momentum: float) -> None:
    """C_y <- norm(m C_y + (1 - m) q) for one image after the other in the order of the batch; in place.

    Images of different clusters do not meet, so the first images of all clusters move together, then the second ones.
    With the published momentum of 0.1 the last image of a cluster decides. centroids [K, F], features [B, F], both
    L2-normalised; labels int64 [B].
    """
    turn = turns(labels)
    for number in range(int(turn.max()) + 1):
        rows = torch.nonzero(turn == number)[:, 0]
        _moved(centroids, labels[rows], features[rows], momentum)


def move_by_hardest(centroids: Tensor, features: Tensor, labels: Tensor, momentum: float) -> None:
    """Each cluster of the batch moves once, by its image with the smallest cosine to the centroid; the first of equal
    ones. Arguments as for `move_by_each`."""
    cosines = (features * centroids[labels]).sum(dim=1)
    order = torch.argsort(cosines, stable=True)
    order = order[torch.argsort(labels[order], stable=True)]  # by cluster, the hardest first
    names, counts = torch.unique_consecutive(labels[order], return_counts=True)
    _moved(centroids, names, features[order[torch.cumsum(counts, 0) - counts]], momentum)


def move_by_mean(centroids: Tensor, features: Tensor, labels: Tensor, momentum: float) -> None:
    """Each cluster of the batch moves once, by the mean of its images. Arguments as for `move_by_each`."""
    names, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    turn, sums = turns(labels), torch.zeros(len(names), features.shape[1], device=features.device)
    for number in range(int(turn.max()) + 1):  # index_add_ on a GPU adds in no fixed order, and processes drift apart
        rows = torch.nonzero(turn == number)[:, 0]
        sums[inverse[rows]] += features[rows]
    _moved(centroids, names, sums / counts[:, None], momentum)


MOVES = {"momentum": move_by_each, "hard": move_by_hardest, "mean": move_by_mean}


class ClusterMemory:
    """Centroids and pseudo-labels of an epoch. They belong to the state of a run and not to the model that comes out of
    it, so this is no module: the exported weights do not hold it, and no wrapper sends it about."""

    def __init__(self, config: ClusterMemoryConfig):
        self.config = config
        self.epoch = -1  # that the clusters are of; -1: none yet
        self.labels = torch.empty(0, dtype=torch.int64)  # [N] of the training rows, negative: in no cluster
        self.centroids = torch.empty(0, 0)  # float32 [K, F], L2-normalised
        self.seen: list[tuple[Tensor, Tensor]] = []  # features and labels since the last step

    def begin(self, epoch: int, labels: np.ndarray, centroids: Tensor) -> None:
        """Forget the clusters before: those of `epoch` are here."""
        self.epoch, self.labels, self.centroids = epoch, torch.from_numpy(labels), centroids
        self.seen.clear()

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """`cluster_nce` of a batch of this process, which `move` will use. features: [B, F], L2-normalised."""
        self.centroids = self.centroids.to(features.device)
        self.seen.append((features.detach().float(), labels))
        return cluster_nce(features, labels, self.centroids, self.config.temperature)

    @torch.no_grad()
    def move(self) -> None:
        """After the optimiser step: move the centroids by what all processes saw since the last one."""
        if not self.seen:
            return
        features, labels = (gathered(torch.cat(part)) for part in zip(*self.seen, strict=True))
        MOVES[self.config.update](self.centroids, features, labels, self.config.momentum)
        self.seen.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """For the state of a run."""
        return {"epoch": torch.tensor(self.epoch), "labels": self.labels, "centroids": self.centroids}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave, with any number of clusters. RuntimeError where that is something else."""
        if state.keys() != {"epoch", "labels", "centroids"}:
            raise RuntimeError(f"the cluster memory wants epoch, labels and centroids, not {sorted(state)}")
        self.epoch = int(state["epoch"])
        self.labels, self.centroids = state["labels"].cpu(), state["centroids"]
        self.seen.clear()
