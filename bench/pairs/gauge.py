"""How fast a device multiplies matrices, to read the speed of a model against."""

import time

import torch
import torch.nn.functional as F

LONG_ENOUGH_S = 0.2


def gemm_rate(dtype: torch.dtype, rows: int, width: int, device: torch.device | str = "cpu") -> float:
    """FLOP/s of a linear layer of a block's MLP: [rows, width] -> [rows, 4 width]. rows: tokens of a batch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).to(device, dtype)
    weight = torch.randn(4 * width, width, generator=generator).to(device, dtype)
    cuda, times, took = x.device.type == "cuda", 4, 0.0
    with torch.no_grad():
        for _ in range(2):
            F.linear(x, weight)
        while took < LONG_ENOUGH_S:
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(times):
                F.linear(x, weight)
            if cuda:
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            if took < LONG_ENOUGH_S:
                times = int(times * 1.2 * LONG_ENOUGH_S / max(took, 1e-6)) + 1
    return times * 2 * rows * width * 4 * width / took
