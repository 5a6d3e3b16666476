"""Two processes that really are two (gloo, on the CPU) see the same samples and learn the same as one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch

from pretrain.backbone import Backbone, timm_arguments
from pretrain.batch import Batch
from pretrain.config import PretrainConfig
from pretrain.loader import MicroBatches, ViewMaker, build_loader
from recipes.load import load
from shards.order import Order
from shards.reader import ShardReader

# 8 steps; a full state after each fourth
SETTINGS = ["schedules.epochs=1", "checkpoint.every_epochs=0.5"]
LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
}
PORTS = {"accelerate": "--main_process_port", "torchrun": "--master_port"}


def launch(launcher: str, command: list[str]) -> str:
    """Run an entry script by a launcher as two processes; returns what they print."""
    prefix = [sys.executable, "-m", *LAUNCHERS[launcher], PORTS[launcher], small.free_port()]
    environment = small.environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run([*prefix, *command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


@pytest.fixture(scope="module")
def one(tmp_path_factory, crops) -> Path:
    """A pretraining by one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    assert small.run(small.arguments("pretrain/run.py", out, crops, *SETTINGS)) == 0
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory, crops) -> Path:
    """The same by two processes, started by the line of the README."""
    out = tmp_path_factory.mktemp("two") / "run"
    printed = launch("accelerate", small.arguments("pretrain/run.py", out, crops, *SETTINGS))
    assert "2 process(es) x 1 micro-batch(es) x 8 images" in printed
    assert small.json_of(out / "environment.json")["processes"] == 2
    return out


def losses(out: Path) -> list[float]:
    return [line[term] for line in small.metrics(out) for term in ("loss", "loss_cls", "loss_patch")]


@pytest.mark.row("R4")
def test_two_processes_start_where_one_does(one, two):
    assert losses(two)[:3] == pytest.approx(losses(one)[:3], rel=1e-5)


@pytest.mark.row("R4")
def test_two_processes_learn_the_same(one, two):
    assert len(losses(two)) == 3 * 8
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    ours, theirs = (small.metrics(out)[-1] for out in (two, one))
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_two_processes_that_accumulate_learn_the_same(one, crops, tmp_path):
    given = small.arguments("pretrain/run.py", tmp_path / "run", crops, *SETTINGS, "loader.batch_per_device=4")
    assert "2 process(es) x 2 micro-batch(es) x 4 images" in launch("accelerate", given)
    # Sinkhorn-Knopp balances the batch of a forward pass, so with smaller ones its targets are others
    assert losses(tmp_path / "run")[:3] == pytest.approx(losses(one)[:3], rel=0.05)
    assert len(losses(tmp_path / "run")) == 3 * 8


@pytest.mark.row("R4")
def test_one_process_goes_on_where_two_stopped(one, two, crops, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(two, out)
    shutil.rmtree(out / "checkpoints" / f"samples-{128:012d}")
    assert small.run(small.arguments("pretrain/run.py", out, crops, *SETTINGS)) == 0
    assert losses(out)[: 3 * 4] == losses(two)[: 3 * 4]
    assert losses(out) == pytest.approx(losses(one), rel=1e-3)


def rows_of_steps(config: PretrainConfig, rank: int, ranks: int) -> list[Batch]:
    """The micro-batches that the loader of one process gives for steps 6 to 9, across the end of an epoch."""
    reader = ShardReader(config.loader.shards, config.loader.splits)
    backbone = Backbone(timm_arguments(config.backbone, config.views.global_size))
    order, recipes = (
        Order(reader.shard_sizes, config.seed, config.order),
        (config.views, config.photometric, config.masks),
    )
    maker = ViewMaker(reader, order, config.seed, recipes, backbone.grid, len(backbone.drops))
    sampler = MicroBatches((6, 10), config.loader.batch, config.loader.batch // ranks, rank, ranks)
    return list(build_loader(maker, sampler, config.loader, pin=False))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.row("R4")
def test_the_samples_of_a_step_do_not_depend_on_the_processes(crops, ranks):
    given = [f"loader.shards=[{crops}]", *small.PRETRAIN]
    config = load(PretrainConfig, "pretrain/smoke.yaml", given)
    parts = [rows_of_steps(config, rank, ranks) for rank in range(ranks)]
    for step, whole in enumerate(rows_of_steps(config, 0, 1)):
        shares = [part[step] for part in parts]
        for rank, share in enumerate(shares):
            # a rank takes every ranks-th sample, with the same views, numbers and masks
            for name in ("global_crops", "local_crops", "boxes", "masks", "global_drops"):
                assert torch.equal(getattr(share, name), getattr(whole, name)[:, rank::ranks])
        assert sorted(torch.cat([share.rows for share in shares]).tolist()) == sorted(whole.rows.tolist())


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.LABELLED)


def test_a_fine_tune_by_two_processes(people, tmp_path):
    printed = launch("torchrun", small.arguments("finetune/run.py", tmp_path / "two", people, ckpt="none"))
    assert small.json_of(tmp_path / "two" / "environment.json")["processes"] == 2
    assert printed.count("mAP") == 1, "only the main process evaluates and prints"
    assert small.run(small.arguments("finetune/run.py", tmp_path / "one", people, ckpt="none")) == 0
    ours, theirs = small.metrics(tmp_path / "two"), small.metrics(tmp_path / "one")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    # the triplets are mined among the images of one process, so only the identity term is the same
    assert ours[0].keys() == theirs[0].keys()
    results = small.json_of(tmp_path / "two" / "results.json")
    assert results["valid"] == 24
