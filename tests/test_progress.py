"""Progress: one live line on a terminal, as a terminal would show it; plain lines elsewhere."""

from __future__ import annotations

import io
import re
import types

import pytest
from snakegpt import progress
from snakegpt.progress import Progress, say


class Terminal(io.StringIO):
    """Standard error that is a terminal, and what a reader sees on it."""

    def isatty(self):
        return True

    def screen(self):
        lines = [""]
        for piece in re.findall(r"\r|\n|\x1b\[K|\x1b\[\d+m|[^\r\n\x1b]+", self.getvalue()):
            if piece == "\n":
                lines.append("")
            elif piece == "\x1b[K":
                lines[-1] = ""  # always after \r here
            elif not piece.startswith("\x1b") and piece != "\r":
                lines[-1] += piece
        return lines


@pytest.fixture
def terminal(monkeypatch):
    found = Terminal()
    # Not sys.stderr itself, which pytest takes back before the test.
    monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=found))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr(progress, "_live", "")
    monkeypatch.setattr(progress, "LIVE_INTERVAL_S", 0.0)
    return found


def test_a_terminal_shows_one_line_that_is_written_again(terminal):
    work = Progress("train", 100, "steps")
    work.update(10, "loss 5.320", "12.3k tokens/s", "MFU 41.0%")
    work.update(50, "loss 4.100", "12.4k tokens/s", "MFU 41.2%")
    [line] = terminal.screen()
    assert "50/100 steps  50%  loss 4.100  12.4k tokens/s  MFU 41.2%  left" in line
    assert 4 <= line.count("━") <= 20
    assert len(line) < 90


def test_what_is_said_meanwhile_stands_above_the_live_line(terminal):
    work = Progress("train", 100, "steps")
    work.update(10, "loss 5.320")
    say("train  skipped the update of step 11")
    above, live = terminal.screen()
    assert above == "train  skipped the update of step 11"
    assert "10/100" in live
    work.update(100, "loss 3.000")
    say("done")
    assert [line[:4] for line in terminal.screen()] == ["trai", "trai", "done", ""]


def test_a_narrow_terminal_cuts_the_line_and_does_not_wrap(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    Progress("train", 100, "steps").update(10, "loss 5.320", "a very long fact indeed")
    [line] = terminal.screen()
    assert len(line) < 50


def test_elsewhere_lines_are_plain_and_not_too_many(capsys):
    work = Progress("train", 1000, "steps", interval_s=1000)
    for step in range(1, 1001):
        work.update(step, "loss 1.0")
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("train  1/1,000 steps  0%  loss 1.0")
    assert last == "train  1,000/1,000 steps  100%  loss 1.0"


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    Progress("train", 10, "steps").update(5)
    assert "\x1b" not in terminal.getvalue()
