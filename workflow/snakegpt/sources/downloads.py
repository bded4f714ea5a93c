"""Bytes from a URL: taken up where they broke off, retried with patience, hashed on the way.

A part file survives a killed process, so that the next one asks for the rest alone. What a part holds
is read again before it is continued, and a file gets its name only when its digest is the wanted one.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit, urlunsplit

import requests
import requests.auth
import urllib3

from snakegpt.errors import UserError
from snakegpt.locks import File
from snakegpt.progress import say
from snakegpt.sources.transfers import CHUNK_BYTES, Meter, fingerprint, verify

Result = TypeVar("Result")

TIMEOUT_S = (5, 60)  # to connect, and between two pieces
ATTEMPTS = 6  # in a row that bring nothing new: 15 s
BACK_OFF_S = 0.5  # doubled after each attempt
MAX_WAIT_S = 600  # a server that asks for more patience than this is given up
SAID_WAIT_S = 5  # a shorter one passes unnoticed
PIECE_BYTES = 1 << 16  # of a body


class Trouble(Exception):
    """A refusal or a lost connection, with what decides whether to ask again.

    status       what the server answered; None: it did not
    wait_s       how long it asks to wait
    unreachable  there was no connection at all
    """

    def __init__(
        self,
        reason: str,
        status: int | None = None,
        wait_s: float | None = None,
        *,
        unreachable: bool = False,
        hopeless: bool = False,
    ) -> None:
        super().__init__(reason)
        self.status, self.wait_s, self.unreachable = status, wait_s, unreachable
        refused = status is not None and status not in (408, 429) and status < 500
        self.hopeless = hopeless or refused


def persistently(
    attempt: Callable[[], Result], host: str, arrived: Callable[[], int] = lambda: 0
) -> Result:
    """What an attempt gives, as soon as one succeeds.

    arrived  bytes that are here; as long as they grow, a download may break as often as it likes
    raises   Trouble of the last attempt; at once for a refusal, or a host that was never reached
    """
    failures, furthest, was_reached = 0, arrived(), False
    while True:
        try:
            return attempt()
        except Trouble as trouble:
            moved = arrived() > furthest
            failures = 1 if moved else failures + 1
            furthest = max(furthest, arrived())
            was_reached = was_reached or moved or not trouble.unreachable
            wait_s = BACK_OFF_S * 2 ** (failures - 1) if trouble.wait_s is None else trouble.wait_s
            hopeless = trouble.hopeless or not was_reached or wait_s > MAX_WAIT_S
            if hopeless or failures >= ATTEMPTS:
                raise
            if wait_s >= SAID_WAIT_S:
                say(f"{host}: {trouble}; asked again in {wait_s:.0f} s")
            time.sleep(wait_s)


def asked_wait_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: `Retry-After`, or the hub's `RateLimit` when it is used up."""
    value = headers.get("Retry-After")
    if value is None:
        used_up = re.search(r"\br=0\b.*?\bt=(\d+)", headers.get("RateLimit") or "")
        return float(used_up[1]) if used_up else None
    if value.strip().isdigit():
        return float(value)
    try:
        until = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (until.astimezone(UTC) - datetime.now(UTC)).total_seconds())


@dataclass(frozen=True)
class Origin:
    """A URL, how to ask for it and what to tell people where it refuses.

    advice  status -> the way out
    """

    url: str
    auth: requests.auth.AuthBase | None = None
    advice: Mapping[int, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The URL without what may be secret: user name, password, query."""
        return public(self.url)


def public(url: str) -> str:
    """A URL without user name, password and query."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def hashed(origin: Origin, meter: Meter) -> tuple[str, int]:
    """(sha256, bytes) of what is at a URL; nothing is kept of it."""
    with contextlib.closing(_Sink()) as sink:
        return _bring(origin, sink, None, meter)


def hashed_to(origin: Origin, target: Path, meter: Meter) -> tuple[str, int]:
    """Download what is at a URL, whatever it is; returns its (sha256, bytes)."""
    with contextlib.closing(_Sink(target)) as sink:
        return _bring(origin, sink, None, meter)


def bring(file: File, origin: Origin, state: Path, meter: Meter, what: str) -> Path:
    """The locked file, in the state folder; what an earlier run left there is asked for no more.

    raises   UserError if the host cannot be reached or says no; transfers.Drifted for other bytes
    """
    wanted = (file.sha256, file.bytes)
    kept = state / "files" / file.path
    if kept.is_file():
        if fingerprint(kept) == wanted:
            meter.add(file.bytes, fresh=False)
            return kept
        kept.unlink()  # power failed before it was on the disk
    part = part_of(file, state)
    part.parent.mkdir(parents=True, exist_ok=True)
    resumed = part.is_file()
    found = _to_disk(origin, part, file, meter)
    if found != wanted and resumed:  # of another day's file, or damaged where it lay
        part.unlink()
        meter.add(-found[1], fresh=False)
        found = _to_disk(origin, part, file, meter)
    if found != wanted:
        part.unlink()
    verify(found, file, what, origin.shown)
    kept.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, kept)
    return kept


def part_of(file: File, state: Path) -> Path:
    """Where the first bytes of an unfinished file lie; its own name may be too long for a suffix."""
    return state / "parts" / f"{hashlib.sha256(file.path.encode()).hexdigest()}.part"


