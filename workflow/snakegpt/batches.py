"""Which tokens are trained on at which step, and validated on in which order.

A split's shards are read as one stream of N tokens, cut into windows of T: window i has the inputs
[i T, i T + T) and the targets one further. Training takes the windows in a random order without
replacement, another one each epoch: the batch of R rows at a step is the windows at the places
[step R, step R + R) of that endless order. It is a pure function of (seed, step): no history, no state
to save, and the same rows however many ranks and micro-batches share them out. An epoch may end inside
a batch, and a batch may hold several small epochs.

The order is a permutation that is computed, not stored: a Feistel network over the next even number of
bits, walked until it lands below the number of windows (cycle walking; Black and Rogaway 2002). Any
keyed round function makes a Feistel network a bijection; ours mixes with splitmix64's finaliser.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from snakegpt.errors import UserError

ROUNDS = 6  # four suffice against an adversary; two more mix the very small domains well
Indices = NDArray[np.uint64]


class TokenStream:
    """The shards of one split, end to end. Memory-mapped: only what is read is loaded."""

    def __init__(self, shards: Sequence[NDArray[np.integer]]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) as int64."""
        assert 0 <= start <= stop <= len(self)
        out = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        at = start
        while at < stop:
            begin = int(self._ends[shard]) - len(self._shards[shard])
            end = min(stop, int(self._ends[shard]))
            out[at - start : end - start] = self._shards[shard][at - begin : end - begin]
            at, shard = end, shard + 1
        return out


def permute(index: Indices, n: int, seed: int, epoch: int) -> Indices:
    """Where places `index` of the order land: a bijection of [0, n) keyed by (seed, epoch)."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    key = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    keys = [
        np.frombuffer(hashlib.sha256(key + bytes([r])).digest()[:8], "<u8")[0]
        for r in range(ROUNDS)
    ]
    image = index.copy()
    outside = np.ones(len(index), dtype=bool)
    while outside.any():
        left, right = image[outside] >> half, image[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        image[outside] = (left << half) | right
        outside = image >= n
    return image


def _mix(x: Indices) -> Indices:
    """splitmix64's finaliser: every input bit reaches every output bit (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TrainingBatches:
    """Batches of a split's windows, by step.

    stream   the training split
    context  tokens a row, T
    rows     rows of the global batch, R
    seed     of the order
    raises   UserError if the split does not hold one window
    """

    def __init__(self, stream: TokenStream, context: int, rows: int, seed: int) -> None:
        if len(stream) <= context:
            raise UserError(
                f"model.context = {context:,} needs a training split of at least {context + 1:,} tokens;"
                f" this one has {len(stream):,}.\n  use a smaller model.context or a larger corpus"
            )
        self.stream, self.context, self.rows, self.seed = stream, context, rows, seed
        self.n_windows = (len(stream) - 1) // context

    def windows(self, step: int) -> NDArray[np.int64]:
        """The windows of the global batch at a step, one a row."""
        place = np.arange(step * self.rows, (step + 1) * self.rows, dtype=np.int64)
        epoch, index = np.divmod(place, self.n_windows)
        windows = np.empty(self.rows, dtype=np.int64)
        for e in np.unique(epoch):
            here = epoch == e
            windows[here] = permute(
                index[here].astype(np.uint64), self.n_windows, self.seed, int(e)
            )
        return windows

    def micro_batches(
        self, step: int, micro_rows: int, rank: int, ranks: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One rank's share of the batch at a step: (inputs, targets), each (micro_rows, T) int64."""
        share = self.rows // ranks
        assert share * ranks == self.rows and share % micro_rows == 0
        mine = self.windows(step)[rank * share : (rank + 1) * share]
        for first in range(0, share, micro_rows):
            starts = mine[first : first + micro_rows] * self.context
            tokens = np.stack([self.stream.read(s, s + self.context + 1) for s in starts])
            yield _inputs_and_targets(tokens)


def sequential_batches(
    stream: TokenStream,
    context: int,
    rows: int,
    *,
    n_targets: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A split in order, each token but the first a target once: (inputs, targets), each (B, T) int64.

    The last window is as long as what is left. Rank r takes every `ranks`-th batch from the r-th on.

    n_targets  stop after this many targets; None: all
    """
    total = max(0, len(stream) - 1)
    total = total if n_targets is None else min(total, n_targets)
    whole = total // context
    batches = [(row * context, min(rows, whole - row), context) for row in range(0, whole, rows)]
    if total % context:
        batches.append((whole * context, 1, total % context))
    for start, n_rows, length in batches[rank::ranks]:
        tokens = stream.read(start, start + n_rows * length + 1)
        yield (
            torch.from_numpy(tokens[:-1].reshape(n_rows, length)),
            torch.from_numpy(tokens[1:].reshape(n_rows, length)),
        )


def _inputs_and_targets(tokens: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    both = torch.from_numpy(tokens)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
