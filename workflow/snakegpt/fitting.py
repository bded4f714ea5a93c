"""What fits on a device, found by trying it: the micro-batch, the compiler, activations computed twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Of torch's allocators of a CPU and of Apple's GPUs, of CUDA itself, and of its libraries' workspaces.
NO_ROOM = (
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def no_room(error: RuntimeError) -> bool:
    """Whether an error means that a device has no memory left, which torch says in several ways."""
    named = isinstance(error, torch.OutOfMemoryError)
    return named or any(words in str(error) for words in NO_ROOM)


def largest_that_fits(
    peak_bytes: Callable[[int], int],
    sizes: Sequence[int],
    guess: int,
    budget_bytes: float,
    fixed_bytes: int,
) -> int:
    """The largest of some micro-batch sizes whose peak stays within a budget; the smallest if none does.

    Memory grows on a straight line with the rows, so every trial that runs tells which size comes next;
    after one that runs out of memory it is at most half of it. Few trials, since a compiled model is
    compiled anew for each, and torch gives up compiling after eight sizes (`recompile_limit`).

    peak_bytes   tries a size and returns the most memory held; raises what `no_room` knows
    sizes        ascending
    guess        what is tried first, or the size below it
    fixed_bytes  held whatever the size
    """
    fits, too_large, per_row = 0, sizes[-1] + 1, 0.0
    rows = max((size for size in sizes if size <= guess), default=sizes[0])
    while True:
        try:
            peak = peak_bytes(rows)
        except RuntimeError as error:
            if not no_room(error):
                raise
            too_large = rows
        else:
            per_row = max(1.0, (peak - fixed_bytes) / rows)
            if peak <= budget_bytes:
                fits = rows
            else:
                too_large = rows
        left = [size for size in sizes if fits < size < too_large]
        if per_row:
            left = [size for size in left if fixed_bytes + per_row * size <= budget_bytes]
        else:
            left = [size for size in left if size <= rows // 2] or left[:1]
        if not left:
            return fits or sizes[0]
        rows = left[-1]


def smaller(rows: int, share: int) -> int | None:
    """The next smaller micro-batch that divides a rank's share of a step; None below one row."""
    return next((r for r in range(rows // 2, 0, -1) if share % r == 0), None)


def compute_twice(blocks: nn.ModuleList) -> None:
    """Let blocks keep their inputs alone, and compute what is inside again in the backward pass.

    The same numbers: dropout's draws are repeated too (Chen et al. 2016).
    """
    for block in blocks:
        forward = block.forward
        block.forward = functools.partial(checkpoint, forward, use_reentrant=False)


def why_it_does_not_compile(attempt: Callable[[], object]) -> str | None:
    """What torch.compile says in one line when `attempt`, a pass of a compiled model, fails; None if not.

    Whatever it raises: compilers, toolchains and drivers fail in too many ways to name.
    """
    try:
        attempt()
    except Exception as error:
        if isinstance(error, RuntimeError) and no_room(error):
            return None  # of the batch, not of the compiler: the loop has a way out
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return None
