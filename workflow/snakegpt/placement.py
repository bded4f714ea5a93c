"""What settings mean on this machine: the model's shape and how a rank takes its rows through it.

The plan and the benchmark ask here as training does, so that what they say is what training will do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from snakegpt import distributed
from snakegpt.model import AttentionKernel, Shape, choose_kernel, padded_vocabulary
from snakegpt.settings import Execution, Model, Training


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


class Passes(NamedTuple):
    """How a rank takes its share of a step through the network."""

    dtype: torch.dtype
    kernel: AttentionKernel
    micro_rows: int


def choose_passes(
    training: Training, execution: Execution, shape: Shape, *, device: str, share: int
) -> Passes:
    """Resolve precision, attention kernel and micro-batch; `share` is the rows of one rank in a step."""
    dtype = distributed.choose_precision(training.precision, device)
    kernel = execution.attention
    micro_rows = distributed.choose_micro_rows(
        execution.rows_per_rank,
        device=device,
        share=share,
        context=shape.context,
        vocabulary=shape.vocabulary,
        width=shape.layers * shape.channels,
    )
    return Passes(
        dtype,
        choose_kernel(device, dtype, shape.context) if kernel == "auto" else kernel,
        micro_rows,
    )
