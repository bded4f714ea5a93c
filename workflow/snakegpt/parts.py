"""Where the time of a training step goes, part by part, from a short profiled window.

    data           waiting for the next micro-batch
    forward        the network and its loss
    backward       gradients
    optimizer      clipping and moving the weights
    communication  sending to other ranks, or waiting for them, while nothing is computed
    waiting        the rest of the step: the device idles, or the loop reads and writes

What the ranks send while they compute costs no time and is not counted. In the window, and there alone,
a GPU is waited for at the end of each part, so that its work falls into the part it belongs to.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import profiler

PARTS = ("data", "forward", "backward", "optimizer", "communication", "waiting")
STEP = "step"
PREFIX = "part:"
STEPS = 3  # of a window
PROFILED_MICRO_BATCHES = 32  # beyond it a profile has too many events: parts by the clock alone

Spans = list[tuple[float, float]]  # (start, end), ns


class Event(NamedTuple):
    """Something that a profile saw. on_device: a GPU's kernel or copy, and not a call on the CPU"""

    name: str
    start: float
    end: float
    on_device: bool


_marks: list[Event] | None = None  # of the open window


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Around what belongs to a part of a step; costs nothing outside a window."""
    if _marks is None:
        yield
        return
    started = time.perf_counter_ns()
    with profiler.record_function(PREFIX + name):
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    _marks.append(Event(PREFIX + name, started, time.perf_counter_ns(), on_device=False))


class Window:
    """A few steps that are looked at closely: `with window.step(index)` around each; then `seconds`.

    micro_batches  of a rank in a step
    ranks          of them all; one on a CPU sends nothing, and the clock alone sees its parts
    """

    def __init__(self, device: str, micro_batches: int, ranks: int) -> None:
        self.device, self.n_steps = device, 1 if micro_batches > 4 else STEPS
        # A profile is not free: what it keeps lies between tensors, and the heap of a CPU grows by half.
        self.by_clock = device == "cpu" and ranks == 1
        self.profiled = not self.by_clock and micro_batches <= PROFILED_MICRO_BATCHES
        self.seconds: dict[str, float | None] = {}
        self._left = self.n_steps
        self._profile: Any = None

    @property
    def open(self) -> bool:
        return self._left > 0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one step of the window; after the last one `seconds` has a step's mean by part."""
        global _marks
        if self._left == self.n_steps:
            _marks = []
            if self.profiled:
                os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it talks to stderr
                on_gpu = self.device if self.device == "cuda" else None
                self._profile = profiler.profile(use_kineto=True, use_device=on_gpu)
                self._profile.__enter__()
        try:
            with part(STEP):
                yield
        except BaseException:
            self._left = 0
            self._close()
            raise
        self._left -= 1
        if self._left == 0:
            events = self._close()
            found = seconds_by_part(events)
            if not (self.profiled or self.by_clock):
                found["communication"] = None
            self.seconds = {
                name: None if ns is None else ns / self.n_steps / 1e9 for name, ns in found.items()
            }

    def close(self) -> None:
        """End a window that was left open: a process that exits with an open profile crashes."""
        self._left = 0
        self._close()

    def _close(self) -> list[Event]:
        global _marks
        events, _marks = _marks or [], None
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            seen = self._profile.kineto_results.events()
            events = [
                Event(e.name(), e.start_ns(), e.end_ns(), e.device_type().name != "CPU")
                for e in seen
            ]
            self._profile = None
        return events


def seconds_by_part(events: Sequence[Event]) -> dict[str, float | None]:
    """Time of the steps in a profile by part, in the unit of the events; the parts add up to the steps."""
    marks: dict[str, Spans] = {name: [] for name in (STEP, *PARTS)}
    sent: Spans = []
    computed: Spans = []
    on_gpu = any(event.on_device for event in events)
    for event in events:
        span = (event.start, event.end)
        if event.name.startswith(PREFIX):
            if not event.on_device:  # profiles repeat labels on the device
                marks[event.name.removeprefix(PREFIX)].append(span)
        elif event.on_device if on_gpu else event.name.startswith(("gloo:", "nccl:")):
            (sent if _sends(event.name) else computed).append(span)
        elif not on_gpu and _computes(event.name):
            computed.append(span)
    steps = union(marks[STEP])
    busy = union(computed)
    alone = without(intersection(union(sent), steps), busy)  # sending, and nothing else
    result: dict[str, float | None] = {"communication": length(alone)}
    rest = length(steps) - length(alone)
    for name in ("data", "forward", "backward", "optimizer"):
        spans = without(intersection(union(marks[name]), steps), alone)
        if on_gpu and name != "data":  # inside these parts an idle GPU is waiting
            spans = intersection(spans, busy)
        result[name] = length(spans)
        rest -= length(spans)
    result["waiting"] = max(0.0, rest)
    return {name: result[name] for name in PARTS}


def _sends(name: str) -> bool:
    return name.startswith(("gloo:", "nccl:")) or "nccl" in name.lower() or "rccl" in name.lower()


def _computes(name: str) -> bool:
    """Whether a call on a CPU is arithmetic: torch's operations, or kernels that the compiler made."""
    return name.startswith("aten::") or "fused" in name


# ---- sets of instants, as sorted spans that do not touch ---------------------------------------


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """All instants of some spans."""
    result: Spans = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def intersection(a: Spans, b: Spans) -> Spans:
    """Instants in both; each as `union` gives them."""
    result, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            result.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return result


def without(a: Spans, b: Spans) -> Spans:
    """Instants in `a` and not in `b`."""
    if not a:
        return []
    outside, at = [], a[0][0]
    for start, end in b:
        if at < start:
            outside.append((at, start))
        at = max(at, end)
    outside.append((at, max(at, a[-1][1])))
    return intersection(a, outside)


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)
