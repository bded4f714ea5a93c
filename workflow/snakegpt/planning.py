"""What a training run will take: parameters, memory, arithmetic, disk, time and money, before it is spent.

Arithmetic alone; nothing here builds a model or reads a token. Parameters and FLOPs are `snakegpt.model`'s
and exact; memory and time are estimates, and the report sets them beside what really happened.
`snakegpt.calibration` measures what this machine does, `snakegpt.plan_text` says it all to people.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from snakegpt.distributed import Strategy, gpu_micro_batches, slices_that_fit
from snakegpt.errors import UserError
from snakegpt.gpus import GPUS, Gpu
from snakegpt.losses import LossKernel, choose_loss, chunk_logits
from snakegpt.model import Shape, flops_per_token, n_parameters
from snakegpt.optimizer import Muon, schedule_of
from snakegpt.progress import quantity
from snakegpt.settings import Training
from snakegpt.shards import token_bytes

# Share of a peak that whole training steps reach, where nothing was measured. CPU, of a measured matrix
# product: eager steps ran at 55-70 % over models of 0.8M to 124M parameters (Zen 4). GPUs, of the
# datasheet's peak: public 124M figures are 29 % (nanoGPT), 40-50 % (nanochat, modded-nanogpt) and 60 %
# (llm.c on an A100).
EFFICIENCY = {"cpu": 0.6, "cuda": 0.4, "mps": 0.4}

# UTF-8 bytes of English text per id. GPT-2: 3.2 (Shakespeare) to 5.2 (speeches), 4.4 on web text; on
# Shakespeare cl100k_base 3.7, o200k_base 3.7, and merges learnt from it 3.1 (4,096 ids) to 4.2 (32,768).
BYTES_PER_TOKEN = {"gpt2": 4.0, "tiktoken": 4.4, "bpe": 3.7, "char": 1.0, "byte": 1.0}

# What a training process holds before its first tensor: interpreter, libraries, device context.
RUNTIME_BYTES = {"cpu": 400_000_000, "cuda": 600_000_000, "mps": 400_000_000}

# Bytes that the backward pass finds, per token, layer and channel, in float32 and in half precision: what
# autograd kept of a forward pass (torch 2.13). In gpt2 they are 16 channels in the precision of the matrix
# products: the residual stream before both norms 2, norms 2, q k v 3, attention 1, MLP 4 + 4.
ACTIVATION_BYTES = {
    ("gpt2", "sdpa"): (64, 32),
    ("gpt2", "math"): (64, 32),
    ("modern", "sdpa"): (84, 50.5),
    ("modern", "math"): (72, 44.5),
}

STATES_BESIDE = 2  # those kept: one to go back to, and the next while it is written aside
USABLE = 0.92  # of a GPU's nominal memory: drivers, error correction, and room between blocks
GPUS_A_NODE = 8
SCHEDULE_POINTS = 60


@dataclass(frozen=True)
class Placement:
    """How training would run somewhere, as `snakegpt.placement` and `snakegpt.distributed` resolve it.

    rows_per_rank  sequences of a micro-batch
    accumulation   micro-batches of one rank a step: batch = ranks x rows_per_rank x accumulation rows
    threads        of one rank
    attention      kernel: sdpa, math or flex
    nodes          machines that the ranks are on, as many on each
    slices         ranks that fsdp slices everything among; None: all
    """

    device: str
    precision: str
    ranks: int
    rows_per_rank: int
    accumulation: int
    threads: int
    attention: str
    strategy: Strategy = "ddp"
    loss: LossKernel = "plain"
    activation_checkpointing: bool = False
    nodes: int = 1
    slices: int | None = None


# ---- what a run holds and writes --------------------------------------------------------------


def memory_bytes(shape: Shape, placement: Placement, optimizer: str = "adamw") -> dict[str, int]:
    """Peak memory of one rank by what holds it, and `total`: the most that is held at once.

    That is less than the sum where gradients come only as activations go: in the one micro-batch of a
    step of one rank. Weights, gradients and moments are float32 in every strategy; zero1 shares out the
    moments, fsdp all three among `slices` ranks, and holds two blocks and the embeddings whole.
    """
    N, R, C = n_parameters(shape), placement.ranks, shape.channels
    block = 12 * C * C
    embeddings = N - n_parameters(shape, embeddings=False)
    moments = 8 * N if optimizer == "adamw" else 8 * N - 4 * shape.layers * block
    shards, slices = placement.strategy == "fsdp", placement.slices or R
    half = placement.precision != "float32"
    n_tokens = placement.rows_per_rank * shape.context
    memory = {
        "weights": 4 * N // (slices if shards else 1),
        "gathered": 4 * (embeddings + 2 * block) if shards else 0,
        "gradients": 4 * N // (slices if shards else 1),
        "optimizer": moments // {"ddp": 1, "zero1": R, "fsdp": slices}[placement.strategy],
        "half_precision_weights": 2 * N if half else 0,  # autocast keeps a copy during a pass
        "activations": round(n_tokens * _activation_bytes(shape, placement)),
        "logits": _logits_bytes(shape, placement, n_tokens),
        "runtime": RUNTIME_BYTES.get(placement.device, RUNTIME_BYTES["cpu"]),
    }
    always = memory["weights"] + memory["gathered"] + memory["optimizer"] + memory["runtime"]
    passing = memory["half_precision_weights"] + memory["activations"] + memory["logits"]
    # Where no gradient is there yet, the head's comes first, beside all that.
    gradients_first = placement.accumulation == 1 and R == 1
    early = 4 * shape.vocabulary * C if gradients_first else memory["gradients"]
    late = memory["gradients"] + memory["half_precision_weights"]
    moving = memory["gradients"]
    if optimizer == "muon":  # the new matrices, and four that the iteration holds of a product
        largest = min(Muon.BATCH_ELEMENTS, shape.layers * 4 * C * C)
        moving += 4 * shape.layers * block + 4 * 4 * largest
    return {**memory, "total": always + max(passing + early, late, moving)}


def _activation_bytes(shape: Shape, placement: Placement) -> float:
    """Of a token: what all layers keep for the backward pass."""
    half = placement.precision != "float32"
    kernel = "math" if placement.attention == "math" else "sdpa"
    layer = shape.channels * ACTIVATION_BYTES[shape.architecture, kernel][half]
    if kernel == "math":  # the weights of attention, which softmax gives in float32 on a GPU
        layer += (
            shape.heads * shape.context * (4 if not half else 6 if placement.device != "cpu" else 2)
        )
    if shape.dropout:
        layer += 2 * shape.channels  # the masks of both projections, a byte each
    if placement.activation_checkpointing:  # what goes into each block, and one block in full
        return shape.layers * shape.channels * 4 + layer
    return shape.layers * layer


def _logits_bytes(shape: Shape, placement: Placement, n_tokens: int) -> int:
    """What cross-entropy holds at its peak: measured with torch 2.13, in bytes a logit."""
    half = placement.precision != "float32"
    each = (10 if half else 8) + (8 if shape.softcap is not None else 0)
    if placement.loss == "plain":
        return n_tokens * shape.vocabulary * each
    if half and placement.device == "cuda":
        each = 4  # scores and slopes: what is between them is one kernel
    # A chunk; the gradients of its inputs are made with it.
    held = min(n_tokens * shape.vocabulary, chunk_logits(placement.device))
    return held * each + 4 * n_tokens * shape.channels


def disk_bytes(
    shape: Shape, corpus_bytes: int | None, corpus_tokens: int | None, keep_states: int = 2
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
        "states": (keep_states + STATES_BESIDE) * 16 * N,
    }
    return {**disk, "total": sum(n_bytes for n_bytes in disk.values() if n_bytes is not None)}


# ---- elsewhere --------------------------------------------------------------------------------


def fitting(
    shape: Shape, training: Training, precision: str, ranks: int, memory_gib: float
) -> tuple[Placement, int] | None:
    """How the run fits GPUs of this nominal memory, and a rank's bytes there; None if it does not.

    The strategy that shares least and the largest micro-batch that fits, as training would choose them;
    activations are computed twice only where nothing fits otherwise.
    """
    rows = training.batch_tokens // shape.context
    if ranks > rows or rows % ranks:
        return None
    room = USABLE * memory_gib * 2**30
    share = rows // ranks
    strategies: tuple[Strategy, ...] = ("ddp", "zero1", "fsdp") if ranks > 1 else ("ddp",)
    a_node, bytes_of_gpu = min(ranks, GPUS_A_NODE), memory_gib * 2**30
    slices = slices_that_fit(n_parameters(shape), ranks, a_node, bytes_of_gpu)
    for twice in (False, True):
        for strategy in strategies:
            for micro_rows in reversed(gpu_micro_batches(share, shape.context)):
                dtype = getattr(torch, precision)
                placement = Placement(
                    device="cuda",
                    precision=precision,
                    ranks=ranks,
                    rows_per_rank=micro_rows,
                    accumulation=share // micro_rows,
                    threads=1,
                    attention="sdpa",
                    strategy=strategy,
                    loss=choose_loss(shape.vocabulary, micro_rows * shape.context, dtype),
                    activation_checkpointing=twice,
                    nodes=ranks // a_node,
                    slices=slices,
                )
                need = memory_bytes(shape, placement, training.optimizer)["total"]
                if need <= room:
                    return placement, need
    return None


def on_gpus(
    shape: Shape, training: Training, prices: Mapping[str, float], steps_done: int = 0
) -> Iterator[dict[str, Any]]:
    """The run on one GPU and on a node of eight, for every GPU in the table.

    prices      of an hour of one GPU, by name, as the settings give them; without one there is no cost
    steps_done  by the run that this one continues
    """
    tokens = training.batch_tokens * (training.steps - steps_done)
    for gpu in GPUS:
        for n in (1, GPUS_A_NODE):
            yield _on_gpu(gpu, n, shape, training, tokens, prices.get(gpu.name))


def _on_gpu(
    gpu: Gpu, n: int, shape: Shape, training: Training, tokens: int, price: float | None
) -> dict[str, Any]:
    precision = "bfloat16" if gpu.bfloat16 else "float16"
    row: dict[str, Any] = {"gpu": gpu.name, "gpus": n, "precision": precision}
    rows = training.batch_tokens // shape.context
    if rows % n:
        return {**row, "fits": False, "reason": f"{n} GPUs cannot share {rows:,} rows evenly"}
    found = fitting(shape, training, precision, n, gpu.memory)
    if found is None:
        return {**row, "fits": False, "reason": "too little memory"}
    placement, need = found
    peak = gpu.peak_flops_per_s(precision)
    assert peak is not None
    # Activations computed twice: a forward pass more, which is a third of the rest.
    flops = flops_per_token(shape) * (4 / 3 if placement.activation_checkpointing else 1)
    rate = EFFICIENCY["cuda"] * peak * n / flops
    time_s = tokens / rate
    return {
        **row,
        "fits": True,
        "strategy": placement.strategy,
        "rows_per_rank": placement.rows_per_rank,
        "accumulation": placement.accumulation,
        "activation_checkpointing": placement.activation_checkpointing,
        "memory_bytes": need,
        "rate_tokens_per_s": rate,
        "time_s": time_s,
        "cost": None if price is None else price * n * time_s / 3600,
    }


def verdict(shape: Shape, training: Training) -> str:
    """The least that the run needs, in a sentence: one GPU if one will do, else a node, else nodes."""
    for memory in (8, 12, 16, 24, 32, 40, 48, 80):
        found = fitting(shape, training, "bfloat16", 1, memory)
        if found:
            return f"fits with ddp on one {memory} GB GPU{_twice(found[0])}"
    for memory in (16, 24, 40, 48, 80):
        found = fitting(shape, training, "bfloat16", GPUS_A_NODE, memory)
        if found:
            strategy = found[0].strategy
            return f"does not fit below {GPUS_A_NODE} x {memory} GB: use {strategy} there{_twice(found[0])}"
    for nodes in (2, 4, 8, 16, 32, 64, 128):
        found = fitting(shape, training, "bfloat16", nodes * GPUS_A_NODE, 80)
        if found:
            return (
                f"does not fit below {nodes * GPUS_A_NODE} x 80 GB: use fsdp on {nodes} nodes"
                f"{_twice(found[0])}"
            )
    return (
        "fits no number of 80 GB GPUs that the rows of a step can be shared among: model and context"
        " want tensor or pipeline parallelism, which snakegpt does not have"
    )


def _twice(placement: Placement) -> str:
    return ", activations computed twice" if placement.activation_checkpointing else ""


# ---- the plan --------------------------------------------------------------------------------


def plan(
    shape: Shape,
    placement: Placement,
    training: Training,
    *,
    tokenizer_kind: str,
    corpus_bytes: int | None,
    validation_fraction: float,
    matmul_flops_per_s: float,
    calibration: Mapping[str, Any] | None = None,
    prices: Mapping[str, float] | None = None,
    keep_states: int = 2,
    steps_done: int = 0,
) -> dict[str, Any]:
    """Everything that can be said about a run beforehand, as `plan.json` holds it.

    corpus_bytes         raw bytes of the corpus; None while it is not locked
    matmul_flops_per_s   measured rate of the devices of all ranks together
    calibration          what `snakegpt.calibration` measured; None leaves an efficiency to be assumed
    steps_done           by the run that this one continues
    """
    ahead = training.steps - steps_done
    tokens = training.batch_tokens * ahead
    bytes_per_token = BYTES_PER_TOKEN.get(tokenizer_kind, 4.0)
    corpus_tokens = None if corpus_bytes is None else round(corpus_bytes / bytes_per_token)
    flops = flops_per_token(shape)
    limits = [training.validation_tokens]
    if corpus_tokens is not None:
        limits.append(round(corpus_tokens * validation_fraction))
    per_validation = min((limit for limit in limits if limit is not None), default=0)
    validations = math.ceil(training.steps / training.validation_interval)
    validated = (validations - steps_done // training.validation_interval) * per_validation
    efficiency = EFFICIENCY.get(placement.device, EFFICIENCY["cpu"])
    rate = efficiency * matmul_flops_per_s / flops
    if calibration is not None:
        rate = training.batch_tokens / calibration["step_s"]
    return {
        **dataclasses.asdict(placement),
        "architecture": shape.architecture,
        "optimizer_kind": training.optimizer,
        "n_vocab_padded": shape.vocabulary,
        "n_parameters": n_parameters(shape),
        "n_parameters_without_embedding": n_parameters(shape, embeddings=False),
        "memory_bytes": _as_tried(memory_bytes(shape, placement, training.optimizer), calibration),
        "flops_per_token": flops,
        "total_flops": flops * tokens,
        "batch_tokens": training.batch_tokens,
        "steps": training.steps,
        "steps_done": steps_done,
        "tokens": tokens,
        "corpus_bytes": corpus_bytes,
        "corpus_tokens_estimate": corpus_tokens,
        "epochs_estimate": tokens / corpus_tokens if corpus_tokens else None,
        "disk_bytes": disk_bytes(shape, corpus_bytes, corpus_tokens, keep_states),
        "matmul_flops_per_s": matmul_flops_per_s,
        "calibration": None if calibration is None else dict(calibration),
        "rate_tokens_per_s_estimate": rate,
        "time_estimate_s": tokens / rate,
        # Forward passes only: a third of the arithmetic.
        "validation_time_estimate_s": validated / 3 / rate,
        "learning_rates": learning_rates(training),
        "gpus": list(on_gpus(shape, training, prices or {}, steps_done)),
        "verdict": verdict(shape, training),
        "assumptions": {
            "bytes_per_token": bytes_per_token,
            "efficiency": None if calibration is not None else efficiency,
            "gpu_efficiency": EFFICIENCY["cuda"],
            "validation_fraction": validation_fraction,
            "flops": "6 N + 12 L C T a token, N without position embeddings (PaLM, nanoGPT)",
        },
    }


def _as_tried(memory: dict[str, int], calibration: Mapping[str, Any] | None) -> dict[str, int]:
    """Memory by part, and what the steps that were tried held beyond it.

    That is `allocator`: freed memory in pieces too small for the next tensor, on a CPU up to as much
    again as activations and logits, and by no rule that we know.
    """
    tried = calibration["peak_memory_bytes"] if calibration is not None else 0
    beyond = max(0, tried - memory["total"])
    return {**memory, "allocator": beyond, "total": memory["total"] + beyond}


def learning_rates(training: Training) -> list[list[float]]:
    """The schedule as a curve: some [step, learning rate], ends and corners among them."""
    schedule = schedule_of(training)
    last = training.steps - 1
    steps = {round(last * index / SCHEDULE_POINTS) for index in range(SCHEDULE_POINTS + 1)}
    corners = (schedule.warmup_steps, schedule.decay_steps - schedule.cooldown_steps)
    steps |= {min(corner, last) for corner in corners} | {min(schedule.decay_steps, last)}
    return [[step, training.learning_rate * schedule.at(step)] for step in sorted(steps)]


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
