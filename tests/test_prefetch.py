"""What a thread makes ahead is what the loop would have made, and the thread ends with the loop."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from snakegpt.batches import TokenStream, TrainingBatches
from snakegpt.prefetch import Prefetch, ahead_of


def prefetching() -> bool:
    return any(thread.name == "prefetch" for thread in threading.enumerate())


def batches() -> TrainingBatches:
    return TrainingBatches(
        TokenStream([np.arange(500, dtype=np.uint16)]), context=8, rows=6, seed=1
    )


def test_the_batches_and_their_order_are_the_same():
    with Prefetch(batches().from_step(3, 2, 0, 1)) as ahead:
        found = list(itertools.islice(ahead, 20))
    expected = [pair for step in range(3, 10) for pair in batches().micro_batches(step, 2, 0, 1)]
    for (ids, targets), (wanted_ids, wanted_targets) in zip(found, expected, strict=False):
        assert torch.equal(ids, wanted_ids) and torch.equal(targets, wanted_targets)
    assert not prefetching()


def test_no_more_is_made_than_asked_for():
    made = []
    reached = threading.Event()

    def source():
        for number in itertools.count():
            made.append(number)
            if number == 4:
                reached.set()
            yield number

    with Prefetch(source(), ahead=3) as items:
        assert next(items) == 0
        assert next(items) == 1
        assert reached.wait(10)
    assert made == [0, 1, 2, 3, 4]


def test_the_end_is_the_end():
    with Prefetch(iter("abc")) as items:
        assert list(items) == ["a", "b", "c"]
    assert not prefetching()


def test_an_error_comes_where_its_item_would_have():
    def source():
        yield from (1, 2)
        raise OSError("the disk is gone")

    with Prefetch(source()) as items:
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(OSError, match="the disk is gone"):
            next(items)
    assert not prefetching()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_leaving_in_the_middle_stops_the_thread(error):
    def loop():
        with Prefetch(itertools.count()) as items:
            for number in items:
                if number == 2:
                    raise error

    with pytest.raises(error):
        loop()
    assert not prefetching()


def test_a_cpu_takes_the_batches_as_they_are():
    source = iter([(torch.zeros(1), torch.ones(1))])
    with ahead_of(source, "cpu") as found:
        assert found is source


def test_on_cuda_the_batches_come_from_pinned_memory(monkeypatch):
    """As far as a machine without a GPU can tell: which device, what is pinned, the same values."""
    devices, pinned = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)

    def pin(tensor):
        pinned.append(tensor.is_contiguous())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with ahead_of(batches().micro_batches(0, 2, 0, 1), "cuda") as made:
        found = list(made)
    assert devices == [3]
    assert pinned == [True] * 6
    for (ids, targets), (wanted_ids, wanted_targets) in zip(
        found, batches().micro_batches(0, 2, 0, 1), strict=True
    ):
        assert torch.equal(ids, wanted_ids) and torch.equal(targets, wanted_targets)
