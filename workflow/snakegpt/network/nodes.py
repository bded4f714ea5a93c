"""One node: what it has, and how fast it computes, copies to its GPUs and reads from disk."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from snakegpt.hardware import measure_matmul
from snakegpt.network.interfaces import Interface, devices, rdma_ports

COPY_BYTES = 256 << 20
DISK_BYTES = 128 << 20
DISK_CHUNK = 4 << 20
GPU_FIELDS = ("name", "driver_version", "memory.total", "pci.bus_id")


def inventory(interface: Interface, sysfs: Path = Path("/sys")) -> dict[str, Any]:
    """What this node has that may matter to training, as plain JSON.

    interface  towards node 0
    """
    nodes = sorted((sysfs / "devices/system/node").glob("node[0-9]*"))
    return {
        "host": socket.gethostname(),
        "address": interface.address,
        "interface": asdict(interface),
        "devices": [asdict(device) for device in devices(sysfs)],
        "rdma_ports": rdma_ports(sysfs),
        "locked_memory_bytes": _locked_memory(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "numa_nodes": max(1, len(nodes)),
        "gpus": gpus(),
        "gpu_topology": _output(["nvidia-smi", "topo", "-m"]),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """What the nodes of a run should have in common."""
    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl)) if nccl else None,
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs as nvidia-smi lists them; none where there is none or no driver."""
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    lines = (_output(query) or "").splitlines()
    return [dict(zip(GPU_FIELDS, line.split(", "), strict=False)) for line in lines if "," in line]


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _locked_memory() -> int | None:
    """Bytes that a process may lock, which registering memory for RDMA needs; None: no limit."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def speed(folder: Path, device: str, threads: int) -> dict[str, Any]:
    """Figures of this node alone; every node of a run should give about the same.

    folder   on the disk that training reads from
    returns  matmul_flops_per_s (one device, best of half a second), host_to_device_gb_per_s (the slowest
             GPU; None without one), disk_read_gb_per_s (None where the disk refuses)
    """
    torch.set_num_threads(threads)
    precision = "bfloat16" if device == "cuda" else "float32"
    copies = [_host_to_device(k) for k in range(torch.cuda.device_count())]
    return {
        "matmul_flops_per_s": measure_matmul(device, precision),
        "host_to_device_gb_per_s": min(copies) if device == "cuda" and copies else None,
        "disk_read_gb_per_s": disk_read(folder),
    }


def _host_to_device(index: int) -> float:
    """GB/s of a copy from pinned memory to one GPU, best of five."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
    best_s = float("inf")
    for _ in range(5):
        torch.cuda.synchronize(index)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(index)
        best_s = min(best_s, time.perf_counter() - started)
    return COPY_BYTES / best_s / 1e9


def disk_read(folder: Path, n_bytes: int = DISK_BYTES) -> float | None:
    """GB/s of reading a new file in order, after the kernel was asked to forget its pages.

    tmpfs keeps them, and so do some network filesystems: the figure is then memory's.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS
        return None
    file = folder / f".disk-{socket.gethostname()}-{os.getpid()}"
    try:
        block = os.urandom(DISK_CHUNK)  # random, for filesystems that compress
        with file.open("wb") as out:
            for _ in range(n_bytes // DISK_CHUNK):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        with file.open("rb", buffering=0) as source:
            n_read = sum(iter(lambda: len(source.read(DISK_CHUNK)), 0))
        return n_read / (time.perf_counter() - started) / 1e9
    except OSError:
        return None
    finally:
        file.unlink(missing_ok=True)
