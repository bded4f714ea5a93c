"""Ranks: how many there are, how they start, agree and end. One rank needs no process group.

`launch` runs a stage's own command once a rank through torchrun, inside the calling process, which so
becomes torchrun's agent: one process and one import of torch fewer than calling torchrun by name. What
torchrun cannot tell (it leaves with status 1 whatever happened) the ranks write to an outcome file.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from snakegpt.errors import RETRY, USER_ERROR, Interrupted, UserError, way_out
from snakegpt.progress import say

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
STOPPED_EARLY = "stopped before the first step; the same command starts again"
OUTCOME = "SNAKEGPT_OUTCOME"
AGENT = "SNAKEGPT_AGENT_PID"


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


class StartAgain(Interrupted):
    """A rank knows what to do otherwise in a new attempt, and wants all of them to make one."""


class RankFailed(Exception):
    """A rank was killed or hung, which may not happen again, or it ended with an error of ours."""

    def __init__(self, text: str, *, by_chance: bool) -> None:
        super().__init__(text)
        self.by_chance = by_chance


@contextlib.contextmanager
def reporting_outcome() -> Iterator[None]:
    """In a rank that `launch` started: write how it ended to the outcome file and say nothing."""
    if OUTCOME not in os.environ:
        yield
        return
    _die_with(int(os.environ[AGENT]))
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError):
            status, text = USER_ERROR, str(error)
        elif disk := way_out(error):
            status, text = USER_ERROR, disk
        elif isinstance(error, Interrupted | KeyboardInterrupt):
            status, text = RETRY, str(error) or STOPPED_EARLY
        else:
            status, text = 1, traceback.format_exc()
        tell_outcome(status, text, again=isinstance(error, StartAgain))
        # Not sys.exit: a failed rank must not wait for the others in the interpreter's clean-up.
        os._exit(status)


def tell_outcome(status: int, text: str, *, again: bool = False) -> None:
    """Write how this rank ends for `launch` to tell, or say it where nobody launched.

    again  whether another attempt may end otherwise

    The first rank to end badly wins; what the others then suffer from its absence is noise.
    """
    path, rank = os.environ.get(OUTCOME), os.environ.get("RANK")
    if path is None or rank is None:
        print(f"error: {text}", file=sys.stderr, flush=True)
        return
    text = f"rank {rank}: {text}" if status == 1 else text
    sys.stderr.flush()
    with contextlib.suppress(FileExistsError):
        scratch = Path(f"{path}.{rank}")
        outcome = {"status": status, "text": text, "again": again}
        scratch.write_text(json.dumps(outcome), encoding="utf-8")
        os.link(scratch, path)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent dies (Linux), so that no state has two writers."""
    if sys.platform != "linux":
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


# ---- starting ranks --------------------------------------------------------------------------


def network_environment(network: Mapping[str, Any]) -> dict[str, str]:
    """The launch variables that bench_network recommends here, as far as they are about the network."""
    prefixes = ("GLOO_", "NCCL_", "TORCH_NCCL_")
    by_host = network.get("environment_by_host") or {}
    found = {**(network.get("environment") or {}), **by_host.get(socket.gethostname(), {})}
    return {name: str(value) for name, value in found.items() if name.startswith(prefixes)}


def launch(
    module: str,
    arguments: list[str],
    *,
    ranks: int,
    threads: int,
    environment: Mapping[str, str],
    stop_timeout_s: float = SAVE_TIMEOUT_S,
    restarts: int = 0,
    progress: Callable[[], int] = lambda: 0,
) -> None:
    """Run `python -m module *arguments` once a rank on this machine, to the end of all of them.

    threads         cores to share out
    environment     variables for the ranks; what the caller's environment already says wins
    stop_timeout_s  between the signal that asks ranks to save and leave, and SIGKILL
    restarts        times that all ranks are started again after one has died ...
    progress        ... counted anew when this number, asked after each end, has grown
    raises          UserError and Interrupted as the ranks raised them; SystemExit(1) if one failed or
                    was killed, after saying why once
    """
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    left, reached = restarts, progress()
    while True:
        try:
            return _launch_once(module, arguments, ranks, threads, stop_timeout_s)
        except StartAgain as note:
            say(f"{note}; starts again")
        except RankFailed as failure:
            now = progress()
            # An error where nothing was reached since the start would only come again.
            left = restarts if now > reached else left * failure.by_chance
            if not left:
                raise SystemExit(
                    f"error: {failure}\n  the same command resumes from the last saved state"
                ) from None
            left, reached = left - 1, now
            say(f"error: {failure}\n  starts again from the last saved state")


def _launch_once(
    module: str, arguments: list[str], ranks: int, threads: int, stop_timeout_s: float
) -> None:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory(prefix="snakegpt-") as scratch:
        outcome = Path(scratch) / "outcome.json"
        os.environ |= {
            OUTCOME: str(outcome),
            AGENT: str(os.getpid()),
            "OMP_NUM_THREADS": str(max(1, threads // ranks)),
            # Every attempt is a rendezvous of its own, and its ranks have a store of their own: in one
            # that is shared they may read the address of a dead rank (pytorch #135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        command = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "0"]
        command += ["--shutdown-timeout", str(math.ceil(stop_timeout_s))]
        command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
        command += ["--log-dir", scratch, "--module", module, *arguments]
        # The agent's own lines and traceback would bury what the ranks say, which follows in full.
        logging.disable(logging.CRITICAL)
        killed_by, stopped = None, False
        try:
            torchrun.main(command)
        except ChildFailedError as error:
            codes = [failure.exitcode for failure in error.failures.values()]
            killed_by = next((-c for c in codes if c < 0 and -c != signal.SIGTERM), None)
        except SignalException:
            stopped = True
        else:
            return
        finally:
            logging.disable(logging.NOTSET)
        found: dict[str, Any] = {}
        if outcome.exists():
            found = json.loads(outcome.read_text(encoding="utf-8"))
        if found.get("status") == USER_ERROR:
            raise UserError(found["text"])
        if found.get("status") == RETRY:
            raise (StartAgain if found["again"] else Interrupted)(found["text"])
        if stopped and not found:
            raise Interrupted(STOPPED_EARLY)
        # A rank that hangs is killed in the end; what the watchdog of another saw says more.
        if killed_by is not None and not found.get("again"):
            name = signal.Signals(killed_by).name
            why = " (by hand, or for lack of memory)" if name == "SIGKILL" else ""
            raise RankFailed(f"a rank was killed by {name}{why}", by_chance=True)
        if found:
            raise RankFailed(found["text"], by_chance=found["again"])
        raise RankFailed("a rank failed", by_chance=False)
