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

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from snakegpt.errors import UserError

if TYPE_CHECKING:  # torch is loaded where tensors are made: opening tokens takes milliseconds
    from torch import Tensor

ROUNDS = 6  # four suffice against an adversary; two more mix the very small domains well
CYCLE = 10_000  # places of a mixture in which its weights hold exactly
BLOCK_TOKENS = 1 << 18  # gathered at once: 512 KiB of uint16
MANY_ROWS = 8  # of a shard, from which one indexed copy is quicker than a copy a row (measured)
Indices = NDArray[np.uint64]

_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)
_BF, _94 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class TokenStream:
    """The shards of one split, end to end. Memory-mapped: only what is read is loaded."""

    def __init__(self, shards: Sequence[NDArray[np.integer]]) -> None:
        # Plain arrays: slicing numpy's memmap class takes several times as long.
        self.shards = [np.asarray(shard) for shard in shards]
        self.dtype = np.result_type(np.uint16, *{shard.dtype for shard in self.shards})
        self._ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) as int64."""
        assert 0 <= start <= stop <= len(self)
        out = np.empty(stop - start, dtype=np.int64)
        self._read_into(out, start, int(np.searchsorted(self._ends, start, side="right")))
        return out

    def rows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.integer]:
        """Tokens [start, start + length) of every start, one a row, in the shards' widest type."""
        assert not len(starts) or (starts.min() >= 0 and starts.max() + length <= len(self))
        out = np.empty((len(starts), length), dtype=self.dtype)
        shard_of = np.searchsorted(self._ends, starts, side="right")
        in_one = starts + length <= self._ends[shard_of]
        alone = np.ones(len(starts), dtype=bool)
        for k, n_rows in zip(*np.unique(shard_of[in_one], return_counts=True), strict=True):
            if n_rows >= MANY_ROWS:
                here = in_one & (shard_of == k)
                shard, step = self.shards[k], self.shards[k].itemsize
                windows = as_strided(shard, (len(shard) - length + 1, length), (step, step))
                out[here] = windows[starts[here] - (self._ends[k] - len(shard))]
                alone &= ~here
        for row in np.flatnonzero(alone).tolist():
            self._read_into(out[row], int(starts[row]), int(shard_of[row]))
        return out

    def _read_into(self, out: NDArray[np.integer], start: int, shard: int) -> None:
        """Fill `out` with the tokens from `start` on, which lies in `shard`."""
        done = 0
        while done < len(out):
            tokens = self.shards[shard]
            begin = start + done - (int(self._ends[shard]) - len(tokens))
            piece = tokens[begin : begin + len(out) - done]
            out[done : done + len(piece)] = piece
            done, shard = done + len(piece), shard + 1


def permute(index: Indices, n: int, seed: int, epoch: int) -> Indices:
    """Where places `index` of the order land: a bijection of [0, n) keyed by (seed, epoch)."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _round_keys(seed, epoch)
    image = _feistel(index, keys, half, mask)
    outside = np.flatnonzero(image >= n)
    while len(outside):
        moved = _feistel(image[outside], keys, half, mask)
        image[outside] = moved
        outside = outside[moved >= n]
    return image


def _feistel(x: Indices, keys: list[np.uint64], half: np.uint64, mask: np.uint64) -> Indices:
    left, right = x >> half, x & mask
    for round_key in keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half) | right


@functools.lru_cache
def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    key = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    return [
        np.frombuffer(hashlib.sha256(key + bytes([r])).digest()[:8], "<u8")[0]
        for r in range(ROUNDS)
    ]


def _mix(x: Indices) -> Indices:
    """splitmix64's finaliser, in place: every input bit reaches every output bit (Steele et al. 2014)."""
    x ^= x >> _30
    x *= _BF
    x ^= x >> _27
    x *= _94
    x ^= x >> _31
    return x


