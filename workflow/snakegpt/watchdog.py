"""Ends a rank that hangs, saying where, so that no run waits for ever and holds its machines."""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from types import TracebackType

from snakegpt.outcomes import tell_outcome


class Watchdog:
    """A thread that ends the process when nobody has called `beat` for some seconds.

    with Watchdog(limit_s) as watchdog:
        watchdog.beat("step 7")

    limit_s  None: it never does
    """

    def __init__(self, limit_s: float | None) -> None:
        self.limit_s, self.last = limit_s, "start"
        self._beat_at = time.monotonic()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, what: str) -> None:
        """Something was done: `what`, for the message if it was the last thing."""
        self.last, self._beat_at = what, time.monotonic()

    def _watch(self) -> None:
        assert self.limit_s is not None
        while not self._ends.wait(min(1.0, self.limit_s / 4)):
            silent_s = time.monotonic() - self._beat_at
            if silent_s > self.limit_s:
                tell_outcome(
                    1,
                    f"no progress for {silent_s:.0f} s after {self.last}"
                    f" (execution.hang_timeout_s); where it stands:\n{stacks()}",
                    again=True,
                )
                os._exit(1)

    def __enter__(self) -> Watchdog:
        self.beat("start")
        if self.limit_s is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.set()


def stacks() -> str:
    """Where every thread of this process stands."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
