"""What a training run will take: parameters, memory, arithmetic, disk and time, before it is spent.

Arithmetic and one short measurement; nothing here builds a model or reads a token. Parameters and
FLOPs are `snakegpt.model`'s and exact; memory and time are estimates, and the report sets them beside
what really happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from snakegpt.errors import UserError
from snakegpt.model import Shape, flops_per_token, n_parameters
from snakegpt.progress import duration, quantity
from snakegpt.shards import token_bytes

# Share of the matrix-product rate that whole training steps reach. CPU: eager nanoGPT-like steps ran
# at 55-70 % of the measured peak over models of 0.8M to 124M parameters (Zen 4, float32 and bfloat16).
# CUDA: 40-50 % of the measured peak are public 124M figures (llm.c, modded-nanogpt) of tuned code.
EFFICIENCY = {"cpu": 0.6, "cuda": 0.4, "mps": 0.4}

# UTF-8 bytes of English text per id. GPT-2: 3.2 (Shakespeare) to 5.2 (speeches), 4.4 on web text; on
# Shakespeare cl100k_base 3.7, o200k_base 3.7, and merges learnt from it 3.1 (4,096 ids) to 4.2 (32,768).
BYTES_PER_TOKEN = {"gpt2": 4.0, "tiktoken": 4.4, "bpe": 3.7, "char": 1.0, "byte": 1.0}

# What a training process holds before its first tensor: interpreter, libraries, device context.
RUNTIME_BYTES = {"cpu": 350_000_000, "cuda": 600_000_000, "mps": 350_000_000}

STATES_AT_ONCE = 3  # the two that training_state keeps, and the next while it is written aside


@dataclass(frozen=True)
class Placement:
    """How training would run on this machine, as `snakegpt.distributed` resolves it.

    rows_per_rank  sequences of a micro-batch
    accumulation   micro-batches of one rank a step: batch = ranks x rows_per_rank x accumulation rows
    threads        of one rank
    attention      kernel: sdpa or math
    """

    device: str
    precision: str
    ranks: int
    rows_per_rank: int
    accumulation: int
    threads: int
    attention: str


# ---- what a run holds and writes --------------------------------------------------------------


def memory_bytes(shape: Shape, placement: Placement) -> dict[str, int]:
    """Peak memory of one rank by what holds it, with `total`.

    Parameters, gradients and AdamW moments are float32. Activations are what the backward pass reads,
    per token and layer: the residual stream before both norms (2 C, float32), and 15 C in the precision
    of the matrix products (norms 2, q k v 3, attention 2, MLP 4 + 4); Korthikanti et al. 2022 (eq. 2)
    count 34 C bytes in half precision. The written-out attention also keeps its weights. Cross-entropy
    peaks at 8 bytes a logit in float32 and 10 in bfloat16 (measured, torch 2.13).
    """
    N = n_parameters(shape)
    n_tokens = placement.rows_per_rank * shape.context
    half = placement.precision == "bfloat16"
    per_layer = shape.channels * (2 * 4 + 15 * (2 if half else 4))
    if placement.attention == "math":
        per_layer += shape.heads * shape.context * (6 if half else 4)
    if shape.dropout:
        per_layer += 2 * shape.channels  # the masks of both projections, a byte each
    memory = {
        "weights": 4 * N,
        "gradients": 4 * N,
        "optimizer": 8 * N,
        "half_precision_weights": 2 * N if half else 0,  # autocast keeps a copy during a pass
        "activations": n_tokens * shape.layers * per_layer,
        "logits": n_tokens * shape.vocabulary * (10 if half else 8),
        "runtime": RUNTIME_BYTES.get(placement.device, RUNTIME_BYTES["cpu"]),
    }
    return {**memory, "total": sum(memory.values())}


def disk_bytes(
    shape: Shape, corpus_bytes: int | None, corpus_tokens: int | None
) -> dict[str, int | None]:
    """What a run writes, by kind: raw corpus, token shards, last and best weights, saved states.

    A state is weights, both moments and the best weights so far: 16 bytes a parameter.
    """
    N = n_parameters(shape)
    disk: dict[str, int | None] = {
        "corpus": corpus_bytes,
        "tokens": token_bytes(shape.vocabulary) * corpus_tokens
        if corpus_tokens is not None
        else None,
        "weights": 2 * 4 * N,
        "states": STATES_AT_ONCE * 16 * N,
    }
    return {**disk, "total": sum(n_bytes for n_bytes in disk.values() if n_bytes is not None)}


# ---- the plan --------------------------------------------------------------------------------


def plan(
    shape: Shape,
    placement: Placement,
    *,
    batch_tokens: int,
    steps: int,
    validation_interval: int,
    validation_tokens: int | None,
    tokenizer_kind: str,
    corpus_bytes: int | None,
    validation_fraction: float,
    matmul_flops_per_s: float,
) -> dict[str, Any]:
    """Everything that can be said about a run beforehand, as `plan.json` holds it.

    corpus_bytes         raw bytes of the corpus; None while it is not locked
    matmul_flops_per_s   measured rate of the devices of all ranks together
    """
    tokens = batch_tokens * steps
    bytes_per_token = BYTES_PER_TOKEN.get(tokenizer_kind, 4.0)
    corpus_tokens = None if corpus_bytes is None else round(corpus_bytes / bytes_per_token)
    flops = flops_per_token(shape)
    limits = [validation_tokens]
    if corpus_tokens is not None:
        limits.append(round(corpus_tokens * validation_fraction))
    per_validation = min((limit for limit in limits if limit is not None), default=0)
    validated = math.ceil(steps / validation_interval) * per_validation
    efficiency = EFFICIENCY.get(placement.device, EFFICIENCY["cpu"])
    reached = efficiency * matmul_flops_per_s
    return {
        "device": placement.device,
        "precision": placement.precision,
        "ranks": placement.ranks,
        "rows_per_rank": placement.rows_per_rank,
        "accumulation": placement.accumulation,
        "threads": placement.threads,
        "attention": placement.attention,
        "n_vocab_padded": shape.vocabulary,
        "n_parameters": n_parameters(shape),
        "n_parameters_without_embedding": n_parameters(shape, embeddings=False),
        "memory_bytes": memory_bytes(shape, placement),
        "flops_per_token": flops,
        "total_flops": flops * tokens,
        "batch_tokens": batch_tokens,
        "steps": steps,
        "tokens": tokens,
        "corpus_bytes": corpus_bytes,
        "corpus_tokens_estimate": corpus_tokens,
        "epochs_estimate": tokens / corpus_tokens if corpus_tokens else None,
        "disk_bytes": disk_bytes(shape, corpus_bytes, corpus_tokens),
        "matmul_flops_per_s": matmul_flops_per_s,
        "rate_tokens_per_s_estimate": reached / flops,
        "time_estimate_s": flops * tokens / reached,
        # Forward passes only: a third of the arithmetic.
        "validation_time_estimate_s": flops * validated / 3 / reached,
        "assumptions": {
            "bytes_per_token": bytes_per_token,
            "efficiency": efficiency,
            "validation_fraction": validation_fraction,
            "flops": "6 N + 12 L C T a token, N without position embeddings (PaLM, nanoGPT)",
        },
    }


def refuse_what_cannot_fit(
    disk: Mapping[str, int | None], free_bytes: int, capacity_bytes: int, where: str
) -> None:
    """Stop before anything is spent where a disk cannot hold a run.

    Weights and states are still to be written, so they must fit what is free. Corpus and tokens may
    lie there already, so together with the rest they must fit the whole filesystem.

    raises   UserError
    """
    ahead = (disk["weights"] or 0) + (disk["states"] or 0)
    for need, have, what, kind in (
        (ahead, free_bytes, "weights and saved states", "free"),
        (disk["total"] or 0, capacity_bytes, "corpus, tokens, weights and saved states", "in all"),
    ):
        if need > have:
            raise UserError(
                f"the disk is too small: {what} take about {quantity(need, 'B')},"
                f" {where} has {quantity(have, 'B')} {kind}.\n"
                "  free some space, point the store elsewhere (store: in config.yaml, or"
                " SNAKEGPT_STORE),\n  or plan a smaller model or corpus"
            )


# ---- measurement -----------------------------------------------------------------------------


def measure_matmul(device: str, precision: str, *, limit_s: float = 0.5) -> float:
    """FLOP/s of square matrix products on one device with the threads torch is set to, best of many.

    The best time and not the mean: what the device can do, since EFFICIENCY is relative to that.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    synchronise = getattr(torch, device).synchronize if device in ("cuda", "mps") else lambda: None
    best = math.inf
    started = time.perf_counter()
    for _ in range(3):  # let clocks rise and libraries choose their kernels
        torch.mm(a, b)
    synchronise()
    while time.perf_counter() - started < limit_s or best == math.inf:
        before = time.perf_counter()
        torch.mm(a, b)
        synchronise()
        best = min(best, time.perf_counter() - before)
    return 2 * n**3 / best


