"""How training speeds up with ranks: short runs of the real update on 1, 2, 4, ... of them, and a verdict.

Weak scaling keeps the rows of a rank and lets the step grow with the ranks; strong scaling shares out the
step of the experiment. Each is run twice, with and without the exchange of gradients: the difference is
what communication costs beyond what it overlaps with (the weights are of no use afterwards).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from snakegpt.distributed import Group
from snakegpt.model import Shape
from snakegpt.progress import count, duration, quantity
from snakegpt.settings import Training
from snakegpt.tokens import TokenSet
from snakegpt.updates import Launch, Updates

STEPS = 20
WARMUP = 2
FINE = 0.10  # share of a step that exchanges may take without anybody minding
TOO_SLOW = 0.40  # beyond, neither overlap nor accumulation is likely to save it


def counts(ranks: int) -> list[int]:
    """1, 2, 4, ... and the number of ranks that training would use."""
    found = [2**k for k in range(ranks.bit_length()) if 2**k < ranks]
    return [*found, ranks]


def measure(
    shape: Shape,
    recipe: Training,
    train: list[TokenSet],
    launch: Launch,
    group: Group,
    *,
    end_of_text: int,
    rows: int,
    limit_s: float,
) -> dict[str, Any]:
    """Time updates of `rows` rows a step, as one of the ranks.

    limit_s  about how long each of the two runs may take; a slow machine takes fewer steps
    returns  step_s and its parts as seconds of a step, on every rank: compute_s (without exchanges, the
             slowest rank's), communication_s (what they add), data_s (waiting for batches, the slowest
             rank's), idle_s (what the mean rank waits for the slowest), and steps
    """
    recipe = recipe.model_copy(
        update={"batch_tokens": rows * shape.context, "skip_spikes_above": None}
    )
    share = rows // group.ranks
    fitting = max(n for n in range(1, launch.micro_rows + 1) if share % n == 0)
    launch = replace(launch, micro_rows=fitting, probed=False)
    updates = Updates(shape, recipe, train, train, launch, group, end_of_text)
    with_exchange = _timed(updates, limit_s)
    with _staying_local(updates):
        without = _timed(updates, limit_s)
    compute_s, mean_compute_s = without["slowest_s"], without["mean_s"]
    step_s = with_exchange["slowest_s"]
    return {
        "ranks": group.ranks,
        "rows": rows,
        "accumulation": updates.accumulation,
        "steps": with_exchange["steps"],
        "step_s": step_s,
        "compute_s": compute_s,
        "communication_s": max(0.0, step_s - compute_s) if group.ranks > 1 else 0.0,
        "data_s": with_exchange["data_s"],
        "idle_s": compute_s - mean_compute_s,
    }


def _timed(updates: Updates, limit_s: float) -> dict[str, Any]:
    """Mean seconds of a step: of the slowest rank, of the mean rank, and what the slowest waited for data."""
    group, device = updates.group, updates.launch.device
    waited = [0.0]
    updates.start(0)
    updates._micro_batches = _counting(updates._micro_batches, waited)
    try:
        for step in range(WARMUP):
            updates.update(step, step)
        _finish(group, device)
        started = time.perf_counter()
        waited[0] = 0.0
        done = 0
        while done < STEPS:
            updates.update(WARMUP + done, WARMUP + done)
            done += 1
            _synchronise(device)
            # All ranks stop at the same step, by the clock of the first.
            over = torch.tensor(float(time.perf_counter() - started > limit_s and done >= 3))
            if group.ranks > 1 and done in (3, 6, 12):
                dist.broadcast(over, 0)
            if bool(over) and (group.ranks == 1 or done in (3, 6, 12)):
                break
        mine_s = (time.perf_counter() - started) / done
    finally:
        updates.stop()
    values = torch.tensor([mine_s, waited[0] / done], dtype=torch.float64)
    total = values.clone()
    if group.ranks > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        dist.all_reduce(total)
    mean_s = float(total[0]) / group.ranks
    return {
        "slowest_s": float(values[0]),
        "mean_s": mean_s,
        "data_s": float(values[1]),
        "steps": done,
    }


def _counting(batches: Iterator[Any], waited: list[float]) -> Iterator[Any]:
    while True:
        before = time.perf_counter()
        batch = next(batches)
        waited[0] += time.perf_counter() - before
        yield batch


@contextlib.contextmanager
def _staying_local(updates: Updates) -> Iterator[None]:
    """Let ranks keep their gradients to themselves, as they do between the micro-batches of a step."""
    exchanging = updates.strategy.exchanging
    updates.strategy.exchanging = lambda last: exchanging(False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        updates.strategy.exchanging = exchanging  # type: ignore[method-assign]


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _finish(group: Group, device: str) -> None:
    _synchronise(device)
    if group.ranks > 1:
        dist.barrier()


# ---- what follows ----------------------------------------------------------------------------


def efficiencies(
    weak: Sequence[Mapping[str, Any]], strong: Sequence[Mapping[str, Any]]
) -> list[dict[str, float]]:
    """For each number of ranks: ideal time over measured time, 1 being perfect.

    weak, strong   rows of `measure`, the fewest ranks first, against which the others stand
    """
    fewest = strong[0]
    return [
        {
            "ranks": w["ranks"],
            "weak": weak[0]["step_s"] / w["step_s"],
            "strong": fewest["ranks"] * fewest["step_s"] / (s["ranks"] * s["step_s"]),
        }
        for w, s in zip(weak, strong, strict=True)
    ]


def verdict(
    strong: Sequence[Mapping[str, Any]],
    *,
    gradient_bytes: int,
    batch_tokens: int,
    steps: int,
    strategy: str,
    asked_for: bool = False,
    halvable: bool = False,
) -> dict[str, Any]:
    """What the widest run says about the full one.

    gradient_bytes  as they are sent
    strategy        that training would use; fsdp where the states do not fit one device, ...
    asked_for       ... unless the settings ask for it by name
    halvable        whether they could be sent as bfloat16 instead
    returns         kind (fine, accumulate, fsdp, wire), text, and the predicted time of all steps
    """
    widest = strong[-1]
    ranks, step_s = widest["ranks"], widest["step_s"]
    rate = batch_tokens / step_s
    whole_s = steps * step_s
    expected = (
        f"expect {quantity(rate, ' tokens/s')} and {duration(whole_s)} for all {steps:,} steps"
    )
    share = widest["communication_s"] / step_s
    fewest = strong[0]
    found = {"predicted_s": whole_s, "rate_tokens_per_s": rate, "communication_share": share}
    if ranks == 1:
        return {**found, "kind": "fine", "text": f"one rank: {expected}."}
    slower = step_s > fewest["step_s"]
    if strategy == "fsdp" and not asked_for:
        return {
            **found,
            "kind": "fsdp",
            "text": f"use fsdp: the states of all parameters do not fit one device; {expected}.",
        }
    if share <= FINE:
        text = f"fine with {strategy}: exchanges take {share:.0%} of a step on {ranks} ranks; {expected}."
        return {**found, "kind": "fine", "text": text}
    # A ring sends 2 (n - 1) / n of the gradients over every link; with FINE of the step for that:
    allowed_s = widest["compute_s"] * FINE / (1 - FINE)
    wanted_bit_per_s = 8 * gradient_bytes * 2 * (ranks - 1) / ranks / allowed_s
    needs = f"{quantity(wanted_bit_per_s, 'bit/s')} between ranks would bring it to {FINE:.0%}"
    if halvable:
        at_best = batch_tokens / (step_s - widest["communication_s"] / 2)
        needs = (
            "training.gradient_exchange = bfloat16 would halve what is sent (at best"
            f" {quantity(at_best, ' tokens/s')}), and {needs}"
        )
    if share <= TOO_SLOW and not slower:
        text = (
            f"overlap or accumulate more: exchanges take {share:.0%} of a step on {ranks} ranks,"
            f" micro-batches of each: {widest['accumulation']}; larger batch_tokens"
            f" exchange as much less often; {needs}; {expected}."
        )
        return {**found, "kind": "accumulate", "text": text}
    worse = f", slower than {count(fewest['ranks'], 'rank')} alone" if slower else ""
    text = (
        f"the wire is too slow: exchanges take {share:.0%} of a step on {ranks} ranks{worse};"
        f" {needs}; {expected}."
    )
    return {**found, "kind": "wire", "text": text}


def table(
    weak: Sequence[Mapping[str, Any]], strong: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Rows of text for people: a heading, then one for each number of ranks."""
    heading = ["ranks", "step", "compute", "exchange", "data", "idle", "weak", "strong"]
    rows = [heading]
    for measured, how in zip(strong, efficiencies(weak, strong), strict=True):
        parts = [
            measured[f"{part}_s"] / measured["step_s"]
            for part in ("compute", "communication", "data", "idle")
        ]
        rows.append(
            [
                str(measured["ranks"]),
                f"{measured['step_s'] * 1e3:.4g} ms",
                *(f"{part:.0%}" for part in parts),
                f"{how['weak']:.2f}",
                f"{how['strong']:.2f}",
            ]
        )
    return rows
