"""Batches made ahead of the loop that takes them, so that a GPU never waits for a disk."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Batch = tuple[Tensor, Tensor]

AHEAD = 4  # micro-batches: at GPT-2's context, some megabytes


class Prefetch(Generic[Item]):
    """The items of an iterator in their order, made by a thread up to `ahead` of them early.

    with Prefetch(source, ahead) as items:
        for item in items: ...

    What the source raises is raised where its item would have come. Leaving the block stops the thread.
    """

    def __init__(self, source: Iterator[Item], ahead: int = AHEAD) -> None:
        self._source = source
        self._room = threading.Semaphore(ahead)
        self._made: SimpleQueue[tuple[Item | None, BaseException | None]] = SimpleQueue()
        self._stops = False
        # A daemon, so that no way of ending the program waits for a disk that does not answer.
        self._thread = threading.Thread(target=self._make, name="prefetch", daemon=True)

    def _make(self) -> None:
        while True:
            self._room.acquire()
            if self._stops:
                return
            try:
                self._made.put((next(self._source), None))
            except BaseException as error:  # StopIteration too: the loop is to meet it
                self._made.put((None, error))
                return

    def __iter__(self) -> Iterator[Item]:
        while True:
            item, error = self._made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            self._room.release()
            yield item  # type: ignore[misc]

    def __enter__(self) -> Iterator[Item]:
        self._thread.start()
        return iter(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stops = True
        self._room.release()
        self._thread.join()


@contextlib.contextmanager
def ahead_of(batches: Iterator[Batch], device: str) -> Iterator[Iterator[Batch]]:
    """The same batches; on cuda a thread makes them early, in memory that the GPU copies from by itself.

    On a CPU the thread would only take cores from the network.
    """
    if device != "cuda":
        yield batches
        return
    with Prefetch(_pinned(batches, torch.cuda.current_device())) as made:
        yield made


def _pinned(batches: Iterator[Batch], device: int) -> Iterator[Batch]:
    torch.cuda.set_device(device)  # of this thread, which else opens a context on the first GPU
    for ids_BT, targets_BT in batches:
        yield ids_BT.contiguous().pin_memory(), targets_BT.contiguous().pin_memory()
