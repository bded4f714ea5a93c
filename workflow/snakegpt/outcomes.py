"""How ranks end, and how the process that started them hears of it.

torchrun leaves with status 1 whatever happened, so the first rank to end badly writes what happened to a
file, whose path it finds in its environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snakegpt.errors import RETRY, USER_ERROR, Interrupted, UserError, way_out

STOPPED_EARLY = "stopped before the first step; the same command starts again"
OUTCOME = "SNAKEGPT_OUTCOME"
AGENT = "SNAKEGPT_AGENT_PID"


class StartAgain(Interrupted):
    """A rank knows what to do otherwise in a new attempt, and wants all of them to make one."""


@dataclass(frozen=True)
class Outcome:
    """How the ranks that one process started ended: status 0, or why not, in words.

    again   another attempt may end otherwise: a rank knows what to do, was killed or hung
    shared  it also stands where the one who called all nodes finds it
    """

    status: int = 0
    text: str = ""
    again: bool = False
    shared: bool = False

    def raise_for_status(self) -> None:
        """Nothing if all went well, else the exception that says why not, unless another will say it."""
        if not self.status:
            return
        if self.shared:
            raise SystemExit(self.status)
        raise_outcome({"status": self.status, "text": self.text}, self.status)


def raise_outcome(found: Mapping[str, Any], status: int, more: str = "") -> None:
    """Turn how ranks ended into the exception that says so."""
    status, text = int(found.get("status", status)), str(found.get("text", ""))
    if status == USER_ERROR and text:
        raise UserError(text)
    if status == RETRY:
        raise Interrupted(text or STOPPED_EARLY)
    raise SystemExit("\n  ".join(filter(None, [f"error: {text or 'a node failed'}", more])))


def read_outcome(outcome: Path) -> dict[str, Any]:
    """What a rank wrote to its outcome file; nothing where none did."""
    try:
        found: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


# ---- in a rank ----


@contextlib.contextmanager
def reporting_outcome() -> Iterator[None]:
    """In a rank that `launching.run_ranks` started: write how it ended to the outcome file and say nothing."""
    if OUTCOME not in os.environ:
        yield
        return
    _die_with(int(os.environ[AGENT]))
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError):
            status, text = USER_ERROR, str(error)
        elif disk := way_out(error):
            status, text = USER_ERROR, disk
        elif isinstance(error, Interrupted | KeyboardInterrupt):
            status, text = RETRY, str(error) or STOPPED_EARLY
        else:
            status, text = 1, traceback.format_exc()
        tell_outcome(status, text, again=isinstance(error, StartAgain))
        # Not sys.exit: a failed rank must not wait for the others in the interpreter's clean-up.
        os._exit(status)


def tell_outcome(status: int, text: str, *, again: bool = False) -> None:
    """Write how this rank ends for `launching.run_ranks` to tell, or say it where nobody launched.

    again  whether another attempt may end otherwise

    The first rank to end badly wins; what the others then suffer from its absence is noise.
    """
    path, rank = os.environ.get(OUTCOME), os.environ.get("RANK")
    if path is None or rank is None:
        print(f"error: {text}", file=sys.stderr, flush=True)
        return
    text = f"rank {rank}: {text}" if status == 1 else text
    sys.stderr.flush()
    with contextlib.suppress(FileExistsError):
        scratch = Path(f"{path}.{rank}")
        outcome = {"status": status, "text": text, "again": again}
        scratch.write_text(json.dumps(outcome), encoding="utf-8")
        os.link(scratch, path)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent dies (Linux), so that no state has two writers."""
    if sys.platform != "linux":
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
