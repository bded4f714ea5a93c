"""A fetched corpus on disk: corpus.json, and the raw files below files/ beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from snakegpt.errors import UserError


def raw_files(corpus: Path, wanted: Sequence[str] | None = None) -> list[Path]:
    """The raw files of a corpus.json, in its order or those wanted in theirs.

    raises   UserError that names a file which is not there
    """
    try:
        listed = [file["path"] for file in json.loads(corpus.read_text(encoding="utf-8"))["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{corpus} is no corpus.json: {error}.") from None
    paths = [corpus.parent / "files" / path for path in (listed if wanted is None else wanted)]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{path} is missing.\n  fetch the corpus again: snakemake --forcerun fetch_corpus"
            )
    return paths
