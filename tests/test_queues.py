"""The three queues and the momentum encoders: ring, exclusion, arithmetic, and the same on all processes.

As a script, which torchrun starts twice, this file is two of these processes.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import small
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from finetune import backbones
from finetune.methods import build
from finetune.methods.base import ImageBatch, Parts
from finetune.momentum_encoders import MomentumEncoders
from finetune.queues import NOBODY, Queues, QueuesConfig, ring_write
from finetune.sampling import SamplingConfig


def directions(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_ring_by_hand():
    queue = torch.zeros(5, dtype=torch.int64)
    ring_write(queue, 0, torch.tensor([1, 2, 3]))
    assert queue.tolist() == [1, 2, 3, 0, 0]
    ring_write(queue, 3, torch.tensor([4, 5, 6]))
    assert queue.tolist() == [6, 2, 3, 4, 5]
    ring_write(queue, 1, torch.arange(10, 17))
    assert queue.tolist() == [14, 15, 16, 12, 13], "of more than it holds the last ones, where they would have come"


def test_queues_begin_with_directions_of_nobody():
    queues = Queues(QueuesConfig(size=50), 16, seed=3)
    assert (queues.ids == NOBODY).all()
    for queue in (queues.images, queues.texts):
        torch.testing.assert_close(queue.norm(dim=1), torch.ones(50))
    assert (queues.images - queues.texts).abs().mean() > 0.1
    assert torch.equal(queues.images, Queues(QueuesConfig(size=50), 16, seed=3).images)
    assert queues.negatives(torch.tensor([0, 1])).all(), "whom nobody knows is a negative of all"


def test_keys_of_anybody_in_the_batch_are_no_negatives():
    queues = Queues(QueuesConfig(size=6), 4, seed=0)
    queues.remember(directions(4, 4, seed=1), directions(4, 4, seed=2), torch.tensor([7, 8, 9, 8]))
    queues.push()
    assert queues.ids.tolist() == [7, 8, 9, 8, NOBODY, NOBODY]
    assert queues.negatives(torch.tensor([8, 5])).tolist() == [True, False, True, False, True, True]


def test_keys_stand_beside_each_other_and_the_oldest_go():
    queues = Queues(QueuesConfig(size=5), 4, seed=0)
    for step in range(3):
        images, texts = directions(2, 4, seed=step), directions(2, 4, seed=step + 10)
        queues.remember(images, texts, torch.tensor([2 * step, 2 * step + 1]))
        before = queues.images.clone()
        assert torch.equal(queues.images, before), "a batch is no negative of its own"
        queues.push()
    assert queues.ids.tolist() == [5, 1, 2, 3, 4]
    assert queues.at == 1
    torch.testing.assert_close(queues.images[0], directions(2, 4, seed=2)[1])
    torch.testing.assert_close(queues.texts[4], directions(2, 4, seed=12)[0])
    queues.push()
    assert queues.at == 1, "a batch is pushed once"


def test_the_state_comes_back():
    ours, theirs = Queues(QueuesConfig(size=5), 4, seed=0), Queues(QueuesConfig(size=5), 4, seed=1)
    ours.remember(directions(3, 4, seed=1), directions(3, 4, seed=2), torch.tensor([1, 2, 3]))
    ours.push()
    theirs.load_state_dict({name: value.clone() for name, value in ours.state_dict().items()})
    for name, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value)
    for wrong in ({"images": ours.images}, Queues(QueuesConfig(size=6), 4, seed=0).state_dict()):
        with pytest.raises(RuntimeError, match="the queues want"):
            theirs.load_state_dict(wrong)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_momentum_by_hand_and_only_for_what_is_trained():
    source = net()
    source[2].requires_grad_(False)
    moving = MomentumEncoders({"net": source}, momentum=0.9)
    old = {name: value.clone() for name, value in source.named_parameters()}
    with torch.no_grad():
        for value in source.parameters():
            value.add_(1.0)
    moving.update()
    for name, value in moving["net"].named_parameters():
        wanted = 0.9 * old[name] + 0.1 * (old[name] + 1) if not name.startswith("2.") else old[name]
        torch.testing.assert_close(value, wanted)
        assert not value.requires_grad
    moving.update()
    torch.testing.assert_close(moving["net"][0].bias, old["0.bias"] + 1 - 0.9**2)


def test_a_copy_keeps_statistics_of_its_own_and_leaves_the_source_alone():
    source = net()
    moving = MomentumEncoders({"net": source}, momentum=0.5)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    moving.copies.train()
    moving["net"](torch.randn(8, 3) + 5)
    moving.update()
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert not torch.equal(moving["net"][1].running_mean, source[1].running_mean)
    again = MomentumEncoders({"net": net()}, momentum=0.5)
    again.load_state_dict(moving.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in moving.state_dict().items())


def steps(rank: int = 0, world: int = 1) -> dict[str, list]:
    """Five batches of 6 keys in queues of 8, of which process `rank` of `world` has its share."""
    queues = Queues(QueuesConfig(size=8), 4, seed=0)
    excluded = []
    for number in range(5):
        images, texts = directions(6, 4, seed=number), directions(6, 4, seed=number + 50)
        labels = (torch.arange(6) // 2 + number) % 4
        mine = slice(rank * 6 // world, (rank + 1) * 6 // world)
        excluded.append(queues.negatives(labels).tolist())
        queues.remember(images[mine], texts[mine], labels[mine])
        queues.push()
    state = {name: value.flatten().tolist() for name, value in queues.state_dict().items()}
    return {**state, "excluded": excluded}


def training(rank: int = 0, world: int = 1) -> list[float]:
    """Sums over the weights, and the keys, after three steps of the method on 8 pairs of four people, of which process
    `rank` of `world` has its share; the gradients are averaged over the processes as torch does."""
    torch.manual_seed(0)
    size = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    config = backbones.BackboneConfig(name="vit_tiny_patch16_224", **size)
    backbone = backbones.build(backbones.arguments_of(config, (16, 16)))
    section = {"name": "text_search", "dim": 8, "word_table": {"dim": 4}, "text_encoder": {"hidden": 4}}
    section |= {"queues": {"size": 12}, "cross_modal_losses": {"sdm_weight": 0.1}}
    sampling = SamplingConfig(identities_per_batch=4, images_per_identity=2)
    captions = [("red coat",), ("a red coat",), ("blue",), ("blue jeans",), ("bag",), ("a bag",), ("hat",), ("a hat",)]
    method = build(section, Parts(backbone, 4, 0, sampling, 0, lambda: captions)).train()
    labels, optimizer = torch.arange(4).repeat_interleave(2), torch.optim.SGD(method.parameters(), lr=0.05)
    words, mine = torch.from_numpy(method.sentences.numbers), slice(rank * 8 // world, (rank + 1) * 8 // world)
    for step in range(3):
        images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        none = torch.zeros(len(labels[mine]), method.draws)
        batch = ImageBatch(images[mine], labels[mine], none, labels[mine], words[mine])
        optimizer.zero_grad()
        sum(method(batch).values()).backward()
        for weight in method.parameters():
            if world > 1 and weight.grad is not None:
                dist.all_reduce(weight.grad)
                weight.grad /= world
        optimizer.step()
        method.end_step()
    sums = [weight.detach().double().square().sum().item() for weight in method.parameters()]
    return sums + method.queues.images.flatten().tolist() + method.queues.texts.flatten().tolist()


def both(out: Path) -> None:
    """What a process that torchrun started does; the first one writes."""
    dist.init_process_group("gloo")
    found = steps(dist.get_rank(), dist.get_world_size()) | {
        "trained": training(dist.get_rank(), dist.get_world_size())
    }
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found)
    assert all(each == found for each in everybody), "the processes have drifted apart"
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"world": len(everybody), **found}))
    dist.barrier()


def test_two_processes_have_the_queues_of_one_and_learn_the_same(tmp_path):
    told = small.on_two_processes(__file__, tmp_path / "told.json")
    assert told.pop("world") == 2
    # losses over pairs see the whole batch, so two processes learn what one does
    assert told.pop("trained") == pytest.approx(training(), rel=1e-4, abs=1e-5)
    assert told == steps(), "to the last bit: each process writes the whole batch in its order"


if __name__ == "__main__":
    both(Path(sys.argv[1]))
    os._exit(0)  # after collectives on gloo, torch now and then aborts when the interpreter takes its threads down
