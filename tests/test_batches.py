"""A batch is a function of (seed, step): every window once an epoch, the same rows for any ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snakegpt.batches import (
    CYCLE,
    Mixture,
    TokenStream,
    TrainingBatches,
    documents_in,
    permute,
    sequential_batches,
)
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


# ---- copying rows ----


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(1, 12), n=st.integers(12, 200))
def test_rows_are_the_tokens_from_each_start(data, length, n):
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=6)))
    starts = data.draw(st.lists(st.integers(0, n - length), max_size=40))
    found = stream(n, *cuts).rows(np.array(starts, dtype=np.int64), length)
    assert found.dtype == np.uint16
    assert found.tolist() == [list(range(start, start + length)) for start in starts]


@pytest.mark.parametrize("start", [-1, 41])
def test_rows_outside_the_stream_are_never_read(start):
    with pytest.raises(AssertionError):
        stream(50, 20).rows(np.array([start], dtype=np.int64), 10)


def test_shards_of_wider_ids_are_read_as_they_are():
    wide = TokenStream([np.array([70_000, 1], dtype=np.uint32), np.array([2**31], dtype=np.uint32)])
    assert wide.rows(np.array([0, 1]), 2).tolist() == [[70_000, 1], [1, 2**31]]
    both = TokenStream([np.array([3], dtype=np.uint16), *wide.shards])
    assert both.rows(np.array([0, 1]), 2).tolist() == [[3, 70_000], [70_000, 1]]


def test_orders_are_what_they_always_were():
    """Golden: another order is another training."""
    order = permute(np.arange(6, dtype=np.uint64), 1000, 1337, 2).tolist()
    assert order == [455, 852, 788, 751, 234, 859]


def test_from_a_step_on_the_batches_are_those_of_the_steps():
    batches = TrainingBatches(stream(81), context=8, rows=4, seed=3)
    endless = batches.from_step(5, 2, 1, 2)
    for step in (5, 6, 7):
        for ids, targets in batches.micro_batches(step, 2, 1, 2):
            found = next(endless)
            assert torch.equal(found[0], ids) and torch.equal(found[1], targets)


# ---- mixtures ----


def mixture(weights=(7, 2, 1), rows=10, seed=0) -> Mixture:
    """Sets of 50, 30 and 4 windows; a token says its set by thousands."""
    sizes = (50, 30, 4)
    streams = [
        TokenStream([np.arange(size * 8 + 3, dtype=np.uint16) + 1000 * k])
        for k, size in enumerate(sizes)
    ]
    return Mixture(streams, weights, context=8, rows=rows, seed=seed)


def taken(batches: Mixture, steps: range, micro_rows=None, rank=0, ranks=1) -> np.ndarray:
    """First tokens of the rows."""
    micro_rows = micro_rows or batches.rows
    found = [
        ids[:, 0]
        for step in steps
        for ids, _ in batches.micro_batches(step, micro_rows, rank, ranks)
    ]
    return torch.cat(found).numpy()


def test_a_cycle_holds_the_weights_exactly():
    first = taken(mixture(), range(CYCLE // 10)) // 1000
    assert np.bincount(first).tolist() == [7000, 2000, 1000]
    halves = np.bincount(first[: CYCLE // 2])
    assert 3300 < halves[0] < 3700 and 400 < halves[2] < 600  # mixed inside the cycle as well


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [((1, 1, 1), [3334, 3333, 3333]), ((0.7, 0.2999, 0.0001), [7000, 2999, 1])],
)
def test_shares_are_rounded_to_a_cycle(weights, quotas):
    first = taken(mixture(weights), range(CYCLE // 10)) // 1000
    assert np.bincount(first).tolist() == quotas


def test_every_set_comes_without_replacement():
    """Of each set, the rows of a cycle are the first so many of its own endless order."""
    rows = taken(mixture(), range(CYCLE // 10))
    for k, (n_windows, quota) in enumerate(((50, 7000), (30, 2000), (4, 1000))):
        windows, counts = np.unique(rows[rows // 1000 == k] % 1000 // 8, return_counts=True)
        assert windows.tolist() == list(range(n_windows))
        whole, rest = divmod(quota, n_windows)
        assert sorted(counts) == [whole] * (n_windows - rest) + [whole + 1] * rest


def test_the_rows_of_a_set_go_on_from_cycle_to_cycle():
    batches = mixture((1, 1, 2))
    of, place = (
        np.concatenate(both)
        for both in zip(*map(batches.sets, range(3 * CYCLE // 10)), strict=True)
    )
    for k, quota in enumerate((2500, 2500, 5000)):
        assert sorted(place[of == k]) == list(range(3 * quota))


def test_a_mixture_is_a_function_of_seed_and_step_for_any_ranks():
    whole = taken(mixture(rows=12), range(5, 7))
    shares = [
        taken(mixture(rows=12), range(step, step + 1), 2, rank, 3)
        for step in (5, 6)
        for rank in range(3)
    ]
    assert np.concatenate(shares).tolist() == whole.tolist()
    assert taken(mixture(rows=12, seed=1), range(5, 7)).tolist() != whole.tolist()


def test_no_window_of_a_mixture_crosses_into_another_set():
    for ids, targets in mixture().micro_batches(3, 10, 0, 1):
        assert torch.equal(targets, ids + 1)


def test_a_mixture_far_ahead_costs_no_more():
    assert len(taken(mixture(), range(10**15, 10**15 + 1))) == 10


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1, 0, 1), "positive numbers"), ((1, 1, 1e-5), "less than one row in 10,000")],
)
def test_weights_that_cannot_hold_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        mixture(weights)


# ---- documents ----


def test_documents_of_a_window_start_with_the_end_of_text_id():
    ids = torch.tensor([[5, 6, 9, 1, 2, 9, 9, 4], [9, 1, 1, 1, 9, 1, 1, 1]])
    documents, places = documents_in(ids, end_of_text=9)
    assert documents.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3], [1, 1, 1, 1, 2, 2, 2, 2]]
    assert places.tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1, 2, 3]]
