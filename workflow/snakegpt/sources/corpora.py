"""A fetched corpus on disk: corpus.json, and the raw files below files/ beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from snakegpt.errors import UserError
from snakegpt.sources.transfers import fingerprint


class Source(NamedTuple):
    """A raw file of a part, or the documents that begin in a byte range of it.

    name     what drops.json calls it: the file's path in the corpus, and where the range begins
    n_bytes  of the file or range
    """

    path: Path
    file: str
    span: tuple[int, int] | None
    n_bytes: int

    @property
    def name(self) -> str:
        return f"{self.file}@{self.span[0]}" if self.span and self.span[0] else self.file


def raw_files(corpus: Path, wanted: Sequence[str] | None = None) -> list[Path]:
    """The raw files of a corpus.json (or a weights.json), in its order or those wanted in theirs.

    raises   UserError that names a file which is not there
    """
    try:
        listed = [file["path"] for file in json.loads(corpus.read_text(encoding="utf-8"))["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{corpus} is no list of files: {error}.") from None
    paths = [corpus.parent / "files" / path for path in (listed if wanted is None else wanted)]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{path} is missing.\n"
                f"  fetch the {corpus.stem} again: snakemake --forcerun fetch_{corpus.stem}"
            )
    return paths


def sources_of(corpus: Path, wanted: list[dict[str, Any]] | None) -> list[Source]:
    """The raw files of a part, checked against the lock; all of the corpus if none are named."""
    files = raw_files(corpus, [file["path"] for file in wanted] if wanted else None)
    sources = []
    for path, file in zip(files, wanted or [{}] * len(files), strict=True):
        if file:
            check_raw(path, file)
        size = path.stat().st_size
        span = (file["from"], file["to"]) if "from" in file else None
        name = file.get("path") or path.relative_to(corpus.parent / "files").as_posix()
        sources.append(Source(path, name, span, span[1] - span[0] if span else size))
    return sources


def check_raw(path: Path, file: Mapping[str, Any]) -> None:
    """Stop unless a raw file still is the locked one; hashing costs 1 % of encoding.

    A link to the store's object of that sha256 needs none: `verify` looks after those.
    """
    is_object = os.path.basename(os.path.realpath(path)) == file["sha256"]
    if is_object and path.stat().st_size == file["bytes"]:
        return
    sha256, n_bytes = fingerprint(path)
    if (sha256, n_bytes) != (file["sha256"], file["bytes"]):
        raise UserError(
            f"{path} is not the file that was locked.\n"
            f"  expected: sha256 {file['sha256']}, {file['bytes']:,} bytes\n"
            f"  found:    sha256 {sha256}, {n_bytes:,} bytes\n"
            "  it was damaged or changed: fetch the corpus again: snakemake --forcerun fetch_corpus"
        )
