"""What all kinds of sources share: hashing, verifying, parallel work, progress and free disk."""

from __future__ import annotations

import collections
import hashlib
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

from snakegpt.errors import UserError
from snakegpt.locks import Archive, File, update_command
from snakegpt.progress import duration, quantity, say

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK_BYTES = 1 << 20
SHOWN_DRIFTS = 20  # files an error names
WINDOW_LINES = 12  # that the rate in a progress line is taken over


class Meter:
    """How much of many files has arrived: a line with rate and time left every `interval_s` seconds.

    Bytes that an earlier run left count as done, but not for the rate, which is that of the last
    minute or so: a source that slows down says so.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        interval_s: float = 5.0,
        rate: int | None = None,
    ) -> None:
        self.throttle = Throttle(rate)
        self._label, self._total, self._interval_s = label, total, interval_s
        self._lock = threading.Lock()
        self._done, self._fresh = 0, 0
        self._started = self._last_line = time.monotonic()
        self._seen = collections.deque([(self._started, 0)], maxlen=WINDOW_LINES)

    def add(self, n_bytes: int, *, fresh: bool = True) -> None:
        """Bytes are here; negative if they had to be thrown away, not fresh if an earlier run left them."""
        with self._lock:
            self._done += n_bytes
            self._fresh += n_bytes if fresh and n_bytes > 0 else 0
            now = time.monotonic()
            if now - self._last_line >= self._interval_s:
                self._last_line = now
                say(self._line(now))
                self._seen.append((now, self._fresh))

    def close(self) -> None:
        """The last line."""
        elapsed = time.monotonic() - self._started
        rate = quantity(self._fresh / max(elapsed, 1e-3), "B/s")
        say(f"{self._label}  {quantity(self._done, 'B')} in {duration(elapsed)}  {rate}")

    def _line(self, now: float) -> str:
        since, before = self._seen[0]
        rate = (self._fresh - before) / max(now - since, 1e-3)
        words = [self._label, quantity(self._done, "B")]
        if self._total is not None:
            words[-1] += f"/{quantity(self._total, 'B')}"
            words.append(f"{100 * self._done / max(self._total, 1):.0f}%")
        words.append(quantity(rate, "B/s"))
        if self._total is not None and rate > 0:
            words.append(f"left {duration(max(self._total - self._done, 0) / rate)}")
        return "  ".join(words)


class Throttle:
    """Lets a number of bytes a second pass, all threads together; None: as many as there are.

    A token bucket that holds no more than was just asked for: nothing is saved up while idle.
    """

    def __init__(
        self,
        rate: int | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.rate, self._clock, self._sleep = rate, clock, sleep
        self._lock = threading.Lock()
        self._free_at = clock()

    def take(self, n_bytes: int) -> None:
        """Wait until these bytes may have come."""
        if self.rate is None:
            return
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now) + n_bytes / self.rate
            wait = self._free_at - now
        self._sleep(wait)


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


class Drifted(UserError):
    """A file is not the locked one; `report` has both, for people."""

    def __init__(self, what: str, reports: Sequence[str]) -> None:
        shown = "\n".join(reports[:SHOWN_DRIFTS])
        more = len(reports) - SHOWN_DRIFTS
        more_text = f"\n  ... and {more:,} more files" if more > 0 else ""
        super().__init__(
            f"{what}: {shown}{more_text}\n"
            "  it changed since it was locked or was damaged on the way: run again, and if it was"
            f" changed on purpose: {update_command(what)}"
        )
        self.reports = list(reports)


class Drifts:
    """Notes the files that are not the locked ones while the others go on, and says them all at once.

    with Drifts(what) as drifts:
        in_parallel(drifts.noting(work), files, workers)
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._reports: dict[str, list[str]] = {}

    def noting(self, work: Callable[[File], None]) -> Callable[[File], None]:
        def one(file: File) -> None:
            try:
                work(file)
            except Drifted as drift:
                self._reports[file.path] = drift.reports

        return one

    def __enter__(self) -> Drifts:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._reports:
            reports = [report for _, found in sorted(self._reports.items()) for report in found]
            raise Drifted(self._what, reports)


def verify(found: tuple[str, int], wanted: File | Archive, what: str, where: str) -> None:
    """Stop unless a file is the locked one.

    found    its (sha256, bytes)
    where    path or URL it came from
    raises   Drifted, which names file, expected and found digest and size
    """
    sha256, n_bytes = found
    if (sha256, n_bytes) != (wanted.sha256, wanted.bytes):
        name = wanted.path if isinstance(wanted, File) else wanted.name
        report = (
            f"{name} is not the file that was locked.\n"
            f"  from:     {where}\n"
            f"  expected: sha256 {wanted.sha256}, {wanted.bytes:,} bytes\n"
            f"  found:    sha256 {sha256}, {n_bytes:,} bytes"
        )
        raise Drifted(what, [report])


def hand_over(kept: Path, target: Path) -> None:
    """Show a finished file at its place; the state folder keeps it until the results are published."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(kept, target)
    except OSError:  # no hard links here, or another filesystem
        shutil.move(kept, target)


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
