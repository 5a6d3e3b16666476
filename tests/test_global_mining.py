"""Two processes that mine their triplets together learn what one learns from the whole batch.

As a script, which torchrun starts twice, this file is the two processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from finetune.id_losses import IdLosses, IdLossesConfig


class Model(nn.Module):
    """A network without BatchNorm, whose statistics would be those of a process."""

    def __init__(self, mining: str):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.classifier = nn.Linear(4, 4, bias=False)
        self.losses = IdLosses(IdLossesConfig(mining=mining, label_smoothing=0.1, centre_weight=0.05), 4, 4)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        return self.losses(self.classifier(features), features, labels)


def train(mining: str, rank: int = 0, world: int = 1) -> dict:
    """Four steps of process `rank` of `world`: the losses of each (id, triplet, centre) and what was learned."""
    images = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(4).repeat_interleave(4)
    mine = slice(rank * 16 // world, (rank + 1) * 16 // world)
    model, told = Model(mining), []
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        losses = wrapped(images[mine], labels[mine])
        sum(losses.values()).backward()
        optimizer.step()
        model.losses.end_step()
        values = torch.stack([value.detach() for value in losses.values()])
        if world > 1:
            dist.all_reduce(values)
        told.append((values / world).tolist())
    return {"losses": told, "state": {name: value.flatten().tolist() for name, value in model.state_dict().items()}}


def both(out: Path) -> None:
    """What a process that torchrun started does: train each way, compare with the others; the first one writes."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {mining: train(mining, rank, world) for mining in ("global", "local")}
    everybody = [None] * world
    dist.all_gather_object(everybody, found)
    assert all(each == found for each in everybody), "the processes have drifted apart"
    if rank == 0:
        out.write_text(json.dumps({"world": world, **found}))
    dist.barrier()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("mining") / "told.json"
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", small.free_port()]
    command = [sys.executable, "-m", *launcher, __file__, str(out)]
    environment = small.environment(PYTHONPATH=str(small.ROOT))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    told = small.json_of(out)
    assert told["world"] == 2
    return {"one": train("local"), **told}


def test_global_mining_by_two_is_that_of_one(runs):
    one, two = runs["one"], runs["global"]
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-6)
    assert one["state"].keys() == two["state"].keys()
    assert "losses.centres.centres" in one["state"]
    for name, values in one["state"].items():
        torch.testing.assert_close(torch.tensor(two["state"][name]), torch.tensor(values), rtol=1e-4, atol=1e-6)


def test_local_mining_finds_other_triplets(runs):
    one, two = torch.tensor(runs["one"]["losses"][0]), torch.tensor(runs["local"]["losses"][0])
    torch.testing.assert_close(two[[0, 2]], one[[0, 2]])  # cross-entropy and centre loss are means over images
    # with half of the identities the nearest other one is farther away, and the loss smaller
    assert two[1] < one[1] - 1e-3


if __name__ == "__main__":
    both(Path(sys.argv[1]))
    os._exit(0)  # after DDP on gloo, torch now and then aborts when the interpreter takes its threads down
