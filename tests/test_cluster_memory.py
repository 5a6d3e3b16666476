"""The memory of centroids: ClusterNCE and the moves against loops and numbers by hand, and the same on all processes.

As a script, which torchrun starts twice, this file is two of these processes.
"""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.cluster_memory import MOVES, ClusterMemory, ClusterMemoryConfig, cluster_nce, means, turns
from finetune.shared_work import by_first, share
from recipes.errors import UserError


def one_by_one(centroids: Tensor, features: Tensor, labels: Tensor, momentum: float) -> Tensor:
    """The published momentum update: a loop over the images."""
    found = centroids.clone()
    for feature, label in zip(features, labels.tolist(), strict=True):
        found[label] = F.normalize(momentum * found[label] + (1 - momentum) * feature, dim=0)
    return found


def once_each(centroids: Tensor, features: Tensor, labels: Tensor, momentum: float, hardest: bool) -> Tensor:
    """The published hard update, or that by the mean: a loop over the clusters."""
    found = centroids.clone()
    for label in sorted(set(labels.tolist())):
        own = features[labels == label]
        feature = own[int(np.argmin((own @ centroids[label]).numpy()))] if hardest else own.mean(dim=0)
        found[label] = F.normalize(momentum * found[label] + (1 - momentum) * feature, dim=0)
    return found


def directions(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_momentum_by_hand():
    """C = (1, 0), q = (0, 1), m = 0.1: (0.1, 0.9) of length 1."""
    for name in MOVES:
        centroids = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        MOVES[name](centroids, torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 0.1)
        torch.testing.assert_close(centroids[0], torch.tensor([0.1104, 0.9939]), atol=5e-5, rtol=0)
        assert centroids[1].tolist() == pytest.approx([0.6, 0.8]), "a cluster that is not in the batch stays"


def test_the_three_moves_differ_as_they_should():
    """Two images at 60 and 30 degrees from C = (1, 0), momentum 0: the last, the farthest, the middle."""
    features = torch.tensor([[0.5, math.sqrt(0.75)], [math.sqrt(0.75), 0.5]])
    found = {}
    for name, move in MOVES.items():
        centroids = torch.tensor([[1.0, 0.0]])
        move(centroids, features, torch.tensor([0, 0]), 0.0)
        found[name] = math.degrees(math.atan2(centroids[0, 1], centroids[0, 0]))
    assert found == pytest.approx({"momentum": 30, "hard": 60, "mean": 45}, abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    clusters=st.integers(1, 6),
    images=st.integers(1, 20),
    momentum=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_moves_are_the_published_loops(seed, clusters, images, momentum):
    centroids, features = directions(clusters, 5, seed=seed), directions(images, 5, seed=seed + 1)
    labels = torch.randint(clusters, (images,), generator=torch.Generator().manual_seed(seed))  # in any order
    wanted = {
        "momentum": one_by_one(centroids, features, labels, momentum),
        "hard": once_each(centroids, features, labels, momentum, True),
        "mean": once_each(centroids, features, labels, momentum, False),
    }
    for name, move in MOVES.items():
        found = centroids.clone()
        move(found, features, labels, momentum)
        torch.testing.assert_close(found, wanted[name], atol=1e-6, rtol=1e-5)


def test_turns_by_hand():
    assert turns(torch.tensor([3, 1, 3, 3, 0, 1])).tolist() == [0, 0, 1, 2, 0, 1]


def test_cluster_nce_by_hand():
    """Cosines 0.8 and 0.6, temperature 0.1: log(1 + exp(-2)) for the nearer centroid, 2 more for the other."""
    centroids = torch.eye(2)
    features = torch.tensor([[0.8, 0.6], [0.8, 0.6]])
    near, far = (cluster_nce(features[:1], torch.tensor([label]), centroids, 0.1).item() for label in (0, 1))
    assert near == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)
    assert far == pytest.approx(near + 2, abs=1e-5)
    both = cluster_nce(features, torch.tensor([0, 1]), centroids, 0.1).item()
    assert both == pytest.approx((near + far) / 2, abs=1e-6)


def test_only_the_features_get_a_gradient_and_the_memory_moves_at_the_end_of_a_step():
    memory = ClusterMemory(ClusterMemoryConfig())
    memory.begin(3, np.array([0, 0, 1, -1]), directions(2, 4, seed=0))
    before, features = memory.centroids.clone(), directions(4, 4, seed=1).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    memory.loss(features, labels).backward()
    assert features.grad.abs().sum() > 0
    assert not memory.centroids.requires_grad
    assert torch.equal(memory.centroids, before)
    memory.move()
    torch.testing.assert_close(memory.centroids, one_by_one(before, features.detach(), labels, 0.1))
    moved = memory.centroids.clone()
    memory.move()
    assert torch.equal(memory.centroids, moved), "each batch moves once"


def test_means_leave_noise_out():
    features = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], np.float32)
    found = means(features, np.array([0, 0, -1, 1]))
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]))


