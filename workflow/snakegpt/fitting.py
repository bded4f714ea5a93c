"""What fits on a device, found by trying it: the micro-batch, the compiler, activations computed twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def largest_that_fits(
    peak_bytes: Callable[[int], int],
    sizes: Sequence[int],
    guess: int,
    budget_bytes: float,
    fixed_bytes: int,
) -> int:
    """The largest of some micro-batch sizes whose peak stays within a budget; the smallest if none does.

    Memory grows on a straight line with the rows, so a trial of a guess tells where to try next. Every
    trial of a compiled model is compiled anew, so there are few.

    peak_bytes   tries a size and returns the most memory held; raises torch.OutOfMemoryError
    sizes        ascending
    fixed_bytes  held whatever the size
    """

    def fits(rows: int) -> int | None:
        try:
            peak = peak_bytes(rows)
        except torch.OutOfMemoryError:
            return None
        return peak if peak <= budget_bytes else None

    up_to_guess = [rows for rows in sizes if rows <= guess] or [sizes[0]]
    for found in reversed(up_to_guess):
        peak = fits(found)
        if peak is not None:
            break
    if peak is None or found < up_to_guess[-1]:
        return found
    per_row = max(1.0, (peak - fixed_bytes) / found)
    larger = [r for r in sizes if r > found and fixed_bytes + per_row * r <= budget_bytes]
    return next((rows for rows in reversed(larger) if fits(rows) is not None), found)


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
    except torch.OutOfMemoryError:
        return None  # of the batch, not of the compiler: the loop has a way out
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return None
