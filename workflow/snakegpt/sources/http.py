"""Files at URLs."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from snakegpt.errors import UserError
from snakegpt.locks import Entry, File, is_inside
from snakegpt.settings import HttpSource
from snakegpt.sources.downloads import Origin, bring, hashed, public
from snakegpt.sources.transfers import Drifts, Meter, copy, hand_over, in_parallel, verify


def lock(what: str, source: HttpSource, workers: int, meter: Meter) -> Entry:
    """Read and hash what is at every URL; nothing is kept of it."""

    def one(item: tuple[str, str]) -> File:
        path, url = item
        if _is_local(url):
            return File(path, *_copy(url, None, meter))
        return File(path, *hashed(Origin(url), meter))

    files = in_parallel(one, sorted(_paths(what, source).items()), workers)
    return Entry(source.model_dump(mode="json"), tuple(files))


def fetch(
    what: str,
    source: HttpSource,
    entry: Entry,
    folder: Path,
    state: Path,
    workers: int,
    meter: Meter,
) -> None:
    """Write the locked files below `folder`; `state` keeps what came, should this be broken off."""
    paths = _paths(what, source)

    def one(file: File) -> None:
        if file.path not in paths:
            raise UserError(f"{what}: {file.path} is locked, but no URL ends in it.")
        url = paths[file.path]
        if _is_local(url):
            verify(_copy(url, folder / file.path, meter), file, what, url)
        else:
            hand_over(bring(file, Origin(url), state, meter, what), folder / file.path)

    with Drifts(what) as drifts:
        in_parallel(drifts.noting(one), entry.files, workers)


def _is_local(url: str) -> bool:
    return url.startswith("file://")


def _copy(url: str, target: Path | None, meter: Meter) -> tuple[str, int]:
    try:
        with urllib.request.urlopen(url) as stream:
            return copy(stream, target, meter)
    except urllib.error.URLError as error:
        raise UserError(f"cannot read {url}: {error.reason}.") from None


def _paths(what: str, source: HttpSource) -> dict[str, str]:
    """Path in the lock -> URL: the last part of the URL's path."""
    paths: dict[str, str] = {}
    for url in source.urls:
        path = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
        if not is_inside(path) or not Path(path).name:
            raise UserError(f"{what}: {public(url)} does not end in a file name.")
        if path in paths:
            both = f"{public(paths[path])} and {public(url)}"
            raise UserError(f"{what}: {both} would both be {path}.")
        paths[path] = url
    return paths