def _to_disk(origin: Origin, part: Path, file: File, meter: Meter) -> tuple[str, int]:
    try:
        with contextlib.closing(_Sink(part)) as sink:
            if sink.n_bytes > file.bytes:
                sink.restart()
            meter.add(sink.n_bytes, fresh=False)
            if file.bytes and sink.n_bytes == file.bytes:
                return sink.sha256, sink.n_bytes
            return _bring(origin, sink, file.bytes, meter)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk is full: {file.path} needs {file.bytes:,} bytes in {part.parent}.\n"
            "  what came is kept: free some space and run the same command again"
        ) from None


class _Sink:
    """Where the bytes go: into a digest, and to a part file if there is one, behind what it holds."""

    def __init__(self, part: Path | None = None) -> None:
        self._digest, self.n_bytes = hashlib.sha256(), 0
        self._file: BinaryIO | None = None
        if part is None:
            return
        if part.is_file():
            with part.open("rb") as kept:
                while chunk := kept.read(CHUNK_BYTES):
                    self._digest.update(chunk)
                    self.n_bytes += len(chunk)
        self._file = part.open("ab", buffering=0)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self.n_bytes += len(data)
        view = memoryview(data)
        while self._file and view:
            view = view[self._file.write(view) :]

    def restart(self) -> None:
        self._digest, self.n_bytes = hashlib.sha256(), 0
        if self._file:
            self._file.truncate(0)

    def close(self) -> None:
        if self._file:
            self._file.close()


def _bring(origin: Origin, sink: _Sink, n_bytes: int | None, meter: Meter) -> tuple[str, int]:
    """Fill a sink; `n_bytes`: of the whole file, if known."""
    versions: list[str] = []  # ETag of what the sink holds, if this process began it
    try:
        persistently(
            lambda: _attempt(origin, sink, n_bytes, versions, meter),
            urlsplit(origin.url).hostname or "",
            lambda: sink.n_bytes,
        )
    except Trouble as trouble:
        raise UserError(_explain(origin, trouble)) from None
    return sink.sha256, sink.n_bytes


def _attempt(
    origin: Origin, sink: _Sink, n_bytes: int | None, versions: list[str], meter: Meter
) -> None:
    try:
        _ask(origin, sink, n_bytes, versions, meter)
    except requests.RequestException as error:
        raise _trouble(error) from None


def _ask(
    origin: Origin, sink: _Sink, n_bytes: int | None, versions: list[str], meter: Meter
) -> None:
    start = sink.n_bytes
    # `identity`: the bytes that are hashed are the file's, not a compressed form of it.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if versions:  # else the digest tells whether the two halves are of one file
            headers["If-Range"] = versions[0]
    asked = _session().get(
        origin.url, headers=headers, stream=True, timeout=TIMEOUT_S, auth=origin.auth
    )
    with asked as response:
        beginning = response.headers.get("Content-Range", f"bytes {start}-")
        continues = response.status_code == 206 and beginning.startswith(f"bytes {start}-")
        if start and not continues and response.status_code in (200, 206, 416):
            sink.restart()
            versions.clear()
            meter.add(-start, fresh=False)
            if response.status_code != 200:
                raise requests.ConnectionError("the part did not fit the file")
            start = 0
        response.raise_for_status()
        tag = response.headers.get("ETag", "")
        if tag and not tag.startswith("W/"):
            versions[:] = [tag]
        for chunk in _pieces(response):
            sink.write(chunk)
            meter.add(len(chunk))
            meter.throttle.take(len(chunk))
        length = response.headers.get("Content-Length")
    end = start + int(length) if length else n_bytes
    if end is not None and sink.n_bytes < end:
        raise requests.ConnectionError(
            f"the connection ended after {sink.n_bytes:,} of {end:,} bytes"
        )


_of_thread = threading.local()


def _session() -> requests.Session:
    """This thread's open connections: many small files of one host need few."""
    if not hasattr(_of_thread, "session"):
        _of_thread.session = requests.Session()
    session: requests.Session = _of_thread.session
    return session


def _pieces(response: requests.Response) -> Iterator[bytes]:
    """The body as it was sent: a `Content-Encoding` that nobody asked for is part of the file."""
    try:
        yield from response.raw.stream(PIECE_BYTES, decode_content=False)
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(str(error)) from error


def _trouble(error: requests.RequestException) -> Trouble:
    if error.response is not None:
        answer = error.response
        wait_s = asked_wait_s(answer.headers)
        reason = f"the server answers {answer.status_code} {answer.reason}"
        return Trouble(reason, answer.status_code, wait_s)
    broken = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    if not isinstance(error, broken):
        return Trouble(type(error).__name__, hopeless=True)
    unreachable = isinstance(error, requests.ConnectionError) and "Max retries" in str(error)
    return Trouble(_root(error), unreachable=unreachable)


def _root(error: BaseException) -> str:
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__


def _explain(origin: Origin, trouble: Trouble) -> str:
    if trouble.status is not None:
        waits = f" and asks to wait {trouble.wait_s:.0f} s" if trouble.wait_s else ""
        head = f"cannot download {origin.shown}: {trouble}{waits}."
        advice = origin.advice.get(trouble.status)
        return f"{head}\n  {advice}" if advice else head
    if trouble.hopeless:
        return f"cannot download {origin.shown}: {trouble}."
    host = urlsplit(origin.url).hostname
    return (
        f"cannot download {origin.shown}: {host} cannot be reached or drops the connection ({trouble}).\n"
        "  check network and proxy (HTTPS_PROXY), then run the same command again"
    )
