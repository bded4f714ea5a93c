"""What this machine's devices are called, and what they reach in a matrix product measured on the spot."""

from __future__ import annotations

import math
import time

import torch


def device_name(device: str) -> str:
    """What torch calls this process's device: a GPU's name, else `cpu` or `mps`."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def measure_matmul(device: str, precision: str, *, limit_s: float = 0.5) -> float:
    """FLOP/s of square matrix products on one device with the threads torch is set to, best of many.

    The best time and not the mean: what the device can do, whatever else runs on it just now. No random
    state of anybody's is used.
    """
    dtype = getattr(torch, precision)
    n = 8192 if device == "cuda" else 1024
    draws = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=draws).to(device, dtype) for _ in range(2))
    synchronise = getattr(torch, device).synchronize if device in ("cuda", "mps") else lambda: None
    best = math.inf
    started = time.perf_counter()
    for _ in range(3):  # let clocks rise and libraries choose their kernels
        torch.mm(a, b)
    synchronise()
    while time.perf_counter() - started < limit_s or best == math.inf:
        before = time.perf_counter()
        torch.mm(a, b)
        synchronise()
        best = min(best, time.perf_counter() - before)
    return 2 * n**3 / best
