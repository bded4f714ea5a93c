"""Peaks of devices: found by their whole name, never guessed; and the product that is measured."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from snakegpt import gpus, hardware


@pytest.mark.parametrize(
    ("device_name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 67.0),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H200", "float16", 989.4),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312.0),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312.0),
        ("NVIDIA A10", "bfloat16", 125.0),
        ("NVIDIA A10G", "bfloat16", 70.0),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA L40", "bfloat16", 181.0),
        ("NVIDIA L40S", "bfloat16", 362.0),
        ("Tesla V100-SXM2-16GB", "float16", 125.0),
        ("Tesla V100S-PCIE-32GB", "float16", 130.0),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 5080", "bfloat16", 112.6),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "bfloat16", 503.8),
        ("Tesla T4", "float16", 65.0),
        ("Tesla T4", "bfloat16", None),  # it has none
        ("Tesla V100-SXM2-32GB", "bfloat16", None),
    ],
)
def test_a_gpu_has_its_datasheets_peak_for_each_type(device_name, precision, tflops):
    found = gpus.gpu_named(device_name)
    assert found.peak_flops_per_s(precision) == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize(
    "device_name",
    [
        "cpu",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a slice is not the whole
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA RTX 6000",  # of another generation
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        "Tesla V100-SXM2-32GB-LS",  # of a lower clock
        "Tesla P100-PCIE-16GB",  # its published half is summed in float16
        "NVIDIA X9000",
    ],
)
def test_a_device_that_is_not_in_the_table_has_no_peak(device_name):
    assert gpus.gpu_named(device_name) is None


def test_every_name_stands_for_one_gpu_and_every_figure_is_plausible():
    assert len({gpu.name for gpu in gpus.GPUS}) == len(gpus.GPUS)
    for gpu in gpus.GPUS:
        assert gpu.source
        assert 8 <= gpu.memory <= 300
        # Matrix units are 1.9 to 31 times as fast as the others; sparse figures would be above.
        assert 1.9 < gpu.half / gpu.single < 34, gpu.name


def test_measuring_takes_about_the_time_it_is_given_and_gives_a_rate():
    torch.set_num_threads(1)
    state = torch.random.get_rng_state()
    started = time.perf_counter()
    rate = hardware.measure_matmul("cpu", "float32", limit_s=0.1)
    assert time.perf_counter() - started < 5
    assert torch.equal(torch.random.get_rng_state(), state)
    a = torch.randn(1024, 1024)
    started = time.perf_counter()
    a @ a
    once = 2 * 1024**3 / (time.perf_counter() - started)
    assert once / 20 < rate < once * 20


def test_the_documented_table_is_the_table():
    text = (Path(__file__).parent.parent / "docs" / "plan.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.count("|") == 7]
    assert [(row[0], *map(float, row[1:4]), row[4] == "yes") for row in rows[2:]] == [
        (gpu.name, gpu.memory, gpu.half, gpu.single, gpu.bfloat16) for gpu in gpus.GPUS
    ]
