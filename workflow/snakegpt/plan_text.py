"""A plan for people: a table for the terminal, what may go wrong, and the learning rate drawn in a line."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from snakegpt.progress import columns, duration, quantity

COMMON = ("T4", "RTX 4090", "L40S", "A100 80GB", "H100", "H200", "B200", "MI300X")
LEVELS = "▁▂▃▄▅▆▇█"
DRAWN = 44  # columns


def table(plan: Mapping[str, Any]) -> list[str]:
    """The plan as lines of at most 80 columns: what, how much, how it is made up."""
    memory, disk, assumed = plan["memory_bytes"], plan["disk_bytes"], plan["assumptions"]
    nodes = f" on {plan['nodes']} nodes" if plan["nodes"] > 1 else ""
    batch = (
        f"{plan['ranks']} ranks{nodes} x {plan['rows_per_rank']} rows x {plan['accumulation']} accumulated"
        if plan["ranks"] > 1
        else f"{plan['rows_per_rank']} rows x {plan['accumulation']} accumulated, one process"
    )
    states = memory["weights"] + memory["gradients"] + memory["optimizer"] + memory["gathered"]
    corpus, epochs = plan["corpus_tokens_estimate"], plan["epochs_estimate"]
    calibration = plan["calibration"]
    twice = ", computed twice" if plan["activation_checkpointing"] else ""
    rows = [
        (
            "parameters",
            quantity(plan["n_parameters"]),
            f"{quantity(plan['n_parameters_without_embedding'])} without embeddings,"
            f" vocabulary {plan['n_vocab_padded']:,}",
        ),
        ("batch", f"{plan['batch_tokens']:,} tokens", batch),
        ("steps", f"{plan['steps']:,}", _tokens(plan)),
        ("learning rate", _peak(plan["learning_rates"]), drawn(plan["learning_rates"])),
        (
            "corpus",
            "unknown" if corpus is None else f"{quantity(corpus)} tokens",
            "until it is locked: snakemake lock_corpora"
            if corpus is None
            else f"{epochs:{',.0f' if epochs >= 100 else '.3g'}} epochs, at {assumed['bytes_per_token']:g} bytes a token (assumed)",
        ),
        (
            "arithmetic",
            f"{plan['total_flops']:.3g} FLOP",
            f"{quantity(plan['flops_per_token'], 'FLOP')} a token (6N + 12LCT)",
        ),
        (
            "memory a rank",
            quantity(memory["total"], "B"),
            f"state {quantity(states, 'B')}, activations"
            f" {quantity(memory['activations'], 'B')}{twice}, logits {quantity(memory['logits'], 'B')}"
            + (f", allocator {quantity(memory['allocator'], 'B')}" if memory["allocator"] else ""),
        ),
        ("", "", f"{quantity(plan['available_memory_bytes'], 'B')} available here"),
        (
            "disk",
            quantity(disk["total"], "B"),
            f"tokens {quantity(disk['tokens'], 'B') if disk['tokens'] is not None else 'unknown'},"
            f" weights {quantity(disk['weights'], 'B')}, states {quantity(disk['states'], 'B')}",
        ),
        ("", "", f"{quantity(plan['free_disk_bytes'], 'B')} free here"),
        (
            "speed",
            f"{quantity(plan['rate_tokens_per_s_estimate'])} tokens/s",
            f"{calibration['steps']} steps measured, {plan['precision']} on {plan['device']}"
            if calibration
            else f"{assumed['efficiency']:.0%} of {quantity(plan['matmul_flops_per_s'], 'FLOP/s')}"
            f" measured, {plan['precision']} on {plan['device']}",
        ),
        (
            "time",
            clock(plan["time_estimate_s"]),
            f"an estimate; and {clock(plan['validation_time_estimate_s'])} of validations",
        ),
    ]
    lines = [f"  {name:<15}{value:<17}{how}".rstrip() for name, value, how in rows]
    return [*lines, *_verdict(plan["verdict"]), *gpu_table(plan)]


def _verdict(text: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=f"  {'verdict':<15}", subsequent_indent=17 * " ")


def gpu_table(plan: Mapping[str, Any]) -> list[str]:
    """Time, and cost where there are prices, on GPUs that people have."""
    priced = any(row.get("cost") is not None for row in plan["gpus"])
    head = ["GPUs", "strategy", "rows", "memory", "time", *(["cost"] if priced else [])]
    rows = [head]
    for row in plan["gpus"]:
        known = row["gpu"] in COMMON or row.get("cost") is not None
        if not known or "evenly" in row.get("reason", ""):
            continue
        name = f"{row['gpus']} x {row['gpu']}"
        if not row["fits"]:
            rows.append([name, "does not fit", "", "", "", *([""] if priced else [])])
            continue
        how = row["strategy"] + (" twice" if row["activation_checkpointing"] else "")
        figures = [f"{row['rows_per_rank']:,}", quantity(row["memory_bytes"], "B")]
        cost = [] if not priced else [f"{row['cost']:,.2f}" if row["cost"] is not None else ""]
        rows.append([name, how, *figures, clock(row["time_s"]), *cost])
    share = plan["assumptions"]["gpu_efficiency"]
    made = [f"  {line}" for line in columns(rows, "<<>>>>"[: len(head)])]
    return [f"  elsewhere, at {share:.0%} of the datasheets' peak (assumed):", *made]


def _tokens(plan: Mapping[str, Any]) -> str:
    tokens = quantity(plan["tokens"])
    if not plan["steps_done"]:
        return f"{tokens} tokens in all"
    return f"{tokens} tokens, {plan['steps_done']:,} steps are done"


def _peak(curve: Sequence[Sequence[float]]) -> str:
    return f"{max(rate for _, rate in curve):.3g} at peak"


def drawn(curve: Sequence[Sequence[float]], width: int = DRAWN) -> str:
    """A curve of [step, learning rate] as a line of blocks, 0 at the bottom."""
    last, top = curve[-1][0] or 1, max(rate for _, rate in curve) or 1
    heights = []
    for index in range(width):
        heights.append(_between(curve, last * index / (width - 1)) / top)
    return "".join(LEVELS[min(len(LEVELS) - 1, int(height * len(LEVELS)))] for height in heights)


def _between(curve: Sequence[Sequence[float]], step: float) -> float:
    for (left, low), (right, high) in pairwise(curve):
        if left <= step <= right:
            return low + (high - low) * (step - left) / (right - left)
    return curve[-1][1]


def warnings(plan: Mapping[str, Any]) -> list[str]:
    """What may go wrong, one line each."""
    found = []
    # Ranks on CPU share the machine's memory; each GPU has its own.
    sharing = plan["ranks"] // plan["nodes"] if plan["device"] == "cpu" else 1
    memory = plan["memory_bytes"]["total"] * sharing
    if memory > plan["available_memory_bytes"]:
        found.append(
            f"about {quantity(memory, 'B')} of memory are needed and"
            f" {quantity(plan['available_memory_bytes'], 'B')} are available:"
            " set execution.rows_per_rank lower"
        )
    if plan["disk_bytes"]["total"] > plan["free_disk_bytes"]:
        found.append(
            f"{quantity(plan['disk_bytes']['total'], 'B')} will be written in all and"
            f" {quantity(plan['free_disk_bytes'], 'B')} are free: enough only if corpus and tokens are"
            " already there"
        )
    return found


def clock(seconds: float) -> str:
    """A planned time as people say it: seconds to minutes exactly, days from two days on."""
    if seconds < 1:
        return "< 1 s"
    return duration(seconds) if seconds < 172_800 else f"{seconds / 86_400:.3g} days"
