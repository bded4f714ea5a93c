"""Time by part: sets of instants against brute force, made-up profiles against sums by hand, a real window."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from snakegpt import parts
from snakegpt.parts import Event, part, seconds_by_part

spans = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 15)).map(lambda x: (x[0], x[0] + x[1])), max_size=8
)


def instants(a):
    return {i for start, end in a for i in range(start, end)}


@given(spans, spans)
def test_sets_of_instants_are_sets(a, b):
    a_, b_ = parts.union(a), parts.union(b)
    assert instants(a_) == instants(a)
    assert parts.length(a_) == len(instants(a))
    assert instants(parts.intersection(a_, b_)) == instants(a) & instants(b)
    assert instants(parts.without(a_, b_)) == instants(a) - instants(b)


def marks(*labels):
    return [Event(f"part:{name}", start, end, False) for name, start, end in labels]


LABELS = marks(
    ("step", 0, 100), ("data", 0, 10), ("forward", 10, 40), ("backward", 40, 80),
    ("optimizer", 82, 95),
)  # fmt: skip


def test_a_cpu_step_is_its_labels_and_what_lies_between_is_waiting():
    events = [*LABELS, Event("aten::mm", 12, 38, False)]
    found = seconds_by_part(events)
    assert found == {
        "data": 10, "forward": 30, "backward": 40, "optimizer": 13, "communication": 0, "waiting": 7,
    }  # fmt: skip


def test_only_sending_that_is_not_hidden_behind_arithmetic_is_communication():
    events = [
        *LABELS,
        Event("aten::mm", 42, 60, False),
        Event("gloo:all_reduce", 50, 75, False),  # 60 to 75 with nothing beside it
        Event("gloo:all_reduce", 70, 78, False),  # and on to 78, counted once
        Event("gloo:all_reduce", 200, 300, False),  # after the step
    ]
    found = seconds_by_part(events)
    assert found["communication"] == 18
    assert found["backward"] == 40 - 18
    assert sum(found.values()) == 100


def test_on_a_gpu_kernels_count_and_an_idle_device_waits():
    events = [
        *LABELS,
        Event("part:forward", 15, 39, True),  # profiles repeat labels on the device: not counted
        Event("aten::mm", 10, 80, False),  # launching is not computing
        Event("gemm_kernel", 15, 35, True),
        Event("gemm_kernel", 45, 65, True),
        Event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 60, 72, True),
        Event("adam_kernel", 84, 90, True),
    ]
    found = seconds_by_part(events)
    assert found == {
        "data": 10, "forward": 20, "backward": 20, "optimizer": 6, "communication": 7,
        "waiting": 100 - 10 - 20 - 20 - 6 - 7,
    }  # fmt: skip


# profiled, by the clock alone as nothing is sent, and as a profile would be too large
@pytest.mark.parametrize(("micro_batches", "ranks"), [(1, 2), (1, 1), (100, 2)])
def test_a_window_times_what_is_inside_its_labels(micro_batches, ranks):
    torch.set_num_threads(1)
    window = parts.Window("cpu", micro_batches, ranks)
    assert window.profiled == ((micro_batches, ranks) == (1, 2))
    while window.open:
        with window.step():
            with part("data"):
                time.sleep(0.02)
            with part("forward"):
                torch.randn(64, 64) @ torch.randn(64, 64)
                time.sleep(0.04)
            time.sleep(0.01)
    found = dict(window.seconds)
    assert found["data"] >= 0.02
    assert found["forward"] >= 0.04
    assert found["waiting"] >= 0.01
    assert found["backward"] == 0
    assert (found["communication"] is None) == (micro_batches == 100)


def test_a_step_that_fails_leaves_no_profile_running():
    window = parts.Window("cpu", 1, 2)
    with pytest.raises(RuntimeError), window.step():
        raise RuntimeError
    assert not window.open
    assert not torch.autograd._profiler_enabled()
    with part("data"):  # and labels cost nothing again
        pass