# ---- for people ------------------------------------------------------------------------------


def table(plan: Mapping[str, Any]) -> list[str]:
    """The plan as lines of at most 80 columns: what, how much, how it is made up."""
    memory, disk, assumed = plan["memory_bytes"], plan["disk_bytes"], plan["assumptions"]
    batch = (
        f"{plan['ranks']} ranks x {plan['rows_per_rank']} rows x {plan['accumulation']} accumulated"
        if plan["ranks"] > 1
        else f"{plan['rows_per_rank']} rows x {plan['accumulation']} accumulated, one process"
    )
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    corpus, epochs = plan["corpus_tokens_estimate"], plan["epochs_estimate"]
    rows = [
        (
            "parameters",
            quantity(plan["n_parameters"]),
            f"{quantity(plan['n_parameters_without_embedding'])} without embeddings,"
            f" vocabulary {plan['n_vocab_padded']:,}",
        ),
        ("batch", f"{plan['batch_tokens']:,} tokens", batch),
        ("steps", f"{plan['steps']:,}", f"{quantity(plan['tokens'])} tokens in all"),
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
            f" {quantity(memory['activations'], 'B')}, logits {quantity(memory['logits'], 'B')}",
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
            f"{assumed['efficiency']:.0%} of {quantity(plan['matmul_flops_per_s'], 'FLOP/s')}"
            f" measured, {plan['precision']} on {plan['device']}",
        ),
        (
            "time",
            clock(plan["time_estimate_s"]),
            f"an estimate; and {clock(plan['validation_time_estimate_s'])} of validations",
        ),
    ]
    return [f"  {name:<15}{value:<17}{how}".rstrip() for name, value, how in rows]


def warnings(plan: Mapping[str, Any]) -> list[str]:
    """What may go wrong, one line each."""
    found = []
    # Ranks on CPU share the machine's memory; each GPU has its own.
    sharing = plan["ranks"] if plan["device"] == "cpu" else 1
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
    return duration(seconds) if seconds < 172_800 else f"{seconds / 86_400:.3g} days"
