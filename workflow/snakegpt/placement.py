"""What settings mean on this machine: the model's shape and how a rank takes its rows through it.

The plan and the benchmark ask here as training does, so that what they say is what training will do.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch

from snakegpt import distributed
from snakegpt.errors import UserError
from snakegpt.losses import LossKernel, choose_loss
from snakegpt.model import AttentionKernel, Shape, choose_kernel, padded_vocabulary
from snakegpt.settings import Execution, Model, Training, order_problem


def shape_of(model: Model, n_vocab: int) -> Shape:
    """The network that the settings describe, for a tokenizer of `n_vocab` ids."""
    return Shape(
        vocabulary=padded_vocabulary(n_vocab, model.vocabulary_multiple),
        layers=model.layers,
        heads=model.heads,
        channels=model.channels,
        context=model.context,
        dropout=model.dropout,
        bias=model.architecture == "gpt2" and model.bias is not False,
        architecture=model.architecture,
        tied=model.tie_embeddings is not False,
        softcap=model.logit_softcap,
    )


def rows_of_a_step(model: Model, training: Training) -> int:
    """Windows of one optimiser step, over all ranks.

    raises   UserError if `batch_tokens` is no whole number of them
    """
    rows, rest = divmod(training.batch_tokens, model.context)
    if rest or not rows:
        raise UserError(
            f"training.batch_tokens = {training.batch_tokens:,} is not a multiple of"
            f" model.context = {model.context:,}.\n"
            f"  nearest that fit: {max(rows, 1) * model.context:,} and"
            f" {(max(rows, 1) + 1) * model.context:,}; or change model.context"
        )
    return rows


def in_one_order(execution: Execution, rows: int) -> Execution:
    """What `deterministic` means for the other execution settings; without it they stay as they are.

    No number of ranks may change a bit, so all micro-batches are of one size. A step is cut into as many
    as its rows and 64 have in common, so that every power of two of ranks up to that can share them.

    rows     of a step
    raises   UserError for a strategy or a micro-batch that does not go with it
    """
    if not execution.deterministic:
        return execution
    if problem := order_problem(execution):
        raise UserError(problem)
    # cuBLAS adds up in one order only with a workspace of its own, which it reads here.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    chosen = execution.rows_per_rank
    size = rows // math.gcd(rows, 64) if chosen == "auto" else chosen
    if rows % size:
        raise UserError(
            f"execution.rows_per_rank = {size} does not divide the {rows:,} rows of a step.\n"
            "  set it to one of their divisors, or to auto"
        )
    return execution.model_copy(update={"rows_per_rank": size, "strategy": "ddp"})


def shares(execution: Execution, rows: int) -> int:
    """What ranks can be given of a step: its rows, or its micro-batches where those are all of one size.

    execution  as `in_one_order` returns it
    """
    return rows // int(execution.rows_per_rank) if execution.deterministic else rows


def threads_of_rank(execution: Execution, threads: int, local_ranks: int) -> int:
    """CPU threads of one of a machine's ranks."""
    # Another number of threads adds up matrix products in another order.
    return 1 if execution.deterministic else max(1, threads // local_ranks)


class Passes(NamedTuple):
    """How a rank takes its share of a step through the network."""

    dtype: torch.dtype
    kernel: AttentionKernel
    micro_rows: int
    loss: LossKernel


def choose_passes(
    training: Training, execution: Execution, shape: Shape, *, device: str, share: int
) -> Passes:
    """Resolve precision, kernels and micro-batch; `share` is the rows of one rank in a step."""
    dtype = distributed.choose_precision(training.precision, device)
    micro_rows = distributed.choose_micro_rows(
        execution.rows_per_rank,
        device=device,
        share=share,
        context=shape.context,
        vocabulary=shape.vocabulary,
        width=shape.layers * shape.channels,
    )
    kernel, loss = execution.attention, execution.cross_entropy
    masks = training.document_masking
    if kernel == "auto":
        kernel = choose_kernel(device, dtype, shape.context, masks_documents=masks)
    if kernel == "flex" and (device != "cuda" or not masks):
        raise UserError(
            "execution.attention = flex is for training.document_masking on cuda.\n"
            "  set it to auto, sdpa or math"
        )
    if kernel == "flex" and shape.dropout:
        raise UserError(
            "flex attention draws no dropout: set model.dropout = 0, or execution.attention = sdpa."
        )
    if loss == "chunked" and dtype == torch.float16:
        raise UserError(
            "execution.cross_entropy = chunked does not go with float16: it makes gradients before they"
            " are scaled, and small ones would vanish.\n  set it to auto or plain"
        )
    if loss == "auto":
        loss = choose_loss(shape.vocabulary, micro_rows * shape.context, dtype)
    return Passes(dtype, kernel, micro_rows, loss)
