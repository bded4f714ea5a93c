"""Files on this machine or a shared filesystem."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from snakegpt.errors import UserError
from snakegpt.locks import Entry, File, update_command
from snakegpt.progress import say
from snakegpt.settings import LocalSource
from snakegpt.sources.transfers import Drifts, Meter, copy, in_parallel, verify


def lock(what: str, source: LocalSource, workers: int, meter: Meter) -> Entry:
    """Hash the files that the patterns name now."""
    found = sorted(_files(what, source).items())

    def one(pair: tuple[str, Path]) -> tuple[str, int]:
        with pair[1].open("rb") as stream:
            return copy(stream, meter=meter)

    digests = in_parallel(one, found, workers)
    files = (File(path, *digest) for (path, _), digest in zip(found, digests, strict=True))
    return Entry(source.model_dump(mode="json"), tuple(files))


def fetch(
    what: str, source: LocalSource, entry: Entry, folder: Path, workers: int, meter: Meter
) -> None:
    """Copy the locked files below `folder`.

    Copies, not links: what is published becomes read-only, and a later edit of the user's own file
    must not reach it.
    """
    found = _files(what, source)

    def fetch_one(file: File) -> None:
        origin = found.get(file.path)
        if origin is None:
            patterns = " or ".join(source.paths)
            raise UserError(f"{what}: {file.path} is locked but no longer below {patterns}.")
        with origin.open("rb") as stream:
            verify(copy(stream, folder / file.path, meter), file, what, str(origin))

    with Drifts(what) as drifts:
        in_parallel(drifts.noting(fetch_one), entry.files, workers)
    more = sorted(found.keys() - {file.path for file in entry.files})
    if more:
        some = ", ".join(more[:3])
        say(
            f"{what}  {len(more):,} files there are not locked and stay out ({some});"
            f" to take them: {update_command(what)}"
        )


def _files(what: str, source: LocalSource) -> dict[str, Path]:
    """Path in the lock -> file, for every file that a pattern matches."""
    found: dict[str, Path] = {}
    for pattern in source.paths:
        root = _fixed_part(pattern)
        here = [
            Path(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)
        ]
        if not here:
            raise UserError(
                f"{what}: no file matches {pattern} (seen from {Path.cwd()}).\n"
                f"  change source.paths of {what}, or put the file there"
            )
        for file in here:
            path = file.relative_to(root).as_posix()
            if found.setdefault(path, file).absolute() != file.absolute():
                raise UserError(
                    f"{what}: {found[path]} and {file} would both be {path}.\n"
                    "  give them different names, or use one pattern for both"
                )
    return found


def _fixed_part(pattern: str) -> Path:
    """The folder of a pattern down to its first wildcard."""
    parts = Path(pattern).parts[:-1]
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))
    return Path(*parts[:fixed])
