"""Ranks: how many there are, what each takes, and how they agree. One rank needs no process group."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from snakegpt.errors import UserError

Strategy = Literal["ddp", "zero1", "fsdp"]

MAX_CPU_RANKS = 8
CPU_RANK_THREADS = 4
# Of a GPU: on an H100 with GPT-2 124M, 32, 64 and 128 rows of 1,024 tokens were within 5 % of each other.
GPU_MICRO_BATCH_TOKENS = 1 << 16
CPU_MICRO_BATCH_BYTES = 500_000_000  # beyond it nothing gets faster, and laptops have other work
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAVE_TIMEOUT_S = 120.0  # between the signal that asks ranks to save and leave, and SIGKILL
# A rank that dies closes its connections, which the others see at once; this is for one that hangs.
COLLECTIVE_TIMEOUT_S = 300.0


# ---- what there is ---------------------------------------------------------------------------


def choose_device(wanted: str) -> str:
    """cpu, cuda or mps for a setting that may also say auto; UserError if it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return next(device for device, is_there in there.items() if is_there)
    if not there[wanted]:
        raise UserError(
            f"execution.device = {wanted}, but torch {torch.__version__} finds none on this machine.\n"
            f"  available: {', '.join(device for device, is_there in there.items() if is_there)};"
            " set execution.device to one of these or to auto"
        )
    return wanted


