"""What the machine says while it trains: the GPUs through NVML, the process and the CPU through psutil."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import sys
from collections.abc import Callable, Iterable
from typing import Any

import psutil
import torch

# NVML's reasons for a clock below the highest; idling and what the owner has set are left out.
THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software, too hot",
    0x40: "hardware, too hot",
    0x80: "power brake",
}
SM_CLOCK, GPU_TEMPERATURE = 1, 0  # NVML's numbers


class GpuCounters:
    """The counters of some GPUs. Silent where there is no NVML, no driver or no such counter."""

    def __init__(self, nvml: Any, uuids: Iterable[str]) -> None:
        """nvml: the module pynvml, initialised; uuids: of the GPUs, as torch and NVML write them"""
        self._nvml = nvml
        by_uuid = nvml.nvmlDeviceGetHandleByUUID
        found = (self._asked(functools.partial(by_uuid, f"GPU-{uuid}")) for uuid in uuids)
        self._gpus = [gpu for gpu in found if gpu is not None]

    def read(self) -> list[dict[str, Any]]:
        """One entry a GPU; a counter that it does not have is None."""
        return [self._one(gpu) for gpu in self._gpus]

    def _one(self, gpu: Any) -> dict[str, Any]:
        nvml = self._nvml
        milliwatts = self._asked(lambda: nvml.nvmlDeviceGetPowerUsage(gpu))
        reasons = self._asked(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))
        return {
            "utilisation": self._asked(lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100),
            "memory_bytes": self._asked(lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used),
            "power_w": None if milliwatts is None else milliwatts / 1000,
            "clock_mhz": self._asked(lambda: nvml.nvmlDeviceGetClockInfo(gpu, SM_CLOCK)),
            "temperature_c": self._asked(
                lambda: nvml.nvmlDeviceGetTemperature(gpu, GPU_TEMPERATURE)
            ),
            "throttled": None
            if reasons is None
            else [name for bit, name in THROTTLING.items() if reasons & bit],
        }

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except (self._nvml.NVMLError, AttributeError):
            return None


def gpu_counters(device: str, n_gpus: int) -> GpuCounters | None:
    """The counters of the first GPUs that this process sees; None where they cannot be asked.

    raises   nothing: counters are good to have, and no reason not to train
    """
    if device != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    most = min(n_gpus, torch.cuda.device_count())
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(most)]
    return GpuCounters(pynvml, uuids)


class CpuCounters:
    """What this process takes of its machine's processors and memory, since it was last asked."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # from here on

    def read(self) -> dict[str, Any]:
        """cpu_cores may be above 1: it counts cores that this process kept busy."""
        load_1m = None
        with contextlib.suppress(OSError, AttributeError):  # Windows has none
            load_1m = round(os.getloadavg()[0], 2)
        return {
            "cpu_cores": round(self._process.cpu_percent() / 100, 3),
            "rss_bytes": self._process.memory_info().rss,
            "load_1m": load_1m,
        }


def peak_memory_bytes(device: str) -> int:
    """Most memory that this rank ever held, on its GPU or else as a process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
