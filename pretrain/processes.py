"""The processes of a run, started by `accelerate launch` or `torchrun`."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from recipes.errors import UserError

# of a collective. Long, because the main process may pack a set while the others wait; once the training runs, ranks.py
# gives up far earlier
PATIENCE = timedelta(hours=6)


def start(precision: str, **settings: Any) -> Accelerator:
    """An Accelerator that knows all processes of the launch. precision: "no" or "bf16".

    Without ACCELERATE_USE_CPU=true the launcher's CPU processes do not find each other: each would run alone and
    overwrite the others' files. That is refused here.
    """
    if precision == "bf16":
        torch.backends.cuda.matmul.allow_tf32 = True  # what stays float32 then (prototypes) keeps 10 bits of mantissa
    group = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[group], **settings)
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != accelerator.num_processes:
        raise UserError(
            f"the launcher started {wanted} processes, but they do not work together; on CPUs start them with "
            f"`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {wanted} ...`"
        )
    return accelerator


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