def choose_ranks(wanted: int | str, *, device: str, rows: int, threads: int) -> int:
    """Training processes on this machine.

    auto on CPU is one for every `CPU_RANK_THREADS` threads, as the rows of a step allow: one rank of two
    threads took 17, 47 and 385 ms a step where two ranks of one took 23, 60 and 444, and starts sooner.
    On a machine that is busy with other work it is the other way round, since OpenMP's barriers spin.
    """
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if wanted != "auto":
        ranks = int(wanted)
        require_divisor(ranks, rows)
        if gpus and ranks > gpus:
            raise UserError(
                f"execution.ranks = {ranks}, but this machine has {gpus} CUDA devices.\n"
                "  each rank takes one: set execution.ranks to at most as many, or to auto"
            )
        if device == "mps" and ranks > 1:
            raise UserError(
                f"execution.ranks = {ranks}, but there is one mps device, which one rank takes.\n"
                "  set execution.ranks to 1 or auto, or execution.device to cpu"
            )
        return ranks
    most = {"cuda": gpus, "cpu": min(threads // CPU_RANK_THREADS, MAX_CPU_RANKS)}.get(device, 1)
    return max(r for r in range(1, max(most, 1) + 1) if rows % r == 0)


def require_divisor(ranks: int, rows: int) -> None:
    """UserError unless the rows of a step can be shared out evenly."""
    if rows % ranks:
        raise UserError(
            f"execution.ranks = {ranks} does not divide the {rows:,} rows of a step"
            f" (training.batch_tokens / model.context).\n"
            f"  nearest that fit: {_divisors_around(ranks, rows)}; or set it to auto"
        )


def choose_strategy(wanted: str, *, device: str, ranks: int, n_parameters: int) -> Strategy:
    """What ranks share, for a setting that may also say auto: as little as fits, which is the fastest.

    With AdamW a parameter takes 16 bytes (itself, its gradient, two moments, float32) in ddp; zero1
    shares out 8 of them. Half of a GPU is left to activations.
    """
    if wanted in get_args(Strategy):
        return cast(Strategy, wanted)
    if device != "cuda" or ranks == 1:
        return "ddp"
    room = torch.cuda.mem_get_info()[1] / 2
    needed = {"ddp": 16 * n_parameters, "zero1": (8 + 8 / ranks) * n_parameters}
    return next((cast(Strategy, name) for name, size in needed.items() if size <= room), "fsdp")


def choose_slices(n_parameters: int, *, ranks: int, local_ranks: int, device: str) -> int:
    """Ranks that fsdp slices everything among; see `slices_that_fit`."""
    room = torch.cuda.mem_get_info()[1] if device == "cuda" else math.inf
    return slices_that_fit(n_parameters, ranks, local_ranks, room)


def slices_that_fit(n_parameters: int, ranks: int, local_ranks: int, room_bytes: float) -> int:
    """The ranks of a node, whose links are the fast ones, where slices of AdamW's 16 bytes a parameter fit
    half of a rank's memory; else the ranks of all nodes."""
    return local_ranks if 16 * n_parameters / local_ranks <= room_bytes / 2 else ranks


def choose_precision(wanted: str, device: str) -> torch.dtype:
    """A type for a setting that may also say auto: bfloat16 where it is computed natively, or float32.

    On a CPU without bfloat16 instructions it is emulated, slower than float32; with them it is twice as
    fast, and costs nothing in loss (tiny Shakespeare: 1.905 against 1.906 nats).
    """
    if wanted == "auto":
        native = {
            "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": lambda: (
                torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            ),
        }.get(device, lambda: False)()
        return torch.bfloat16 if native else torch.float32
    named: dict[str, torch.dtype] = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    return named[wanted]


def choose_micro_rows(
    wanted: int | str, *, device: str, share: int, context: int, vocabulary: int, width: int
) -> int:
    """Rows that a rank takes through the network at once; what is left of its share is accumulated.

    share    rows of one rank in a step
    width    layers x channels, which most activations grow with
    """
    if wanted != "auto":
        rows = int(wanted)
        if share % rows:
            raise UserError(
                f"execution.rows_per_rank = {rows} does not divide the {share:,} rows that a rank has"
                f" in a step.\n  nearest that fit: {_divisors_around(rows, share)}; or set it to auto"
            )
        return rows
    # Logits, their float32 copy and gradient; some 34 bytes a channel and layer (Korthikanti et al. 2022).
    row_bytes = context * (vocabulary * 12 + width * 34)
    if device == "cuda":
        sizes, budget = gpu_micro_batches(share, context), 0.8 * torch.cuda.mem_get_info()[0]
    else:
        sizes, budget = _divisors(share), CPU_MICRO_BATCH_BYTES
    return max(rows for rows in sizes if rows == 1 or rows * row_bytes <= budget)


def gpu_micro_batches(share: int, context: int) -> list[int]:
    """Rows that a GPU may take at once of a rank's share of a step, ascending: beyond, nothing is gained."""
    most = max(1, GPU_MICRO_BATCH_TOKENS // context)
    return [rows for rows in _divisors(share) if rows <= most]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _divisors_around(wanted: int, number: int) -> str:
    """The divisors of a number just below and above one that is none, for an error message."""
    divisors = _divisors(number)
    near = [d for d in divisors if d < wanted][-1:] + [d for d in divisors if d > wanted][:1]
    return " and ".join(map(str, near))


# ---- inside a rank ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The ranks of a run as one of them sees it; local ones are on this machine."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def least(self, value: int) -> int:
        """The smallest of all ranks' values."""
        values = torch.tensor(value)
        if self.ranks > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return int(values)


def is_rank() -> bool:
    """Whether torchrun (ours or the user's) started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_size() -> int | None:
    """Ranks on all machines together, in a process that torchrun started."""
    return int(os.environ["WORLD_SIZE"]) if is_rank() else None


@contextlib.contextmanager
def joined(device: str, timeout_s: float | None = COLLECTIVE_TIMEOUT_S) -> Iterator[Group]:
    """The group of this process: formed from torchrun's environment, or of one rank without it.

    timeout_s  how long a rank waits for another in an exchange; None: a week

    CPU tensors go through gloo also where gradients go through NCCL, so that the ranks can agree on
    something without waiting for their GPUs.
    """
    if not is_rank():
        yield Group()
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    group = Group(*(int(os.environ[name]) for name in names))
    if device == "cuda":
        torch.cuda.set_device(group.local_rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    timeout = datetime.timedelta(days=7) if not timeout_s else datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(backend, timeout=timeout)
    try:
        yield group
    finally:
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for the next step, instead of handing it back to the kernel.

    By default every large tensor is a mapping of its own, whose pages the kernel clears again at each
    step: a third of the time with GPT-2's vocabulary, whose logits are hundreds of megabytes (4 layers,
    128 channels, 8 rows of 128 on one Zen 3 core: 1,213 ms a step, without the mappings 766 ms).
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(AttributeError, OSError):  # macOS, musl: nothing to tune
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


class StopRequest:
    """Remembers that SIGTERM, SIGINT or SIGUSR1 came, for the loop to look at between steps."""

    def __init__(self) -> None:
        self.came = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        self.came = True
