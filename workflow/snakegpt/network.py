"""What the network does for training: all-reduce as nccl-tests measures it, TCP as iperf3 does.

Conventions (NVIDIA nccl-tests, doc/PERFORMANCE.md): a message of S bytes in time t has algorithm
bandwidth S / t; for an all-reduce over n ranks the bus bandwidth is that times 2 (n - 1) / n, which a
ring would put on every link whatever n is, so that it compares with the link's own rate. GB is 1e9
bytes. Times are the slowest rank's, where nccl-tests averages: training waits for the slowest.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from snakegpt.network_interfaces import Interface

SMALLEST_BYTES = 1024
WARMUP = 5  # nccl-tests' defaults; both shrink where a message takes long
ITERATIONS = 20
LATENCY_BYTES = 8
LATENCY_ITERATIONS = 100
PATTERN_PERIOD = 13  # of the numbers that check the sums


# ---- collectives: called by every rank of a process group ------------------------------------


def message_sizes(largest: int) -> list[int]:
    """1 KiB, doubling, up to and with the largest; float32 elements, so multiples of 4."""
    largest = max(largest // 4 * 4, SMALLEST_BYTES)
    sizes = []
    size = SMALLEST_BYTES
    while size < largest:
        sizes.append(size)
        size *= 2
    return [*sizes, largest]


def all_reduce_curve(device: str, largest: int, *, limit_s: float) -> list[dict[str, Any]]:
    """Time all-reduces of growing size over the ranks of the default process group.

    device   where the tensors live; the group's backend for it does the work
    largest  bytes of the last message
    limit_s  about how long it may take: big messages get fewer iterations, and when it is spent only
             the last size is still measured
    returns  a row a size: bytes, iterations, time_s, algbw_gb_per_s, busbw_gb_per_s, n_wrong
    """
    sizes = message_sizes(largest)
    buffer = torch.empty(sizes[-1] // 4, device=device)
    started = time.perf_counter()
    rows = []
    for index, size in enumerate(sizes):
        left_s = _agreed(limit_s - (time.perf_counter() - started), device)
        if left_s <= 0 and index < len(sizes) - 1:
            continue
        message = buffer[: size // 4]
        # Half of what is left to each of the sizes to come: a bigger message takes longer.
        share_s = max(left_s, 0.0) / (2 if index < len(sizes) - 1 else 1)
        time_s, iterations = _time_all_reduce(message, share_s, WARMUP, ITERATIONS)
        rows.append(
            {
                "bytes": size,
                "iterations": iterations,
                **bandwidths(size, time_s, dist.get_world_size()),
                "n_wrong": _wrong_sums(message),
            }
        )
    return rows


def all_reduce_latency(device: str) -> float:
    """Seconds that the all-reduce of a message of no size to speak of takes."""
    message = torch.empty(LATENCY_BYTES // 4, device=device)
    return _time_all_reduce(message, 1.0, WARMUP, LATENCY_ITERATIONS)[0]


def bandwidths(n_bytes: int, time_s: float, ranks: int) -> dict[str, float]:
    """time_s, algbw_gb_per_s and busbw_gb_per_s of an all-reduce; see the top of this module."""
    algorithm = n_bytes / time_s / 1e9
    return {
        "time_s": time_s,
        "algbw_gb_per_s": algorithm,
        "busbw_gb_per_s": algorithm * 2 * (ranks - 1) / ranks,
    }


def _time_all_reduce(
    message: Tensor, limit_s: float, warmup: int, iterations: int
) -> tuple[float, int]:
    """Seconds of one all-reduce, mean of as many of the iterations as the limit allows, slowest rank."""
    message.fill_(0.0)  # repeated sums of zeros cannot overflow
    device = str(message.device)
    first_s = _agreed(_elapsed(message, 1), device)  # also what opens the connections
    if first_s < limit_s / 10:
        first_s = _agreed(_elapsed(message, warmup - 1), device) / (warmup - 1)
    fit = int(limit_s / max(first_s, 1e-9))
    iterations = max(1, min(iterations, fit))
    return _agreed(_elapsed(message, iterations), device) / iterations, iterations


def _elapsed(message: Tensor, iterations: int) -> float:
    dist.barrier()
    _wait_for(message)
    started = time.perf_counter()
    for _ in range(iterations):
        dist.all_reduce(message)
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


# ---- TCP --------------------------------------------------------------------------------------


def iperf3(
    address: str, *, seconds: int = 2, wait_s: float = 15.0
) -> tuple[dict[str, Any] | None, str | None]:
    """TCP throughput from this machine to an address of its own, by iperf3.

    seconds  measured, after one more that leaves TCP's slow start out
    returns  (figures, None), or (None, the reason why there are none)
    """
    program = shutil.which("iperf3")
    if program is None:
        return None, "iperf3 is not installed"
    with contextlib.ExitStack() as stack:
        try:
            port = stack.enter_context(_iperf3_server(program, address, wait_s))
            command = [program, "--client", address, "--port", str(port), "--json"]
            command += ["--time", str(seconds), "--omit", "1"]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds + 1 + wait_s
            )
            return _iperf3_figures(json.loads(done.stdout)), None
        except (TimeoutError, subprocess.TimeoutExpired):
            return None, f"iperf3 did not finish within {seconds + 1 + wait_s:.0f} s"
        except (OSError, ValueError, KeyError) as error:
            return None, f"iperf3 failed: {error}"


@contextlib.contextmanager
def _iperf3_server(program: str, address: str, wait_s: float) -> Iterator[int]:
    """A server for one client on a free port; yields the port once it listens."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = int(probe.getsockname()[1])
    command = [program, "--server", "--one-off", "--bind", address, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + wait_s
            while not _listens(server.pid):  # connecting would use its one client up
                if server.poll() is not None:
                    raise OSError(f"its server left with status {server.returncode}")
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.02)
            yield port
        finally:
            server.kill()