def shuffled(place: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """What stands at places of the endless order of [0, n): every number once an epoch."""
    epoch, index = np.divmod(place, n)
    numbers = np.empty(len(place), dtype=np.int64)
    for e in np.unique(epoch):
        here = epoch == e
        numbers[here] = permute(index[here].astype(np.uint64), n, seed, int(e))
    return numbers


class TrainingBatches:
    """Batches of a split's windows, by step.

    stream   the training split
    context  tokens a row, T
    rows     rows of the global batch, R
    seed     of the order
    raises   UserError if the split does not hold one window
    """

    def __init__(self, stream: TokenStream, context: int, rows: int, seed: int) -> None:
        self.stream, self.context, self.rows, self.seed = stream, context, rows, seed
        self.n_windows = _n_windows(stream, context)

    def windows(self, step: int) -> NDArray[np.int64]:
        """The windows of the global batch at a step, one a row."""
        place = np.arange(step * self.rows, (step + 1) * self.rows, dtype=np.int64)
        return shuffled(place, self.n_windows, self.seed)

    def starts(self, step: int) -> NDArray[np.int64]:
        """Where in the stream each row of the global batch at a step begins."""
        return self.windows(step) * self.context

    def micro_batches(
        self, step: int, micro_rows: int, rank: int, ranks: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One rank's share of the batch at a step: (inputs, targets), each (micro_rows, T) int64.

        Both are views of the same rows of T + 1 tokens.
        """
        import torch

        share = self.rows // ranks
        assert share * ranks == self.rows and share % micro_rows == 0
        mine = self.starts(step)[rank * share : (rank + 1) * share]
        # Several micro-batches are gathered at once, as many as stay in a core's own cache.
        block = micro_rows * max(1, BLOCK_TOKENS // (micro_rows * self.context))
        for first in range(0, share, block):
            tokens = self.stream.rows(mine[first : first + block], self.context + 1)
            for row in range(0, len(tokens), micro_rows):
                both = torch.from_numpy(tokens[row : row + micro_rows].astype(np.int64))
                yield both.narrow(1, 0, self.context), both.narrow(1, 1, self.context)

    def from_step(
        self, step: int, micro_rows: int, rank: int, ranks: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of a step and of all that follow it, without end."""
        while True:
            yield from self.micro_batches(step, micro_rows, rank, ranks)
            step += 1


def _n_windows(stream: TokenStream, context: int) -> int:
    if len(stream) <= context:
        raise UserError(
            f"model.context = {context:,} needs a training split of at least {context + 1:,} tokens;"
            f" this one has {len(stream):,}.\n  use a smaller model.context or a larger corpus"
        )
    return (len(stream) - 1) // context


class Mixture(TrainingBatches):
    """Batches of several token sets, each with a share of the rows; used like TrainingBatches.

    Of every CYCLE consecutive rows each set gets its share exactly, at places that a permutation keyed
    by (seed, cycle) deals out. The k-th row that a set gets is the k-th of its own endless order, so
    that its windows come without replacement and nothing is counted on the way; inside a cycle, the
    end of one epoch of a set and the begin of the next may alternate.

    streams  the training splits
    weights  of the sets, in the same order: shares of the rows, of any sum
    raises   UserError for a weight that is not positive, or below half a row in a cycle
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        weights: Sequence[float],
        context: int,
        rows: int,
        seed: int,
    ) -> None:
        joined = TokenStream([shard for stream in streams for shard in stream.shards])
        super().__init__(joined, context, rows, seed)
        self._quotas = _quotas(weights)
        assert len(self._quotas) == len(streams)
        self._n_windows = [_n_windows(stream, context) for stream in streams]
        self._begins = np.cumsum([0, *map(len, streams[:-1])], dtype=np.int64)
        digests = (hashlib.sha256(f"{seed} set {k}".encode()).digest() for k in range(len(streams)))
        self._seeds = [int.from_bytes(digest[:8], "little") >> 1 for digest in digests]

    def sets(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each row of the global batch at a step: its set, and which of that set's rows it is."""
        place = np.arange(step * self.rows, (step + 1) * self.rows, dtype=np.int64)
        dealt = shuffled(place, CYCLE, self.seed)
        ends = np.cumsum(self._quotas)
        of = np.searchsorted(ends, dealt, side="right")
        quota = self._quotas[of]
        return of, place // CYCLE * quota + dealt - (ends[of] - quota)

    def starts(self, step: int) -> NDArray[np.int64]:
        of, place = self.sets(step)
        starts = np.empty(self.rows, dtype=np.int64)
        for k in np.unique(of):
            here = of == k
            window = shuffled(place[here], self._n_windows[k], self._seeds[k])
            starts[here] = self._begins[k] + window * self.context
        return starts


def _quotas(weights: Sequence[float]) -> NDArray[np.int64]:
    """Rows of a cycle for each set: nearest to its share, and CYCLE in all (largest remainders)."""
    if not all(weight > 0 for weight in weights):
        raise UserError(f"weights of a mixture are positive numbers, not {list(weights)}.")
    shares = np.array(weights, dtype=np.float64) / sum(weights) * CYCLE
    quotas = np.floor(shares).astype(np.int64)
    most = np.argsort(-(shares - quotas), kind="stable")[: CYCLE - int(quotas.sum())]
    quotas[most] += 1
    if not quotas.all():
        least = weights[int(np.argmin(quotas))]
        raise UserError(
            f"a weight of {least} among {list(weights)} is less than one row in {CYCLE:,}.\n"
            "  raise it, or leave that corpus out"
        )
    return quotas


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
    import torch

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


def documents_in(ids_BT: Tensor, end_of_text: int) -> tuple[Tensor, Tensor]:
    """Which document of its window each token belongs to, and its place there; both (B, T) int64.

    A document starts with the end-of-text id; what stands before a window's first one is document 0,
    with places from the window's begin. Tokens may attend to each other where documents are equal.
    """
    import torch

    starts_BT = ids_BT == end_of_text
    place_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    begin_BT = torch.where(starts_BT, place_BT, 0).cummax(dim=1).values
    return starts_BT.cumsum(dim=1), place_BT - begin_BT
