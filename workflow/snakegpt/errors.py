"""The one exception that people are meant to read, and the status codes that go with it."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Callable, Iterable
from functools import wraps

USER_ERROR = 2  # bad input: fix the input, then run again
INTERRUPTED = 130  # Ctrl-C, as shells say it
RETRY = 75  # EX_TEMPFAIL: state is saved, run the same command again


class UserError(Exception):
    """A mistake in settings, data or environment. Says what, where, and the way out; no traceback."""


class Interrupted(Exception):
    """The work was stopped from outside and its state is saved; the same command resumes it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The valid name closest to a mistyped one, as a sentence to append to an error; '' if none is near."""
    candidates = sorted(known)
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    if close:
        return f" Nearest valid name: {close[0]}."
    return f" Valid names: {', '.join(candidates)}." if candidates else ""


# What a disk says that people can mend, and how. Anything else is a defect and keeps its traceback.
_ROOM = (
    "free some: `python -m snakegpt.store gc` shows what the store can do without; or move the store:"
    " store.path in config.yaml, or SNAKEGPT_STORE"
)
_RIGHTS = (
    "make it readable and writable for this user, or move the store: store.path in config.yaml, or"
    " SNAKEGPT_STORE"
)
_WAYS_OUT = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
}


def way_out(error: BaseException) -> str | None:
    """What the system says of a disk in words for people; None for what they cannot mend."""
    if not isinstance(error, OSError) or error.errno not in _WAYS_OUT:
        return None
    place = error.filename2 or error.filename
    what = f"{place}: {error.strerror}" if place else error.strerror
    return f"{what}.\n  {_WAYS_OUT[error.errno]}"


def reports_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a `main`: a UserError becomes one message and status 2, an interruption status 75.

    A full disk and a missing permission are messages too.
    """

    @wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(USER_ERROR) from None
        except OSError as error:
            text = way_out(error)
            if text is None:
                raise
            print(f"error: {text}", file=sys.stderr, flush=True)
            raise SystemExit(USER_ERROR) from None
        except Interrupted as note:
            print(f"interrupted: {note}", file=sys.stderr, flush=True)
            raise SystemExit(RETRY) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            raise SystemExit(INTERRUPTED) from None

    return wrapped
