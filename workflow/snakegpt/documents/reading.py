"""All documents of a file, whatever its kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from snakegpt.documents.choice import Counts, Filter, TextSettings
from snakegpt.documents.document import Document
from snakegpt.documents.plain_text import plain_text
from snakegpt.documents.rows import json_lines, parquet
from snakegpt.formats import JSON_LINES, PARQUET, kind_of


def read_documents(
    path: Path,
    settings: TextSettings,
    counts: Counts,
    *,
    span: tuple[int, int] | None = None,
    scratch: Path | None = None,
) -> Iterator[Document]:
    """The documents of a file, in order; what is dropped is counted by reason.

    span     byte range of the file: the documents that begin in it, see `formats.can_be_divided`
    scratch  folder for documents that are too large for memory; default: the system's
    raises   UserError that names file and place: damaged compression, invalid UTF-8 under `refuse`,
             a line that is no JSON or too long, a column that is not there
    """
    keep = Filter(settings, counts)
    kind = kind_of(path.name)
    if kind == PARQUET:
        documents = parquet(path, settings, counts, keep)
    elif kind == JSON_LINES:
        documents = json_lines(path, settings, counts, keep, span)
    else:
        documents = plain_text(path, settings, counts, keep, span, scratch)
    return documents
