"""Collectives over the ranks that training would use, timed as nccl-tests times them.

Conventions (NVIDIA nccl-tests, doc/PERFORMANCE.md): a message of S bytes in time t has algorithm
bandwidth S / t. Bus bandwidth is that times 2 (n - 1) / n for an all-reduce over n ranks and (n - 1) / n
for a reduce-scatter or an all-gather, whose S is all ranks' parts together: what a ring would put on every
link whatever n is, so that it compares with the link's own rate. GB is 1e9 bytes. Times are the slowest
rank's, where nccl-tests averages: training waits for the slowest.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Collective = Literal["all_reduce", "reduce_scatter", "all_gather"]

SMALLEST_BYTES = 1024
WARMUP = 5  # nccl-tests' defaults; both shrink where a message takes long
ITERATIONS = 20
LATENCY_BYTES = 8
LATENCY_ITERATIONS = 100
PATTERN_PERIOD = 13  # of the numbers that check the sums
ELEMENT_BYTES = 4  # float32, as gradients are


ALL_REDUCE_S = 4.0  # a message that takes long is repeated less often
OTHERS_S = 2.0  # what is not advised by, and gloo beside NCCL
CONNECT_S = 60.0  # ranks that do not find each other by then would not in training
HANGS_AFTER_S = 180.0  # a rank that is not done by then ends, and with it the others


def measure_as_rank(device: str, local_rank: int, gradient_bytes: int, result: Path) -> None:
    """All collectives of one trial, as one rank that torchrun started; rank 0 writes them to `result`.

    device  cuda measures NCCL, and then gloo over this machine's memory; anything else gloo alone
    """
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)  # bounds the wait for others
    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=CONNECT_S))
    at = f"cuda:{local_rank}" if cuda else "cpu"
    found: dict[str, Any] = {
        "latency_s": all_reduce_latency(at),
        "all_reduce": curve("all_reduce", at, gradient_bytes, limit_s=ALL_REDUCE_S),
        "reduce_scatter": curve("reduce_scatter", at, gradient_bytes, limit_s=OTHERS_S),
        "all_gather": curve("all_gather", at, gradient_bytes, limit_s=OTHERS_S),
    }
    if cuda:
        found["gloo_all_reduce"] = curve("all_reduce", "cpu", gradient_bytes, limit_s=OTHERS_S)
    if dist.get_rank() == 0:
        result.write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def message_sizes(largest: int, ranks: int = 1) -> list[int]:
    """1 KiB, doubling, up to and with the largest; every size is whole float32 elements for each rank."""
    unit = ELEMENT_BYTES * ranks
    size = -(-SMALLEST_BYTES // unit) * unit
    largest = max(largest // unit * unit, size)
    sizes = []
    while size < largest:
        sizes.append(size)
        size *= 2
    return [*sizes, largest]


def bus_factor(collective: Collective, ranks: int) -> float:
    """What algorithm bandwidth is multiplied with; see the top of this module."""
    return (2 if collective == "all_reduce" else 1) * (ranks - 1) / ranks


def bandwidths(collective: Collective, n_bytes: int, time_s: float, ranks: int) -> dict[str, float]:
    """time_s, algbw_gb_per_s and busbw_gb_per_s of a collective."""
    algorithm = n_bytes / time_s / 1e9
    return {
        "time_s": time_s,
        "algbw_gb_per_s": algorithm,
        "busbw_gb_per_s": algorithm * bus_factor(collective, ranks),
    }


def curve(
    collective: Collective, device: str, largest: int, *, limit_s: float
) -> list[dict[str, Any]]:
    """Time a collective of growing size over the ranks of the default process group.

    device   where the tensors live; the group's backend for it does the work
    largest  bytes of the last message
    limit_s  about how long it may take: big messages get fewer iterations, and when it is spent only
             the last size is still measured
    returns  a row a size: bytes, iterations, time_s, algbw_gb_per_s, busbw_gb_per_s; an all-reduce's
             also n_wrong
    """
    ranks = dist.get_world_size()
    sizes = message_sizes(largest, 1 if collective == "all_reduce" else ranks)
    buffer = torch.empty(sizes[-1] // ELEMENT_BYTES, device=device)
    started = time.perf_counter()
    rows = []
    for index, size in enumerate(sizes):
        left_s = _agreed(limit_s - (time.perf_counter() - started), device)
        last = index == len(sizes) - 1
        if left_s <= 0 and not last:
            continue
        message = buffer[: size // ELEMENT_BYTES]
        # Half of what is left to each of the sizes to come: a bigger message takes longer.
        share_s = max(left_s, 0.0) / (1 if last else 2)
        run = _runner(collective, message)
        message.fill_(0.0)  # repeated sums of zeros cannot overflow
        time_s, iterations = _timed(run, message, share_s, WARMUP, ITERATIONS)
        row = {
            "bytes": size,
            "iterations": iterations,
            **bandwidths(collective, size, time_s, ranks),
        }
        if collective == "all_reduce":
            row["n_wrong"] = _wrong_sums(message)
        rows.append(row)
    return rows


def all_reduce_latency(device: str) -> float:
    """Seconds that the all-reduce of a message of no size to speak of takes."""
    message = torch.zeros(LATENCY_BYTES // ELEMENT_BYTES, device=device)
    return _timed(_runner("all_reduce", message), message, 1.0, WARMUP, LATENCY_ITERATIONS)[0]


def _runner(collective: Collective, message: Tensor) -> Callable[[], Any]:
    """One run of a collective over a message: all ranks' parts together, of which each owns one."""
    if collective == "all_reduce":
        return lambda: dist.all_reduce(message)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    part = message.new_zeros(message.numel() // ranks)
    parts = list(message.chunk(ranks))
    if collective == "reduce_scatter":
        if message.is_cuda:
            return lambda: dist.reduce_scatter_tensor(part, message)
        return lambda: dist.reduce_scatter(part, parts)
    if message.is_cuda:
        return lambda: dist.all_gather_into_tensor(message, parts[rank])
    return lambda: dist.all_gather(parts, part)


def _timed(
    run: Callable[[], Any], message: Tensor, limit_s: float, warmup: int, iterations: int
) -> tuple[float, int]:
    """Seconds of one run, mean of as many of the iterations as the limit allows, slowest rank."""
    device = str(message.device)
    first_s = _agreed(_elapsed(run, message, 1), device)  # also what opens the connections
    if first_s < limit_s / 10:
        first_s = _agreed(_elapsed(run, message, warmup - 1), device) / (warmup - 1)
    fit = int(limit_s / max(first_s, 1e-9))
    iterations = max(1, min(iterations, fit))
    return _agreed(_elapsed(run, message, iterations), device) / iterations, iterations


def _elapsed(run: Callable[[], Any], message: Tensor, iterations: int) -> float:
    dist.barrier()
    _wait_for(message)
    started = time.perf_counter()
    for _ in range(iterations):
        run()
    _wait_for(message)
    return time.perf_counter() - started


def _wait_for(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _agreed(seconds: float, device: str) -> float:
    """The largest value of any rank, so that all of them go on alike."""
    value = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def _wrong_sums(message: Tensor) -> int:
    """Elements of an all-reduce that differ from the sum computed here, over all ranks.

    Rank r sends (i mod 13) + r at element i; the sum over n ranks, n (i mod 13) + n (n - 1) / 2, is
    exact in float32. Filled and compared in chunks: whole temporaries of a big message cost seconds.
    """
    n, rank = dist.get_world_size(), dist.get_rank()
    chunks = message.split(PATTERN_PERIOD << 16)
    pattern = torch.arange(chunks[0].numel(), device=message.device).remainder(PATTERN_PERIOD)
    pattern = pattern.to(message.dtype)
    for chunk in chunks:
        torch.add(pattern[: chunk.numel()], rank, out=chunk)
    dist.all_reduce(message)
    expected = pattern * n + n * (n - 1) / 2
    wrong = torch.zeros((), dtype=torch.int64, device=message.device)
    for chunk in chunks:
        wrong += (chunk != expected[: chunk.numel()]).sum()
    dist.all_reduce(wrong)
    return int(wrong)
