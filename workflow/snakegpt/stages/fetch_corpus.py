"""Bring the files of a corpus here and check every one against the sha256 in the lock.

Reads: the files' source. Writes: corpus.json (path, sha256 and bytes of each file, in lock order) and
the raw files below files/. A corpus that is not locked yet is locked first, and then this stops: what
was found is to be looked at and committed. The state folder keeps finished files and the beginnings of
others, so that a killed fetch asks for the rest alone. By hand:

    python -m snakegpt.stages.fetch_corpus --out /tmp/corpus \\
        --settings '{"files": [{"path": "a.txt", "sha256": "...", "bytes": 3}]}' \\
        --execution '{"corpus": "mine", "source": {"kind": "local", "paths": ["texts/*.txt"]}}'
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from snakegpt import locks
from snakegpt.artefacts import note
from snakegpt.command import how_to_run, stage_parser, write_json
from snakegpt.errors import UserError, reports_errors
from snakegpt.progress import quantity
from snakegpt.settings import Source
from snakegpt.sources import kinds

REVISION = 1
SCIENCE = ()  # the lock decides the bytes


@reports_errors
def main(argv: list[str] | None = None) -> None:
    args = stage_parser(__doc__, state=True).parse_args(argv)
    extras = ("corpus", "source", "archive", "revision", "lock_file")
    how = how_to_run(args, "fetch_corpus", *extras)
    name = how.extras["corpus"] or "unnamed"
    try:
        source: Any = TypeAdapter(Source).validate_python(how.extras["source"])
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
        entry = kinds.lock(name, source, before=locks.read(lock_file).get(name), **pace)
        locks.put(lock_file, {name: entry})
        raise UserError(
            f"corpus {name} is now locked: {len(entry.files):,} files, {quantity(entry.n_bytes, 'B')},"
            f" in {lock_file}.\n  look at it, commit it and run the same command again"
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
    kinds.fetch(name, source, entry, files, state, **pace)
    for file in entry.files:
        note(files / file.path, file.sha256)  # hashed on the way
    write_json(args.out / "corpus.json", {"files": args.settings["files"]})
    if args.state is None:
        shutil.rmtree(state)  # it has served


if __name__ == "__main__":
    main()
