"""Drawn sets and settings so small that a test can run whole entry scripts on them."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from pretrain import checkpoint
from shards.assembly import build_set
from shards.images import ImagesConfig
from shards.packing import PackingConfig

ROOT = Path(__file__).resolve().parent.parent
UNLABELED = {"role": "unlabeled", "identities": 32, "images_per_identity": 4}  # 128 images
LABELLED = {"role": "reid", "identities": 24, "train_identities": 12, "images_per_identity": 5}  # 60 train, 60 test

VIT = ["backbone.embed_dim=32", "backbone.depth=2", "backbone.num_heads=2"]
# 8 steps of 16 an epoch on UNLABELED; a quick teacher, so that the loss falls within 20 steps
PRETRAIN = [
    *("loader.draw=null", "loader.batch=16", "loader.batch_per_device=16", "loader.workers=0", "views.local_count=2"),
    *(
        "masks.ratios=[0.3]",
        "masks.spreads=[0.2]",
        "heads.out_dim=64",
        "heads.hidden_dim=32",
        "heads.bottleneck_dim=256",
    ),
    *("schedules.lr=0.016", "schedules.momentum=0.9", "schedules.momentum_end=0.9", "log_every=1", *VIT),
    "pictures.images=0",  # tests/test_showing.py has them
]
FINETUNE = [
    *("benchmark.draw=null", "benchmark.workers=0", "sampling.identities_per_batch=4", "benchmark.strips=2"),
    *("optim.epochs=2", "optim.warmup_epochs=0", "log_every=1", *VIT),
]


def drawn(base: Path, figures: dict[str, Any]) -> Path:
    """A set of drawn people 64 x 32 below `base`, made on the first call."""
    folder = base / f"drawn-{figures['role']}"
    if not folder.exists():
        source = {"name": "figures", "cameras": 2, "height": 64, "width": 32, **figures}
        build_set([source], folder, PackingConfig(shard_samples=50), ImagesConfig())
    return folder


def arguments(script: str, out: Path, data: Path, *more: str, ckpt: Path | str | None = None) -> list[str]:
    """The command line of an entry script on the set `data`; the overrides `more` come after those of this file."""
    if script.startswith("pretrain"):
        recipe, given = "recipes/pretrain/smoke.yaml", [f"loader.shards=[{data}]", *PRETRAIN]
    else:
        recipe, given = "recipes/finetune/figures.yaml", [f"benchmark.shards={data}", *FINETUNE]
    start_from = [] if ckpt is None else ["--ckpt", str(ckpt)]
    return [str(ROOT / script), "--recipe", recipe, "--out", str(out), *start_from, *given, *more]


def run(command: list[str]) -> int:
    """Run an entry script in this process as the interpreter would; returns its exit status."""
    before, threads = sys.argv, torch.get_num_threads()
    sys.argv = command
    torch.set_num_threads(1)  # as in `environment`, for equal bits
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as exit_:
        return int(exit_.code or 0)
    finally:
        sys.argv = before
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)  # else the next script inherits this one's precision
    return 0


def interrupted_and_gone_on(command: list[str]) -> None:
    """Run an entry script that is interrupted after the first state that it writes, then again to its end."""
    original = checkpoint.write_state

    def stopping(*arguments: Any) -> None:
        original(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "write_state", stopping)
        assert run(command) == 130
    assert run(command) == 0


def environment(**more: str) -> dict[str, str]:
    """Variables for a process of its own: one thread, as in `make test`."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def free_port() -> str:
    """A port for processes to meet at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def start(command: list[str], **variables: str) -> subprocess.Popen:
    """Start an entry script in a process group of its own; text pipes."""
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
        start_new_session=True,
    )


def on_two_processes(script: str, out: Path) -> dict[str, Any]:
    """Run a Python file with the argument `out` on two processes of torchrun; what it wrote there as JSON."""
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    variables = environment(PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true")
    command = [sys.executable, "-m", *launcher, script, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json_of(out)


def json_of(path: Path) -> Any:
    """Content of a JSON file."""
    return json.loads(path.read_text())


def complete_lines(out: Path) -> list[str]:
    """The lines of metrics.jsonl that have their end, of a run that may be under way."""
    path = out / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.is_file() else []


def metrics(out: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in complete_lines(out)]


def repeatable(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    """Lines without what depends on the clock."""
    return [
        {key: value for key, value in line.items() if key not in ("images_per_s", "data_wait", "mfu")} for line in lines
    ]
