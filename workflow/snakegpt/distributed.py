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
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from snakegpt.errors import RETRY, USER_ERROR, Interrupted, UserError

MAX_CPU_RANKS = 8
CPU_MICRO_BATCH_BYTES = 500_000_000  # beyond it nothing gets faster, and laptops have other work
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAVE_TIMEOUT_S = 120  # between the signal that asks ranks to save and leave, and SIGKILL
# A rank that dies closes its connections, which the others see at once; this is for one that hangs.
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=300)
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

    auto on CPU is the largest divisor of the rows of a step that threads (and `MAX_CPU_RANKS`) allow,
    with one or more threads each: two ranks of one thread are as fast as one of two on a quiet machine
    and 2.6 times as fast on a busy one, where OpenMP's barriers spin.
    """
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if wanted != "auto":
        ranks = int(wanted)
        if rows % ranks:
            raise UserError(
                f"execution.ranks = {ranks} does not divide the {rows:,} rows of a step"
                f" (training.batch_tokens / model.context).\n"
                f"  nearest that fit: {_divisors_around(ranks, rows)}; or set it to auto"
            )
        if gpus and ranks > gpus:
            raise UserError(f"execution.ranks = {ranks}, but this machine has {gpus} CUDA devices.")
        return ranks
    most = {"cuda": gpus, "cpu": min(threads, MAX_CPU_RANKS)}.get(device, 1)
    return max(r for r in range(1, max(most, 1) + 1) if rows % r == 0)


def choose_precision(wanted: str, device: str) -> torch.dtype:
    """float32 or bfloat16 for a setting that may also say auto: bfloat16 where it is computed natively.

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
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


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
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    budget = 0.6 * free or CPU_MICRO_BATCH_BYTES
    return max(
        r for r in range(1, share + 1) if share % r == 0 and (r == 1 or r * row_bytes <= budget)
    )


def _divisors_around(wanted: int, number: int) -> str:
    """The divisors of a number just below and above one that is none, for an error message."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    near = [d for d in divisors if d < wanted][-1:] + [d for d in divisors if d > wanted][:1]
    return " and ".join(map(str, near))


# ---- inside a rank ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The ranks of a run as one of them sees it."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values


def is_rank() -> bool:
    """Whether torchrun (ours or the user's) started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextlib.contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group of this process: formed from torchrun's environment, or of one rank without it.

    CPU tensors go through gloo also where gradients go through NCCL, so that the ranks can agree on
    something without waiting for their GPUs.
    """
    if not is_rank():
        yield Group()
        return
    group = Group(
        *(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
    )
    if device == "cuda":
        torch.cuda.set_device(group.local_rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
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


@contextlib.contextmanager
def reporting_outcome() -> Iterator[None]:
    """In a rank that `launch` started: write how it ended to the outcome file and say nothing.

    The first rank to end badly wins; what the others then suffer from its absence is noise.
    """
    path = os.environ.get(OUTCOME)
    if path is None:
        yield
        return
    _die_with(int(os.environ[AGENT]))
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError):
            status, text = USER_ERROR, str(error)
        elif isinstance(error, Interrupted | KeyboardInterrupt):
            status, text = RETRY, str(error) or STOPPED_EARLY
        else:
            status, text = 1, f"rank {os.environ['RANK']}: {traceback.format_exc()}"
        with contextlib.suppress(FileExistsError):
            scratch = Path(f"{path}.{os.environ['RANK']}")
            scratch.write_text(json.dumps({"status": status, "text": text}), encoding="utf-8")
            os.link(scratch, path)
        # Not sys.exit: a failed rank must not wait for the others in the interpreter's clean-up.
        sys.stderr.flush()
        os._exit(status)


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
    module: str, arguments: list[str], *, ranks: int, threads: int, environment: Mapping[str, str]
) -> None:
    """Run `python -m module *arguments` once a rank on this machine, to the end of all of them.

    threads      cores to share out
    environment  variables for the ranks; what the caller's environment already says wins
    raises       UserError and Interrupted as the ranks raised them; SystemExit(1) if one failed or
                 was killed, after saying why once
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory(prefix="snakegpt-") as scratch:
        outcome = Path(scratch) / "outcome.json"
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        os.environ |= {
            OUTCOME: str(outcome),
            AGENT: str(os.getpid()),
            "OMP_NUM_THREADS": str(max(1, threads // ranks)),
            # Without it a restarted group may read the addresses of the dead one (pytorch #135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        command = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "0"]
        command += ["--shutdown-timeout", str(SAVE_TIMEOUT_S)]
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
        if outcome.exists():
            found = json.loads(outcome.read_text(encoding="utf-8"))
            if found["status"] == USER_ERROR:
                raise UserError(found["text"])
            if found["status"] == RETRY:
                raise Interrupted(found["text"])
        elif stopped:
            raise Interrupted(STOPPED_EARLY)
        if killed_by is not None:
            name = signal.Signals(killed_by).name
            raise SystemExit(
                f"error: a rank was killed by {name}"
                + (" (by hand, or for lack of memory)" if name == "SIGKILL" else "")
                + "; the same command resumes from the last saved state"
            )
        raise SystemExit(f"error: {found['text']}" if outcome.exists() else "error: a rank failed")
