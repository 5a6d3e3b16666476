"""Where the time of a step goes: self time of its operations by kind, from torch.profiler."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = ("GEMM", "attention", "softmax + loss", "elementwise, norms", "optimiser", "clip", "EMA", "copies", "compiled")
SCOPES = {"EMA": "EMA", "clip": "clip", "Optimizer.step": "optimiser", "Optimizer.zero_grad": "optimiser"}
PRODUCTS = ("mm", "addmm", "addmm_", "linear", "linear_backward", "convolution", "convolution_backward", "baddbmm")
COPIES = {
    *("copy_", "_to_copy", "to", "clone", "contiguous", "cat", "stack", "index", "index_put_", "_index_put_impl_"),
    *("index_select", "index_add", "index_add_", "repeat", "repeat_interleave", "split", "nonzero", "masked_fill_"),
    *("slice_backward", "select_backward", "gather", "scatter_add_", "zero_", "zeros", "fill_", "expand", "narrow"),
}


def kind_of(name: str, scopes: Iterable[str], widths: Iterable[int], prototypes: int) -> str:
    """The kind of an operation.

    name: torch's, as "aten::mm". scopes: names of what it runs in, the innermost first. widths: last dimensions of its
    inputs. prototypes: K; what has this width and is no product of matrices belongs to the losses.
    """
    for scope in (name, *scopes):
        for start, kind in SCOPES.items():
            if scope.startswith(start):
                return kind
    plain = name.removeprefix("aten::")
    if (
        "attention" in plain or "attn" in plain or plain == "bmm"
    ):  # linear layers are mm and addmm; batched products are attention's
        return "attention"
    if plain in PRODUCTS or "mkldnn" in plain or "gemm" in plain:
        return "GEMM"
    if name.startswith(("Torch-Compiled", "## Call Compiled", "triton", "graph_", "CompiledFunction")):
        return "compiled"
    if prototypes in widths or "log_softmax" in plain or plain == "logsumexp":
        return "softmax + loss"
    if "softmax" in plain:
        return "attention"
    return "copies" if plain in COPIES else "elementwise, norms"


def _widths(event: Any) -> list[int]:
    return [shape[-1] for shape in event.input_shapes or () if isinstance(shape, list | tuple) and shape]


def _parents(event: Any) -> Iterable[str]:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event.name


def by_kind(work: Callable[[], Any], prototypes: int, cuda: bool) -> dict[str, float]:
    """ms of one call of `work` by kind; on a GPU of its kernels, else of the threads that start the operations.

    What is missing to the wall-clock time is Python, and on a GPU waiting.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as found:
        work()
        if cuda:
            torch.cuda.synchronize()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in found.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, which counts where it was started
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if own > 0:
            spent[kind_of(event.name, _parents(event), _widths(event), prototypes)] += own / 1000
    return spent


def table(spent: dict[str, dict[str, float]]) -> str:
    """The kinds of several ways side by side, in ms and as shares of each way. spent: way -> kind -> ms."""
    lines = [f"{'':20}" + "".join(f"{way:>22}" for way in spent)]
    sums = {way: sum(kinds.values()) or 1.0 for way, kinds in spent.items()}
    for kind in KINDS:
        cells = "".join(f"{kinds[kind]:13.1f} ms {kinds[kind] / sums[way]:5.0%}" for way, kinds in spent.items())
        if any(kinds[kind] for kinds in spent.values()):
            lines.append(f"{kind:20}{cells}")
    return "\n".join(
        [*lines, f"{'all operations':20}" + "".join(f"{total:13.1f} ms {1:5.0%}" for total in sums.values())]
    )
