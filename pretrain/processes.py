"""The processes of a run, started by `accelerate launch` or `torchrun`."""

import os
from typing import Any

from accelerate import Accelerator

from recipes.errors import UserError


def start(precision: str, **settings: Any) -> Accelerator:
    """An Accelerator that knows all processes of the launch. precision: "no" or "bf16".

    Without ACCELERATE_USE_CPU=true the launcher's CPU processes do not find each other: each would run alone and
    overwrite the others' files. That is refused here.
    """
    accelerator = Accelerator(mixed_precision=precision, **settings)
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != accelerator.num_processes:
        raise UserError(
            f"the launcher started {wanted} processes, but they do not work together; on CPUs start them with "
            f"`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {wanted} ...`"
        )
    return accelerator
