"""What a run leaves behind when it stops because its values are not finite: OUT/faults/step-<n>-rank-<r>.json.

Each process writes its own, because the fault may be on one of them alone. What it needs of the last steps is kept as
it lies, most of it on the device; it is read when the run stops, and not before.
"""

import json
import math
import socket
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recipes.whole import plain, write_text

FOLDER = "faults"
KEPT = 32  # steps that are told


class Step(NamedTuple):
    """What is kept of a step."""

    number: int
    rows: list[Tensor]  # int64 [B] on the host, of each micro-batch of this process
    names: Sequence[str]  # n, of the next two
    own: Tensor  # float32 [n], of this process
    means: Tensor  # float32 [n], over all processes


Recent = deque[Step]


def recent() -> Recent:
    """Room for the last steps."""
    return deque(maxlen=KEPT)


def _told(value: float) -> float | str:
    """JSON has no nan and no inf."""
    return value if math.isfinite(value) else str(value)


def _norms(norms: Mapping[str, Tensor]) -> dict[str, float | str]:
    """By name; those that are not finite first, then the longest."""
    if not norms:
        return {}
    values = dict(zip(norms, torch.stack(tuple(norms.values())).tolist(), strict=True))
    order = sorted(values, key=lambda name: (math.isfinite(values[name]), -abs(values[name])))
    return {name.removeprefix("module."): _told(values[name]) for name in order}  # DDP puts that before


def _state(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """How many numbers are not finite in each parameter and buffer that has any."""
    found = {}
    for part, module in modules.items():
        for name, tensor in module.state_dict().items():
            if count := int((~torch.isfinite(tensor)).sum()):
                found[f"{part}.{name}"] = count
    return found


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(value))


@torch.no_grad()
def first_broken(module: nn.Module, batch: Any) -> str | None:
    """Name of the first part inside `module` that makes something that is not finite out of finite inputs on a batch;
    None where all is finite. It runs the forward pass once more, so all processes have to call it together."""
    found: list[str] = []

    def look(name: str) -> Any:
        def after(_: nn.Module, given: Any, made: Any) -> None:
            if not found and _finite(given) and not _finite(made):
                found.append(name)

        return after

    hooks = [part.register_forward_hook(look(name)) for name, part in module.named_modules() if name]
    try:
        made = module(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None if _finite(made) else "outside of its parts"


def write(
    out: Path,
    rank: int,
    steps: Recent,
    scheduled: Mapping[str, Any],
    norms: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    broken: Mapping[str, str | None],
) -> Path:
    """Write the dump of this process; returns its path. OSError where the disk does not take it.

    scheduled: the values of the last step. norms: [] of the gradient of each parameter in it, by name. broken: by
    network, what `first_broken` says of the last batch.
    """
    last = steps[-1].number
    path = out / FOLDER / f"step-{last}-rank-{rank}.json"
    told = []
    for step in steps:
        own, means = (
            dict(zip(step.names, map(_told, given.tolist()), strict=True)) for given in (step.own, step.means)
        )
        rows = [row for part in step.rows for row in part.tolist()]
        wrong = [name for name, value in means.items() if isinstance(value, str)]
        told.append({"step": step.number, "not_finite": wrong, "own": own, "mean": means, "rows": rows})
    whole = {
        "step": last,
        "rank": rank,
        "host": socket.gethostname(),
        "scheduled": plain(dict(scheduled)),
        "not_finite_first_in": dict(broken),
        "not_finite_in_state": _state(modules),
        "gradient_norms": _norms(norms),
        "steps": told,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # one line an entry, and one a step: indented, the rows alone would fill thousands
    parts = {name: json.dumps(value, allow_nan=False) for name, value in whole.items() if name != "steps"}
    parts["steps"] = "[\n  " + ",\n  ".join(json.dumps(step, allow_nan=False) for step in told) + "\n]"
    write_text(path, "{\n" + ",\n".join(f'"{name}": {text}' for name, text in parts.items()) + "\n}\n")
    return path
