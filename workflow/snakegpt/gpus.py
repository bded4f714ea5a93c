"""GPUs by the name that torch reports: peaks and memories, as far as published tables agree on them."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One line of a datasheet; `pattern` matches the whole name that torch reports.

    half      dense peak of float16 products that are summed in float32, TFLOP/s; bfloat16 is as fast
              wherever it exists. Makers print twice this, "with sparsity"; GeForce cards reach twice
              this if they sum in float16, which training does not
    single    float32 peak outside the matrix units, TFLOP/s: TF32 is off unless somebody turns it on
    memory    nominal, GiB
    bfloat16  whether it has it
    """

    name: str
    pattern: str
    memory: int
    half: float
    single: float
    source: str
    bfloat16: bool = True

    def peak_flops_per_s(self, precision: str) -> float | None:
        """Dense peak for float32, bfloat16 or float16; None where the GPU has no such units."""
        if precision == "float32":
            return self.single * 1e12
        return None if precision == "bfloat16" and not self.bfloat16 else self.half * 1e12


_H100 = "NVIDIA H100 datasheet"
_AMPERE = "NVIDIA GA102 whitepaper"
_ADA = "NVIDIA Ada whitepaper"
_BLACKWELL = "NVIDIA RTX Blackwell whitepaper"
_ADA_PRO = "NVIDIA Ada ProViz whitepaper"
_BLACKWELL_PRO = "NVIDIA RTX Blackwell PRO whitepaper, table 4, and datasheet"
_CDNA3 = "AMD CDNA 3 whitepaper and MI300X, MI325X data sheets"

# No P100: the half of its datasheet is summed in float16; summed in float32 it is not above float32.
# fmt: off
GPUS = (
    Gpu("V100 16GB", r"Tesla V100-SXM2-16GB", 16, 125.0, 15.7, "NVIDIA V100 datasheet", bfloat16=False),
    Gpu("V100 32GB", r"Tesla V100-SXM[23]-32GB", 32, 125.0, 15.7, "NVIDIA V100 datasheet, DGX-2: 2 PFLOP/s of 16", bfloat16=False),
    Gpu("V100S", r"Tesla V100S-PCIE-32GB", 32, 130.0, 16.4, "NVIDIA V100 datasheet", bfloat16=False),
    Gpu("V100 PCIe 16GB", r"Tesla V100-PCIE-16GB", 16, 112.0, 14.0, "NVIDIA V100 datasheet", bfloat16=False),
    Gpu("V100 PCIe 32GB", r"Tesla V100-PCIE-32GB", 32, 112.0, 14.0, "NVIDIA V100 datasheet", bfloat16=False),
    Gpu("T4", r"(NVIDIA |Tesla )T4", 16, 65.0, 8.1, "NVIDIA T4 datasheet", bfloat16=False),
    Gpu("A10", r"NVIDIA A10", 24, 125.0, 31.2, "NVIDIA A10 datasheet"),
    Gpu("A10G", r"NVIDIA A10G", 24, 70.0, 35.0, "NVIDIA A10G datasheet (AWS)"),
    Gpu("A30", r"NVIDIA A30", 24, 165.0, 10.3, "NVIDIA A30 datasheet"),
    Gpu("A40", r"NVIDIA A40", 48, 149.7, 37.4, "NVIDIA A40 datasheet"),
    Gpu("A100 40GB", r"(NVIDIA )?A100-(SXM4|SXM|PCIE|PCIe)-40GB", 40, 312.0, 19.5, "NVIDIA A100 datasheet"),
    Gpu("A100 80GB", r"(NVIDIA )?A100(-SXM4-80GB|-SXM-80GB| 80GB PCIe|-PCIE-80GB)", 80, 312.0, 19.5, "NVIDIA A100 datasheet"),
    Gpu("A800 80GB", r"NVIDIA A800(-SXM4-80GB| 80GB PCIe)", 80, 312.0, 19.5, "NVIDIA A100 datasheet; the A800 computes alike"),
    Gpu("RTX A5000", r"NVIDIA RTX A5000", 24, 111.1, 27.8, "NVIDIA RTX A5000 datasheet"),
    Gpu("RTX A6000", r"NVIDIA RTX A6000", 48, 154.8, 38.7, _AMPERE),
    Gpu("RTX 3090", r"NVIDIA GeForce RTX 3090", 24, 71.0, 35.6, _AMPERE),
    Gpu("RTX 3090 Ti", r"NVIDIA GeForce RTX 3090 Ti", 24, 80.0, 40.0, _ADA),
    Gpu("RTX 6000 Ada", r"NVIDIA RTX 6000 Ada Generation", 48, 364.2, 91.1, _ADA_PRO),
    Gpu("RTX 4080", r"NVIDIA GeForce RTX 4080", 16, 97.5, 48.7, _ADA),
    Gpu("RTX 4090", r"NVIDIA GeForce RTX 4090", 24, 165.2, 82.6, _ADA),
    Gpu("RTX 5080", r"NVIDIA GeForce RTX 5080", 16, 112.6, 56.3, _BLACKWELL),
    Gpu("RTX 5090", r"NVIDIA GeForce RTX 5090", 32, 209.5, 104.8, _BLACKWELL),
    Gpu("RTX PRO 6000", r"NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 96, 503.8, 125.0, _BLACKWELL_PRO),
    Gpu("L4", r"NVIDIA L4", 24, 121.0, 30.3, "NVIDIA L4 datasheet"),
    Gpu("L40", r"NVIDIA L40", 48, 181.0, 90.5, "NVIDIA L40 datasheet"),
    Gpu("L40S", r"NVIDIA L40S", 48, 362.0, 91.6, "NVIDIA L40S datasheet"),
    Gpu("H100 PCIe", r"NVIDIA H100 PCIe", 80, 756.0, 51.0, _H100),
    Gpu("H100", r"NVIDIA H100 80GB HBM3", 80, 989.4, 67.0, _H100),
    Gpu("H100 NVL", r"NVIDIA H100 NVL", 94, 835.5, 60.0, _H100),
    Gpu("GH200 96GB", r"NVIDIA GH200 480GB", 96, 989.4, 67.0, "NVIDIA GH200 datasheet; 480 GB are the processor's"),
    Gpu("H200", r"NVIDIA H200", 141, 989.4, 67.0, "NVIDIA H200 datasheet"),
    Gpu("H200 NVL", r"NVIDIA H200 NVL", 141, 835.5, 60.0, "NVIDIA H200 datasheet"),
    Gpu("B200", r"NVIDIA B200", 180, 2250.0, 75.0, "NVIDIA Blackwell datasheet, HGX B200"),
    Gpu("GB200", r"NVIDIA GB200", 186, 2500.0, 80.0, "NVIDIA Blackwell datasheet, GB200 NVL72"),
    Gpu("MI250X, one die", r"AMD Instinct MI250X", 64, 191.5, 23.9, "AMD MI250X data sheet, halved"),
    Gpu("MI300X", r"AMD Instinct MI300X", 192, 1307.4, 163.4, _CDNA3),
    Gpu("MI325X", r"AMD Instinct MI325X", 256, 1307.4, 163.4, _CDNA3),
)
# fmt: on


def gpu_named(device_name: str) -> Gpu | None:
    """The datasheet of a device by the name that torch reports; None for one that is not in the table.

    Names must match whole: a slice of an H100 or the laptop's RTX 4090 is another device.
    """
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.pattern, device_name)), None)
