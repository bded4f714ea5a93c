"""How well a model predicts a split: loss, perplexity, bits per byte; deterministic, in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from snakegpt.batches import TokenStream, sequential_batches
from snakegpt.model import GPT
from snakegpt.progress import Progress


@dataclass(frozen=True)
class Score:
    """What a model scores on the tokens of a split, or of one corpus in it.

    loss_nats      mean cross-entropy of a token
    loss_stderr    its standard error, as if tokens were independent draws (they are not: a lower bound)
    perplexity     exp(loss_nats): how many equally likely tokens would be as surprising
    bits_per_byte  bits to code a byte of text; comparable across tokenizers, unlike the others
    n_tokens       targets that the loss is the mean of
    n_bytes        UTF-8 bytes that they decode to
    """

    loss_nats: float
    loss_stderr: float
    perplexity: float
    bits_per_byte: float
    n_tokens: int
    n_bytes: int


@torch.no_grad()
def evaluate(
    model: GPT,
    streams: Sequence[TokenStream],
    token_bytes: NDArray[np.int32],
    *,
    rows: int,
    n_targets: int | None = None,
    progress: Progress | None = None,
) -> tuple[Score, list[Score]]:
    """Score a model on a split: on all of it, and on each of its streams, one a corpus.

    Windows in order, every token of a stream but the first a target once.

    token_bytes  UTF-8 bytes of each id, 0 for special ones
    rows         windows at once; changes no more than rounding
    n_targets    of a stream, at most; None: all of it
    """
    device = next(model.parameters()).device
    bytes_of_V = torch.from_numpy(token_bytes.astype(np.int64))
    losses_SN, sizes_SN, done = [], [], 0
    for stream in streams:
        losses, sizes = [], []
        for ids_BT, targets_BT in sequential_batches(
            stream, model.shape.context, rows, n_targets=n_targets
        ):
            losses_BT: Tensor = model(ids_BT.to(device), targets_BT.to(device))
            losses.append(losses_BT.flatten().double().cpu())
            sizes.append(bytes_of_V[targets_BT.flatten()])
            done += targets_BT.numel()
            if progress:
                progress.update(done)
        losses_SN.append(torch.cat(losses))
        sizes_SN.append(torch.cat(sizes))
    parts = [_score(*pair) for pair in zip(losses_SN, sizes_SN, strict=True)]
    return _score(torch.cat(losses_SN), torch.cat(sizes_SN)), parts


def _score(loss_N: Tensor, bytes_N: Tensor) -> Score:
    mean = float(loss_N.mean())
    stderr = float(loss_N.std()) / math.sqrt(len(loss_N)) if len(loss_N) > 1 else math.inf
    return Score(
        loss_nats=mean,
        loss_stderr=stderr,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=bits_per_byte(loss_N, bytes_N),
        n_tokens=len(loss_N),
        n_bytes=int(bytes_N.sum()),
    )


def bits_per_byte(loss_N: Tensor, n_bytes_N: Tensor) -> float:
    """Compression rate of a model; comparable across tokenizers, unlike loss per token.

    loss_N     (N,) float, cross-entropy of each target token, nats
    n_bytes_N  (N,) int, UTF-8 bytes the target token decodes to; 0 leaves it out
    returns    bits per byte, lower is better
    raises     ValueError if no byte is counted
    source     nanochat's loss_eval; Gao et al. 2020 (The Pile), section 3.1
    """
    counted = n_bytes_N > 0
    if not counted.any():
        raise ValueError("no target token decodes to a byte of text")
    return float(loss_N[counted].sum()) / (math.log(2) * int(n_bytes_N.sum()))
