"""What devices can do: peak rates of known GPUs, how fast this CPU multiplies matrices, how many views a core makes."""

import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch

from pretrain.views import ViewsConfig
from recipes.errors import UserError

# assumptions, no measurements of the machine at hand
GPU_SHARE = (0.25, 0.40)  # of its peak that a GPU reaches in such trainings (ViT-L of DINOv2 and DINOv3: 24 to 44 %)
CPU_SHARE = (0.15, 0.45)  # of the rate of plain matrix products, seen on one kind of CPU
# numbers of output that a core makes a second, reading and decoding included: docs/results.md, crops of 256 x 128 and
# 96 x 64; there the Pillow reference is 8.6 times slower
PIXELS_A_CORE = {"fast": 105e6, "pil": 12.2e6}
IMAGES_A_CORE = 5000  # a second at most, however small the crops: decoding


class Devices(NamedTuple):
    """What a run is planned for."""

    count: int  # processes, one a device
    name: str
    rates: tuple[float, float] | None  # FLOP/s of one in such a training, from and to; None = unknown
    told: str  # what the rates were taken from
    memory: float  # bytes of one
    gpu: bool
    here: bool  # the run itself has them


class Card(NamedTuple):
    """A GPU as its maker describes it."""

    words: str  # all of them in the device's name, whole words; the first entry that fits counts
    tflops: float  # 10^12 FLOP/s of dense bf16 products with float32 accumulation, without sparsity
    memory: float  # 10^9 bytes; of the larger model where there are two


# From NVIDIA's data sheets, whose figures for Hopper, Blackwell and L4 are doubled by sparsity and so halved here:
# H100 (SXM 1,979, PCIe 1,513, NVL 1,671), H200 (1,979, NVL 1,671), B200 (4,500), L4 (242), A100 (312), A30 (165), A40
# (149.7), A10 (125), L40 (181), L40S (362), V100 (fp16, it has no bf16). From its white papers: GA102 (RTX 3090: 71,
# RTX A6000: 154.8), Ada (RTX 4090: 165.2, RTX 6000 Ada: 364.2), RTX Blackwell (RTX 5090: 209.5). A10G: as Amazon
# gives it for g5 machines.
CARDS = (
    Card("b200", 2250, 180),
    Card("gh200", 989, 96),
    Card("h200 nvl", 835, 141),
    Card("h200", 989, 141),
    Card("h100 nvl", 835, 94),
    Card("h100 pcie", 756, 80),
    Card("h100", 989, 80),
    Card("a100", 312, 80),
    Card("a40", 149.7, 48),
    Card("a30", 165, 24),
    Card("a10g", 70, 24),
    Card("a10", 125, 24),
    Card("l40s", 362, 48),
    Card("l40", 181, 48),
    Card("l4", 121, 24),
    Card("v100", 125, 32),
    Card("rtx 6000 ada", 364, 48),
    Card("rtx a6000", 154.8, 48),
    Card("rtx 5090", 209.5, 32),
    Card("rtx 4090", 165.2, 24),
    Card("rtx 3090", 71, 24),
)
RELATIVES = {"laptop", "mobile", "max", "ti", "super", "d"}
MEASURE_S = 0.5  # seconds that `matrix_rate` takes, less than twice that at most


def find_card(name: str) -> Card | None:
    """The card of a name as torch.cuda.get_device_name gives it, or as people write it ("h100", "RTX 4090").

    None for an unknown one, and for a relative that only adds a word to the name of another card (laptops, Ti).
    """
    words = set(re.findall(r"rtx|[a-z]+\d+[a-z]*|\d+|[a-z]+", name.lower()))
    if words & RELATIVES:
        return None
    return next((card for card in CARDS if set(card.words.split()) <= words), None)


def known_card(name: str) -> Card:
    """The same for a name that a user gave: UserError when it is unknown."""
    card = find_card(name)
    if card is None:
        known = ", ".join(each.words for each in CARDS)
        raise UserError(f"planning.gpu = {name!r} is not known; known are: {known}")
    return card


def peak_flops(name: str) -> float | None:
    """Peak FLOP/s of dense bf16 products of a GPU by the name that torch.cuda.get_device_name gives; None = unknown."""
    card = find_card(name)
    return None if card is None else card.tflops * 1e12


def device_peak(device: torch.device) -> float | None:
    """Peak FLOP/s of the device of a run; None on CPUs and unknown GPUs, where there is no MFU then."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def matrix_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of square matrix products on this CPU with the threads of this process, measured: the best of some."""
    left, right = (torch.rand(size, size).to(dtype) for _ in range(2))
    best, end = float("inf"), time.monotonic() + MEASURE_S
    while True:
        start = time.monotonic()
        left @ right
        now = time.monotonic()
        best = min(best, now - start)
        if now > end:
            return 2 * size**3 / best


def gpus_here(count: int, device: torch.device, bf16: bool) -> Devices:
    """The GPUs of this run, which are all like `device`. count: processes."""
    name = torch.cuda.get_device_name(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    return Devices(count, name, *_gpu_rates(peak_flops(name), bf16), memory, True, True)


def gpus_elsewhere(count: int, name: str, memory: float | None, bf16: bool) -> Devices:
    """GPUs that are not here. name: as people write it. memory: 10^9 bytes, None: the usual size of that card."""
    card = known_card(name)
    memory = card.memory if memory is None else memory
    return Devices(count, card.words.upper(), *_gpu_rates(card.tflops * 1e12, bf16), memory * 1e9, True, False)


def _gpu_rates(peak: float | None, bf16: bool) -> tuple[tuple[float, float] | None, str]:
    if peak is None or not bf16:
        return None, ""
    low, high = GPU_SHARE
    return (low * peak, high * peak), f"{low:.0%} to {high:.0%} of {peak / 1e12:,.0f} TFLOP/s"


def cpus_here(count: int, bf16: bool, measure: bool) -> Devices:
    """This machine without a GPU, shared by `count` processes. measure: find its rate, which takes half a second."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    name = f"CPU process with {torch.get_num_threads()} thread(s)"
    if not measure:
        return Devices(count, name, None, "", memory, False, True)
    found, (low, high) = matrix_rate(torch.bfloat16 if bf16 else torch.float32), CPU_SHARE
    told = f"{low:.0%} to {high:.0%} of the {found / 1e9:,.0f} GFLOP/s of matrix products measured now"
    return Devices(count, name, (low * found, high * found), told, memory, False, True)


def images_a_core(views: ViewsConfig) -> float:
    """Images a second whose views one core is assumed to make."""
    pixels = 2 * math.prod(views.global_size) + views.local_count * math.prod(views.local_size)
    return min(IMAGES_A_CORE, PIXELS_A_CORE[views.backend] / pixels)


def free_bytes(folder: Path) -> int:
    """Free space where the folder is, or will be."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
