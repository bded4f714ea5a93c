"""What fetch_corpus and fetch_weights do: lock files that are not, fetch and check those that are."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from snakegpt import locks
from snakegpt.artefacts import note
from snakegpt.command import how_to_run, write_json
from snakegpt.errors import UserError
from snakegpt.progress import quantity
from snakegpt.sources import kinds
from snakegpt.sources.weights import require_weights

Noun = Literal["corpus", "weights"]
TABLES: dict[Noun, str] = {"corpus": "corpora", "weights": "weights"}  # of the lock file


def lock_files(noun: Noun, name: str, source: Any, **how: Any) -> locks.Entry:
    """What a corpus or weights are made of, today; see `kinds.lock`.

    raises   UserError, also for weights whose files are not what training can start from
    """
    entry = kinds.lock(f"{noun} {name}", source, **how)
    if noun == "weights":
        require_weights([file.path for file in entry.files], f"weights {name}")
    return entry


def fetch_as_locked(args: argparse.Namespace, noun: Noun, sources: Any) -> None:
    """The work of a fetching stage, whose command line `args` is.

    Writes the files below files/ and their list, <noun>.json, as the settings have it.

    sources  the source blocks that it knows
    """
    how = how_to_run(args, f"fetch_{noun}", noun, "source", "archive", "revision", "lock_file")
    name = how.extras[noun] or "unnamed"
    what = f"{noun} {name}"
    try:
        source: Any = TypeAdapter(sources).validate_python(how.extras["source"])
    except ValidationError as error:
        raise UserError(f"source: {error}") from None
    pace: dict[str, Any] = {
        "workers": how.settings.download_workers,
        "interval_s": how.settings.log_interval_s,
        "rate": how.settings.download_rate,
        "label": how.label,
    }
    if args.settings.get("files") is None:
        lock_file = Path(how.extras["lock_file"] or "corpora.lock.json")
        before = locks.read(lock_file).get(name)
        entry = lock_files(noun, name, source, before=before, **pace)
        locks.put(lock_file, {name: entry}, TABLES[noun])
        raise UserError(
            f"{what} {'is' if noun == 'corpus' else 'are'} now locked: {len(entry.files):,} files,"
            f" {quantity(entry.n_bytes, 'B')}, in {lock_file}.\n"
            "  look at it, commit it and run the same command again"
        )
    archive = how.extras["archive"]
    entry = locks.Entry(
        how.extras["source"],
        tuple(locks.File(**file) for file in args.settings["files"]),
        how.extras["revision"],
        locks.Archive(**archive) if archive else None,
    )
    files = args.out / "files"
    state = args.state or args.out / ".state"
    kinds.fetch(what, source, entry, files, state, **pace)
    for file in entry.files:
        note(files / file.path, file.sha256)  # hashed on the way
    write_json(args.out / f"{noun}.json", {"files": args.settings["files"]})
    if args.state is None:
        shutil.rmtree(state)  # it has served
