"""What all kinds of sources share: hashing, verifying, parallel work, progress and free disk."""

from __future__ import annotations

import hashlib
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

from snakegpt.errors import UserError
from snakegpt.locks import RELOCK, Archive, File
from snakegpt.progress import Progress, quantity

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK_BYTES = 1 << 20


class Meter:
    """How many bytes of many files have arrived: a line with the rate every `interval_s` seconds."""

    def __init__(self, label: str, total: int = 0, interval_s: float = 5.0) -> None:
        self._progress = Progress(label, total, "bytes", interval_s=interval_s)
        self._lock = threading.Lock()
        self._done, self._fresh = 0, 0
        self._started = self._last_line = time.monotonic()

    def expect(self, n_bytes: int) -> None:
        """More bytes will come than was known."""
        with self._lock:
            self._progress.total += n_bytes

    def add(self, n_bytes: int, *, fresh: bool = True) -> None:
        """Bytes are here; negative if they had to be thrown away, not fresh if an earlier run left them."""
        with self._lock:
            self._done += n_bytes
            self._fresh += n_bytes if fresh else 0
            now = time.monotonic()
            if now - self._last_line >= self._progress.interval_s:
                self._last_line = now
                self._progress.update(self._done, self._rate(now), force=True)

    def close(self) -> None:
        """The last line."""
        self._progress.total = self._done
        self._progress.update(self._done, self._rate(time.monotonic()), force=True)

    def _rate(self, now: float) -> str:
        return quantity(self._fresh / max(now - self._started, 1e-3), "B/s")


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> list[Result]:
    """`work` of every item, results in order; the first error ends it all.

    Daemon threads rather than an executor, whose threads a Ctrl-C would have to wait for: at the
    end of a long download.
    """
    waiting: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
    finished: queue.SimpleQueue[tuple[int, Result | BaseException]] = queue.SimpleQueue()
    stopped = threading.Event()
    for numbered in enumerate(items):
        waiting.put(numbered)

    def worker() -> None:
        while not stopped.is_set():
            try:
                index, item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                finished.put((index, work(item)))
            except BaseException as error:  # handed to the caller, whatever it is
                finished.put((index, error))

    for _ in range(min(workers, len(items))):
        threading.Thread(target=worker, daemon=True).start()
    results: dict[int, Result] = {}
    try:
        for _ in items:
            index, result = finished.get()
            if isinstance(result, BaseException):
                raise result
            results[index] = result
    finally:
        stopped.set()
    return [results[index] for index in range(len(items))]


def chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """A stream's bytes in pieces."""
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def copy(
    stream: IO[bytes], target: Path | None = None, meter: Meter | None = None
) -> tuple[str, int]:
    """Write a stream to a file, if there is one, and hash it on the way: (sha256, bytes)."""
    digest, n_bytes = hashlib.sha256(), 0
    sink = None
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        sink = target.open("wb")
    try:
        for chunk in chunks(stream):
            digest.update(chunk)
            n_bytes += len(chunk)
            if sink:
                sink.write(chunk)
            if meter:
                meter.add(len(chunk))
    finally:
        if sink:
            sink.close()
    return digest.hexdigest(), n_bytes


def fingerprint(path: Path) -> tuple[str, int]:
    """(sha256, bytes) of a file."""
    with path.open("rb") as stream:
        return copy(stream)


def verify(found: tuple[str, int], wanted: File | Archive, corpus: str, where: str) -> None:
    """Stop unless a file is the locked one.

    found    its (sha256, bytes)
    where    path or URL it came from
    raises   UserError that names file, expected and found digest and size
    """
    sha256, n_bytes = found
    if (sha256, n_bytes) != (wanted.sha256, wanted.bytes):
        name = wanted.path if isinstance(wanted, File) else wanted.name
        raise UserError(
            f"corpus {corpus}: {name} is not the file that was locked.\n"
            f"  from:     {where}\n"
            f"  expected: sha256 {wanted.sha256}, {wanted.bytes:,} bytes\n"
            f"  found:    sha256 {sha256}, {n_bytes:,} bytes\n"
            f"  it changed since it was locked or was damaged on the way: run again, and if it was"
            f" changed on purpose: {RELOCK} --update {corpus}"
        )


def check_disk(folder: Path, n_bytes: int, what: str) -> None:
    """Stop before anything is downloaded that the disk does not hold."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise UserError(
            f"{what} needs {n_bytes:,} bytes ({quantity(n_bytes, 'B')}) of disk,"
            f" {free:,} bytes ({quantity(free, 'B')}) are free in {folder}.\n"
            "  free some, or move the store: `store:` in config.yaml, or the environment variable"
            " SNAKEGPT_STORE"
        )
