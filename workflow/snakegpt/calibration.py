"""A few real updates on made-up tokens: what a step takes on this machine, in time and memory."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import numpy as np
import torch

from snakegpt.batches import TokenStream
from snakegpt.counters import peak_memory_bytes
from snakegpt.distributed import Group
from snakegpt.model import Shape
from snakegpt.settings import Training
from snakegpt.tokens import TokenSet
from snakegpt.updates import Launch, Updates

WARM_UP = 3  # steps that are not counted: kernels are chosen, memory grows
MOST_ACCUMULATED = (
    4  # micro-batches of a calibrated step: beyond it a step is only more of the same
)
LEAST_STEPS = 2  # beside one to warm up, also when time is up


def calibrate(
    shape: Shape,
    training: Training,
    launch: Launch,
    group: Group,
    *,
    steps: int,
    expected_step_s: float,
    limit_s: float,
) -> dict[str, Any]:
    """Run updates as training would, all ranks together, and scale to the whole step.

    steps            to measure, the warm-up among them; fewer when `limit_s` is over
    expected_step_s  of a whole step, to decide how much of one is affordable
    returns          step_s of the whole step, its spread, and this rank's peak memory
    """
    share = training.batch_tokens // shape.context // group.ranks
    whole = share // launch.micro_rows
    # Two at least: where gradients wait for those of the next micro-batch, memory is another.
    affordable = max(2, int(limit_s / steps / (expected_step_s / whole)))
    accumulated = min(whole, MOST_ACCUMULATED, affordable)
    rows = group.ranks * launch.micro_rows * accumulated
    short = training.model_copy(update={"batch_tokens": rows * shape.context})
    draws = np.random.default_rng(0)
    dtype = np.uint16 if shape.vocabulary <= 65_536 else np.uint32
    ids = draws.integers(0, shape.vocabulary, rows * shape.context * 4 + 1, dtype=dtype)
    sets = [TokenSet(1.0, TokenStream([ids]))]
    quiet = dataclasses.replace(launch, probed=False)
    updates = Updates(shape, short, sets, sets, quiet, group, end_of_text=0)
    updates.start(0)
    seconds: list[float] = []
    started = time.monotonic()
    try:
        for step in range(steps):
            before = time.perf_counter()
            updates.update(step, step)
            float(updates.mean_loss())  # waits for the device
            seconds.append(time.perf_counter() - before)
            spent = time.monotonic() - started > limit_s and step >= LEAST_STEPS
            if int(group.sum(torch.tensor(int(spent)))):  # the ranks stop together
                break
    finally:
        updates.stop()
    counted = seconds[min(WARM_UP, len(seconds) - LEAST_STEPS) :]
    scale = whole / accumulated
    return {
        "step_s": statistics.fmean(counted) * scale,
        "step_s_quartiles": [q * scale for q in statistics.quantiles(counted, n=4)],
        "steps": len(counted),
        "accumulated": accumulated,
        "peak_memory_bytes": peak_memory_bytes(launch.device),
    }
