"""Corpora at URLs: resumed where the server allows it, retried, hashed on the way."""

from __future__ import annotations

import hashlib
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import requests
import urllib3

from snakegpt.errors import UserError
from snakegpt.locks import Entry, File, is_inside
from snakegpt.settings import HttpSource
from snakegpt.sources.transfers import CHUNK_BYTES, Meter, check_disk, copy, in_parallel, verify

TIMEOUT_S = (5, 60)  # to connect, and between two pieces
ATTEMPTS = 5  # in a row that bring nothing new
PIECE_BYTES = 1 << 16  # of a body
BACK_OFF_S = 0.5  # doubled after each attempt


def lock(name: str, source: HttpSource, folder: Path, workers: int, meter: Meter) -> Entry:
    """Download every URL to `folder` and hash it."""
    paths = _paths(name, source)

    def one(item: tuple[str, str]) -> File:
        path, url = item
        return File(path, *download(url, folder / path, meter, lambda found: None))

    files = in_parallel(one, sorted(paths.items()), workers)
    return Entry(source.model_dump(mode="json"), tuple(files))


def fetch(
    name: str, source: HttpSource, entry: Entry, folder: Path, workers: int, meter: Meter
) -> None:
    """Write the locked files below `folder`."""
    paths = _paths(name, source)

    def one(file: File) -> None:
        if file.path not in paths:
            raise UserError(f"corpus {name}: {file.path} is locked, but no URL ends in it.")
        url = paths[file.path]
        download(
            url, folder / file.path, meter, lambda found: verify(found, file, name, public(url))
        )

    in_parallel(one, entry.files, workers)


def _paths(name: str, source: HttpSource) -> dict[str, str]:
    """Path in the corpus -> URL: the last part of the URL's path."""
    paths: dict[str, str] = {}
    for url in source.urls:
        path = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
        if not is_inside(path) or not Path(path).name:
            raise UserError(f"corpus {name}: {public(url)} does not end in a file name.")
        if path in paths:
            both = f"{public(paths[path])} and {public(url)}"
            raise UserError(f"corpus {name}: {both} would both be {path}.")
        paths[path] = url
    return paths


def public(url: str) -> str:
    """A URL without user name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def download(
    url: str, target: Path, meter: Meter, check: Callable[[tuple[str, int]], None]
) -> tuple[str, int]:
    """Bring a URL to a file, in as many attempts as it takes; returns (sha256, bytes).

    check    gets (sha256, bytes) before the file has its name, and raises if they are wrong
    raises   UserError if the host cannot be reached or says no
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if url.startswith("file://"):
        try:
            with urllib.request.urlopen(url) as stream:
                found = copy(stream, part, meter)
        except (urllib.error.URLError, OSError) as error:
            raise UserError(
                f"cannot read {public(url)}: {getattr(error, 'reason', error)}."
            ) from None
    else:
        found = _from_server(url, part, meter)
    check(found)
    os.replace(part, target)
    return found


def _from_server(url: str, part: Path, meter: Meter) -> tuple[str, int]:
    failures, furthest = 0, 0
    while True:
        try:
            return _attempt(url, part, meter)
        except requests.RequestException as error:
            # A long download may break as often as it likes, as long as it moves on.
            reached = part.stat().st_size if part.exists() else 0
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures >= ATTEMPTS or not _passing(error):
                raise UserError(_explain(url, error)) from None
            time.sleep(BACK_OFF_S * 2 ** (failures - 1))


def _attempt(url: str, part: Path, meter: Meter) -> tuple[str, int]:
    digest, start = hashlib.sha256(), 0
    if part.exists():
        with part.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                start += len(chunk)
    # `identity`: the bytes that are hashed are the file's, not a compressed form of it.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if response.status_code == 416:  # nothing is left: the part is whole, or of an older file
            part.unlink()
            meter.add(-start)
            raise requests.ConnectionError("the part did not fit the file")
        response.raise_for_status()
        if start and response.status_code != 206:  # the server starts over
            digest, mode = hashlib.sha256(), "wb"
            meter.add(-start)
            start = 0
        else:
            mode = "ab"
        expected = response.headers.get("Content-Length")
        # While locking, nobody knows its size any earlier.
        check_disk(part.parent, int(expected or 0), public(url))
        n_bytes = 0
        with part.open(mode) as sink:
            for chunk in _pieces(response):
                digest.update(chunk)
                sink.write(chunk)
                n_bytes += len(chunk)
                meter.add(len(chunk))
    if expected is not None and n_bytes != int(expected):
        raise requests.ConnectionError(
            f"the connection ended after {n_bytes:,} of {int(expected):,} bytes"
        )
    return digest.hexdigest(), start + n_bytes


def _pieces(response: requests.Response) -> Iterator[bytes]:
    """The body as it was sent: a `Content-Encoding` that nobody asked for is part of the file."""
    try:
        yield from response.raw.stream(PIECE_BYTES, decode_content=False)
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(str(error)) from error


def _passing(error: requests.RequestException) -> bool:
    """Whether trying again may help: a dropped connection or an overloaded server, not a refusal."""
    if error.response is not None:
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    unreachable = isinstance(error, requests.ConnectionError) and "Max retries" in str(error)
    wrong = isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema)
    return not (unreachable or wrong)


def _explain(url: str, error: requests.RequestException) -> str:
    if error.response is not None:
        status = f"{error.response.status_code} {error.response.reason}"
        return f"cannot download {public(url)}: the server answers {status}."
    host = urlsplit(url).hostname
    broken = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    if isinstance(error, broken):
        return (
            f"cannot download {public(url)}: {host} cannot be reached or drops the connection ({_root(error)}).\n"
            "  check network and proxy (HTTPS_PROXY), then run the same command again"
        )
    return f"cannot download {public(url)}: {type(error).__name__}."


def _root(error: BaseException) -> str:
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__
