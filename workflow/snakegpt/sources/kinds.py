"""Lock and fetch the files of a source of any kind, of a corpus or of weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

from snakegpt.errors import UserError
from snakegpt.locks import Entry, is_inside
from snakegpt.settings import HttpSource, HuggingFaceSource, LocalSource, RegistrySource
from snakegpt.sources import http, hub, local, registry
from snakegpt.sources.downloads import part_of
from snakegpt.sources.transfers import Meter, check_disk

AnySource = RegistrySource | HuggingFaceSource | HttpSource | LocalSource


def lock(
    what: str,
    source: AnySource,
    *,
    workers: int,
    label: str,
    interval_s: float = 5.0,
    rate: int | None = None,
    before: Entry | None = None,
) -> Entry:
    """Find out which bytes a corpus or weights are made of, today.

    what     whose files they are, for messages: `corpus mine`, `weights gpt2`
    rate     bytes a second at most, of all workers together
    before   what was locked so far: a hub repository that names no revision stays at its commit
    raises   UserError if its source cannot be reached or has no such files
    """
    meter = Meter(label, interval_s=interval_s, rate=rate)
    if isinstance(source, RegistrySource):
        with tempfile.TemporaryDirectory(prefix="snakegpt-lock-") as scratch:
            entry = registry.lock(what, source, Path(scratch) / "archive", label, meter)
    elif isinstance(source, HuggingFaceSource):
        same = before is not None and before.source.get("repo") == source.repo
        commit = before.revision if before and same else None
        entry = hub.lock(what, source, workers, meter, commit)
    elif isinstance(source, HttpSource):
        entry = http.lock(what, source, workers, meter)
    else:
        entry = local.lock(what, source, workers, meter)
    for file in entry.files:
        if not is_inside(file.path):
            raise UserError(f"{what}: {file.path!r} leaves its folder.")
        try:
            file.path.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"{what}: the name {file.path!r} is not UTF-8, which the lock is.\n"
                "  give the file another name"
            ) from None
    return entry


def fetch(
    what: str,
    source: AnySource,
    entry: Entry,
    folder: Path,
    state: Path,
    *,
    workers: int,
    label: str,
    interval_s: float = 5.0,
    rate: int | None = None,
) -> None:
    """Bring the locked files of a source below `folder`, each checked against its sha256.

    state    folder with what an interrupted fetch of the same files left, and this one leaves
    raises   UserError for a full disk, an unreachable source and every wrong byte
    """
    folder.mkdir(parents=True, exist_ok=True)
    state.mkdir(parents=True, exist_ok=True)
    archive = entry.archive.bytes if entry.archive else 0
    kept = 0 if isinstance(source, LocalSource) else _kept_bytes(entry, state)
    check_disk(folder, entry.n_bytes + archive - kept, what)
    meter = Meter(label, entry.n_bytes, interval_s, rate)
    if isinstance(source, RegistrySource):
        registry.fetch(what, source, entry, folder, label, state, meter)
    elif isinstance(source, HuggingFaceSource):
        hub.fetch(what, source, entry, folder, state, workers, meter)
    elif isinstance(source, HttpSource):
        http.fetch(what, source, entry, folder, state, workers, meter)
    else:
        local.fetch(what, source, entry, folder, workers, meter)
    meter.close()


def _kept_bytes(entry: Entry, state: Path) -> int:
    """How much an interrupted fetch left in the state folder."""
    if not any(state.iterdir()):
        return 0
    found = [state / "archive" / entry.archive.name] if entry.archive else []
    for file in entry.files:
        found += [state / "files" / file.path, part_of(file, state)]
    return sum(path.stat().st_size for path in found if path.is_file())