def test_state_comes_back_with_any_number_of_clusters():
    memory, other = ClusterMemory(ClusterMemoryConfig()), ClusterMemory(ClusterMemoryConfig())
    other.begin(1, np.array([0, 1, 2]), directions(3, 4, seed=5))
    memory.begin(7, np.array([0, 1, -1, 1, 0]), directions(2, 4, seed=6))
    other.load_state_dict(memory.state_dict())
    assert other.epoch == 7
    assert torch.equal(other.labels, memory.labels)
    assert torch.equal(other.centroids, memory.centroids)
    with pytest.raises(RuntimeError, match="wants epoch, labels and centroids"):
        other.load_state_dict({"centroids": torch.zeros(1)})


@pytest.mark.parametrize("rows", [1, 256, 257, 1000, 5000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_whole_batches_and_make_the_whole(rows, ranks):
    parts = [range(rows)[share(rows, rank, ranks)] for rank in range(ranks)]
    assert [row for part in parts for row in part] == list(range(rows))
    assert all(part.start % 256 == 0 for part in parts if len(part))


def steps(rank: int = 0, world: int = 1) -> dict:
    """Four batches of 6 clusters with 4 images, of which process `rank` of `world` has its share."""
    told = {}
    for name in MOVES:
        memory = ClusterMemory(ClusterMemoryConfig(update=name))
        memory.begin(0, np.arange(6), directions(6, 8, seed=0))
        for number in range(4):
            features = directions(24, 8, seed=number + 1)
            labels = torch.arange(6).roll(number).repeat_interleave(4)
            mine = slice(rank * 24 // world, (rank + 1) * 24 // world)
            memory.loss(features[mine], labels[mine])
            memory.move()
        told[name] = memory.centroids.flatten().tolist()
    return told


def both(out: Path) -> None:
    """What a process that torchrun started does; the first one writes."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = steps(rank, world)
    everybody = [None] * world
    dist.all_gather_object(everybody, found)
    assert all(each == found for each in everybody), "the processes have drifted apart"
    assert by_first(lambda: rank + 40) == 40, "the first process answers for all"
    try:
        by_first(refuse)
    except UserError as error:
        found["error"] = str(error)
    everybody = [None] * world
    dist.all_gather_object(everybody, found.get("error"))
    if rank == 0:
        out.write_text(json.dumps({"world": world, "errors": everybody, **found}))
    dist.barrier()


def refuse() -> None:
    raise UserError("nothing to learn")


def test_two_processes_have_the_memory_of_one(tmp_path):
    told = small.on_two_processes(__file__, tmp_path / "told.json")
    assert told["world"] == 2
    assert told["errors"] == ["nothing to learn"] * 2, "an error of the first process is one of all"
    for name, values in steps().items():
        assert told[name] == values, "to the last bit: each process applies the whole batch in its order"


if __name__ == "__main__":
    both(Path(sys.argv[1]))
    os._exit(0)  # after collectives on gloo, torch now and then aborts when the interpreter takes its threads down
