"""A batch is a function of (seed, step): every window once an epoch, the same rows for any ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snakegpt.batches import TokenStream, TrainingBatches, permute, sequential_batches
from snakegpt.errors import UserError


def stream(n: int, *cuts: int) -> TokenStream:
    return TokenStream(np.split(np.arange(n, dtype=np.uint16), cuts))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 5))
def test_the_order_is_a_permutation(n, seed, epoch):
    order = permute(np.arange(n, dtype=np.uint64), n, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))


def test_orders_of_other_seeds_and_epochs_differ():
    places = np.arange(1000, dtype=np.uint64)
    orders = [
        permute(places, 1000, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    agreeing = sum(a == b for a, b in zip(orders[0], orders[1], strict=True))
    assert agreeing < 15  # about one in a thousand by chance


def test_the_order_looks_random():
    order = permute(np.arange(4096, dtype=np.uint64), 4096, 7, 0).astype(float)
    assert abs(np.corrcoef(np.arange(4096), order)[0, 1]) < 0.06
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06


def test_an_epoch_takes_every_window_once_and_may_end_inside_a_batch():
    batches = TrainingBatches(stream(10 * 8 + 1), context=8, rows=4, seed=3)
    assert batches.n_windows == 10
    taken = np.concatenate([batches.windows(step) for step in range(5)])
    assert sorted(taken[:10]) == list(range(10))
    assert sorted(taken[10:]) == list(range(10))
    assert taken[:10].tolist() != taken[10:].tolist()


def test_targets_are_one_further_across_shards():
    batches = TrainingBatches(stream(81, 7, 30, 31), context=8, rows=4, seed=3)
    [(ids, targets)] = batches.micro_batches(0, 4, 0, 1)
    assert torch.equal(targets, ids + 1)
    assert sorted(ids[:, 0].tolist()) == sorted((batches.windows(0) * 8).tolist())


@pytest.mark.parametrize(("ranks", "micro_rows"), [(1, 12), (1, 3), (2, 6), (3, 2), (12, 1)])
def test_ranks_and_micro_batches_share_out_the_same_rows(ranks, micro_rows):
    batches = TrainingBatches(stream(20 * 8 + 1), context=8, rows=12, seed=5)
    [(whole, _)] = batches.micro_batches(4, 12, 0, 1)
    pieces = [
        ids for rank in range(ranks) for ids, _ in batches.micro_batches(4, micro_rows, rank, ranks)
    ]
    assert all(len(piece) == micro_rows for piece in pieces)
    assert torch.equal(torch.cat(pieces), whole)


def test_fewer_windows_than_rows_make_several_epochs_a_batch():
    batches = TrainingBatches(stream(3 * 4 + 1), context=4, rows=7, seed=0)
    windows = batches.windows(0)
    assert sorted(windows[:3]) == sorted(windows[3:6]) == [0, 1, 2]


def test_a_context_longer_than_the_data_is_a_clear_error():
    with pytest.raises(
        UserError, match=r"model\.context = 16 needs .* 17 tokens;\s+this one has 16"
    ):
        TrainingBatches(stream(16), context=16, rows=1, seed=0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("n_targets", [None, 5, 37])
def test_validation_sees_every_target_once_in_order(ranks, n_targets):
    batches = [
        list(sequential_batches(stream(50), 8, 2, n_targets=n_targets, rank=rank, ranks=ranks))
        for rank in range(ranks)
    ]
    targets = torch.cat([t.flatten() for rank in batches for _, t in rank])
    expected = 49 if n_targets is None else n_targets
    assert sorted(targets.tolist()) == list(range(1, expected + 1))
    for rank in batches:
        assert all(torch.equal(t, x + 1) for x, t in rank)


def test_an_order_of_any_size_needs_no_memory():
    n = 10**13
    places = np.arange(5, dtype=np.uint64) * np.uint64(10**12)
    order = permute(places, n, 1, 0)
    assert len(set(order.tolist())) == 5
    assert max(order.tolist()) < n
