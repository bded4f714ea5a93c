"""Progress that reads well on a terminal, in a log file and through a cluster's job output.

On a terminal there is one live line, written again in place; elsewhere a plain line now and then. The live
line needs no thread and hides no cursor: a process that is killed leaves the terminal as it was.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

LIVE_INTERVAL_S = 0.2
BAR, MIN_BAR = 20, 4  # columns, where there is room
ERASE = "\r\x1b[K"  # to the line's begin, and what follows away
GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"

_live = ""  # the live line that stands on the terminal just now


def say(text: str, stream: TextIO | None = None) -> None:
    """Print one line for people, at once; above the live line if there is one."""
    if _live and stream is None:
        sys.stderr.write(f"{ERASE}{text}\n{_live}")
        sys.stderr.flush()
    else:
        print(text, file=stream or sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether standard error is a terminal that can write a line again in place."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def duration(seconds: float) -> str:
    """`h:mm:ss` above an hour, else `m:ss`."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def quantity(number: float, unit: str = "") -> str:
    """A number with a decimal prefix and three digits: 1_566_001 -> '1.57M'."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{prefix}{unit}"
    return f"{number:.3g}{unit}"


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 file, 1,200 files."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def columns(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Lines of a table whose columns are as wide as they must be, two blanks between them.

    sides  < or > for each column: where its cells stand
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


class Progress:
    """How far a piece of work is: a live line on a terminal, else a line every `interval_s` seconds.

    A line reads `label  120/1,500 steps  8%  loss 5.32  12.3k tokens/s  left 3:20`; a live one has a bar
    after its label. The time left follows from the work done since this object was made, so a resumed run
    starts with `done` set.
    """

    def __init__(
        self, label: str, total: int, unit: str, *, done: int = 0, interval_s: float = 5.0
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.live = on_terminal()
        self.interval_s = LIVE_INTERVAL_S if self.live else interval_s
        self._first = done
        self._started = time.monotonic()
        self._last_line = -float("inf")

    def update(self, done: int, *facts: str, force: bool = False) -> None:
        """Report that `done` of the total is finished; facts are short texts such as 'loss 5.32'."""
        now = time.monotonic()
        if not (force or done >= self.total or now - self._last_line >= self.interval_s):
            return
        self._last_line = now
        share = min(1.0, done / max(self.total, 1))
        parts = [f"{done:,}/{self.total:,} {self.unit}", f"{100 * share:.0f}%", *facts]
        fresh = done - self._first
        if fresh > 0 and done < self.total:
            left = (now - self._started) / fresh * (self.total - done)
            parts.append(f"left {duration(left)}")
        if self.live:
            self._show(share, "  ".join(parts), ended=done >= self.total)
        else:
            say("  ".join([self.label, *parts]))

    def _show(self, share: float, text: str, *, ended: bool) -> None:
        global _live
        room = shutil.get_terminal_size().columns - 1 - len(self.label) - 2
        columns = min(BAR, room - len(text) - 2)
        bar = ""
        if columns >= MIN_BAR:
            filled = round(share * columns)
            bar = f"{GREEN}{'━' * filled}{DIM}{'━' * (columns - filled)}{PLAIN}  "
        line = f"{self.label}  {bar}{text[: max(room, 0)]}"
        sys.stderr.write(ERASE + line + ("\n" if ended else ""))
        sys.stderr.flush()
        _live = "" if ended else line
