"""Counters: NVML's through a stand-in, silent where there is none; the process's against the kernel's."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
from snakegpt import counters


class NVMLError(Exception):
    pass


class Nvml(types.ModuleType):
    """Two GPUs; the second has no power sensor and an old driver, which knows no reasons."""

    NVMLError = NVMLError

    def __init__(self):
        super().__init__("pynvml")

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in ("GPU-a", "GPU-b"):
            raise NVMLError("not found")
        return uuid

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return types.SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return types.SimpleNamespace(total=80 * 2**30, used=12_345_678, free=1)

    def nvmlDeviceGetPowerUsage(self, gpu):
        if gpu == "GPU-b":
            raise NVMLError("not supported")
        return 412_500

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        return {1: 1755}[kind]  # 1 is NVML_CLOCK_SM

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        return {0: 61}[sensor]

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu):
        if gpu == "GPU-b":
            raise NVMLError("function not found")
        return 0x01 | 0x04 | 0x40  # idle, power cap, hardware too hot


def test_a_gpu_tells_its_counters_in_plain_units():
    first, second = counters.GpuCounters(Nvml(), ["a", "gone", "b"]).read()
    assert first == {
        "utilisation": 0.97,
        "memory_bytes": 12_345_678,
        "power_w": 412.5,
        "clock_mhz": 1755,
        "temperature_c": 61,
        "throttled": ["power cap", "hardware, too hot"],
    }
    assert second["power_w"] is None
    assert second["throttled"] is None
    assert second["clock_mhz"] == 1755


def test_the_real_module_knows_every_function_that_is_asked():
    real = pytest.importorskip("pynvml")
    for name in vars(Nvml):
        if name.startswith("nvml"):
            assert callable(getattr(real, name))
    assert (real.NVML_CLOCK_SM, real.NVML_TEMPERATURE_GPU) == (
        counters.SM_CLOCK,
        counters.GPU_TEMPERATURE,
    )
    known = {bit: name for name, bit in vars(real).items() if name.startswith("nvmlClocksEvent")}
    assert set(counters.THROTTLING) < set(known)
    assert known[0x20] == "nvmlClocksEventReasonSwThermalSlowdown"
    assert known[0x40] == "nvmlClocksEventReasonHwThermalSlowdown"


@pytest.mark.parametrize("why", ["no gpu", "no module", "no driver"])
def test_without_a_gpu_nothing_is_read_and_nothing_is_said(monkeypatch, capsys, why):
    broken = Nvml()
    broken.nvmlInit = lambda: (_ for _ in ()).throw(NVMLError("driver not loaded"))
    monkeypatch.setitem(sys.modules, "pynvml", None if why == "no module" else broken)
    assert counters.gpu_counters("cpu" if why == "no gpu" else "cuda", 1) is None
    assert not capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_process_counters_are_the_kernels():
    reader = counters.CpuCounters()
    sum(range(3_000_000))
    found = reader.read()
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    assert found["rss_bytes"] == pytest.approx(1024 * int(status["VmRSS"].split()[0]), rel=0.05)
    assert 0 < found["cpu_cores"] <= os.cpu_count() + 0.5
    assert found["load_1m"] == pytest.approx(os.getloadavg()[0], abs=0.5)
    peak = 1024 * int(status["VmHWM"].split()[0])
    assert counters.peak_memory_bytes("cpu") == pytest.approx(peak, rel=0.05)
