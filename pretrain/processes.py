"""The processes of a run, started by `accelerate launch` or `torchrun`."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from recipes.errors import UserError

# of a collective. Long, because the main process may pack a set while the others wait; once the training runs, ranks.py
# gives up far earlier
PATIENCE = timedelta(hours=6)


def _meet_again() -> None:
    """Make the group of processes that torchrun has started once more, where accelerate would make it.

    torchrun keeps the store in which the processes meet, and torch looks there for addresses by names that are the same
    after a restart: it may find those of the dead and never come together (seen with torch 2.15, gloo). So the names
    get the number of the restart. Each machine counts its own restarts, so only a launch on one machine can do this.
    """
    restarts, world = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("WORLD_SIZE", "1")
    if restarts == "0" or world == "1" or os.environ.get("LOCAL_WORLD_SIZE") != world or dist.is_initialized():
        return
    cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.cuda.is_available()
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    named = dist.PrefixStore(f"restart-{restarts}", store)
    dist.init_process_group("gloo" if cpu else "nccl", store=named, rank=rank, world_size=size, timeout=PATIENCE)


def start(precision: str, **settings: Any) -> Accelerator:
    """An Accelerator that knows all processes of the launch. precision: "no" or "bf16".

    Without ACCELERATE_USE_CPU=true the launcher's CPU processes do not find each other: each would run alone and
    overwrite the others' files. That is refused here.
    """
    if precision == "bf16":
        torch.backends.cuda.matmul.allow_tf32 = True  # what stays float32 then (prototypes) keeps 10 bits of mantissa
    _meet_again()
    group = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[group], **settings)
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != accelerator.num_processes:
        raise UserError(
            f"the launcher started {wanted} processes, but they do not work together; on CPUs start them with "
            f"`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {wanted} ...`"
        )
    return accelerator


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, static: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Both for all processes. Every step uses every parameter, which `static` tells torch; its static graph does not go
    with the pause of the all-reduce in accumulation."""
    accelerator.ddp_handler = DistributedDataParallelKwargs(static_graph=static, gradient_as_bucket_view=True)
    return accelerator.prepare(model, optimizer)


def end(accelerator: Accelerator) -> None:
    """Leave the group of processes, also after an error: one that only dies may take the others down."""
    accelerator.free_memory()  # a model wrapped for several processes must go before its group: torch may abort at exit
    accelerator.end_training()


@contextlib.contextmanager
def running(precision: str, **settings: Any) -> Iterator[Accelerator]:
    """`start` at the beginning of the block, `end` at its end, also after an error."""
    accelerator = start(precision, **settings)
    try:
        yield accelerator
    finally:
        end(accelerator)