def _listens(pid: int) -> bool:
    try:
        connections = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return False
    return any(connection.status == psutil.CONN_LISTEN for connection in connections)


def _iperf3_figures(answer: dict[str, Any]) -> dict[str, Any]:
    """What counts of iperf3's JSON; ValueError with its own words if it failed."""
    if "error" in answer:
        raise ValueError(answer["error"])
    end = answer["end"]
    sender = end["streams"][0]["sender"]
    return {
        "version": answer["start"]["version"],
        "streams": len(end["streams"]),
        "time_s": end["sum_received"]["seconds"],
        "bits_per_second": end["sum_received"]["bits_per_second"],
        "gb_per_s": end["sum_received"]["bits_per_second"] / 8e9,
        "retransmits": end["sum_sent"].get("retransmits"),
        "mean_rtt_s": sender["mean_rtt"] / 1e6 if "mean_rtt" in sender else None,
        "congestion_control": end.get("sender_tcp_congestion"),
    }


# ---- advice -----------------------------------------------------------------------------------


def recommend(backend: str, ranks: int, interface: Interface) -> tuple[dict[str, str], list[str]]:
    """Launch variables for the ranks, each with its reason; none without one.

    NCCL finds its transports by itself, and NVIDIA's guide lists the switches that turn some of them
    off (NCCL_IB_DISABLE, NCCL_P2P_DISABLE, NCCL_SHM_DISABLE) under debugging, not for production.
    """
    if ranks == 1:
        return {}, ["Training uses one process, so nothing is sent and there is nothing to set."]
    if backend == "gloo":
        reason = (
            f"GLOO_SOCKET_IFNAME={interface.name}: all ranks are on this machine. Without it gloo"
            " looks the machine's name up and fails, or takes a slower way, where that does not"
            " lead back here."
        )
        return {"GLOO_SOCKET_IFNAME": interface.name}, [reason]
    return {}, [
        "NCCL needs no variable on one machine: it finds NVLink, PCIe and shared memory by itself."
    ]


def findings(
    gradient_bytes: int, curve: list[dict[str, Any]], latency_s: float | None
) -> list[str]:
    """What the measurement says about training, in words."""
    if not curve or latency_s is None:
        return []
    whole = curve[-1]
    best = max(curve, key=lambda row: float(row["busbw_gb_per_s"]))
    return [
        f"Summing all gradients ({gradient_bytes / 1e6:,.1f} MB) takes"
        f" {_digits(whole['time_s'] * 1e3)} ms a step where it does not overlap with the backward pass;"
        f" the smallest message takes {_digits(latency_s * 1e6)} µs.",
        f"The bus bandwidth is highest, {_digits(best['busbw_gb_per_s'])} GB/s, at messages of"
        f" {best['bytes']:,} bytes.",
    ]


def _digits(number: float) -> str:
    """Three significant digits, where `.3g` alone would write 1,310 as 1.31e+03."""
    return f"{float(f'{number:.3g}'):,g}"
