"""Documents of rows: JSON lines and parquet, one text a row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from snakegpt.documents.choice import Counts, Filter, TextSettings, not_utf8
from snakegpt.documents.document import Document
from snakegpt.documents.files import CHUNK_BYTES, damaged, open_file
from snakegpt.errors import UserError

MOST_LINE_BYTES = 1 << 27  # of a JSON line, which cannot be read in pieces
BATCH_BYTES = 1 << 24  # of parquet rows in memory


def json_lines(
    path: Path,
    settings: TextSettings,
    counts: Counts,
    keep: Filter,
    span: tuple[int, int] | None,
) -> Iterator[Document]:
    start, stop = span or (0, None)
    offset, number = start, 0
    try:
        with open_file(path) as file:
            if start:  # the line that began before belongs to the range before
                file.seek(start - 1)
                offset = start - 1
                while not (skipped := file.readline(CHUNK_BYTES)).endswith(b"\n") and skipped:
                    offset += len(skipped)
                offset += len(skipped)
            while (stop is None or offset < stop) and (line := file.readline(MOST_LINE_BYTES + 1)):
                number += 1
                where = (
                    f"{path}, line {number}" if not start else f"{path}, line at byte {offset:,}"
                )
                if len(line) > MOST_LINE_BYTES:
                    raise UserError(
                        f"{where} is longer than {MOST_LINE_BYTES:,} bytes, the most for a JSON line.\n"
                        "  put such a text into a file of its own (.txt), which has no limit"
                    )
                if not line.isspace():
                    row = _quick_row(line, settings)
                    if row is None:
                        content = _decode(line, str(path), settings, counts, offset)
                        row = _row(content, where, settings)
                    text = _as_text(row.pop(settings.text_column), where, settings, counts)
                    document = Document(text)
                    if keep.keeps(document, row, where):
                        yield document
                offset += len(line)
    except damaged() as error:
        raise UserError(f"{path} is damaged: {error}.") from None


def _quick_row(line: bytes, settings: TextSettings) -> dict[str, Any] | None:
    """The row by orjson, in half the time, or None where it may be another than `_row`'s or an error.

    orjson takes no invalid UTF-8, lone surrogates or NaN, and makes floats of integers beyond 64 bits,
    which only a filter could see.
    """
    if settings.filter is not None:
        return None
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and settings.text_column in row else None


def _row(line: str, where: str, settings: TextSettings) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number or a nesting beyond all limits
        raise UserError(f"{where} is no JSON: {error}.") from None
    if not isinstance(row, dict) or settings.text_column not in row:
        keys = ", ".join(row) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
        raise UserError(
            f"{where} has no key '{settings.text_column}'. Its keys: {keys}.\n"
            "  set text_column of the corpus to one of them"
        )
    return row


def parquet(path: Path, settings: TextSettings, counts: Counts, keep: Filter) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = settings.text_column
    try:
        # Buffered and not ahead of time: a row group of gigabytes is read page by page.
        with pq.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(
                    f"{path} has no column '{column}'. Its columns: {', '.join(names)}.\n"
                    "  set text_column of the corpus to one of them"
                )
            columns = [column, *sorted(keep.columns & set(names) - {column})]
            row = 0
            for batch in file.iter_batches(batch_size=_batch_rows(file, column), columns=columns):
                values = batch.column(column)
                # As bytes: nobody checked that what a parquet file calls a string is UTF-8.
                if pa.types.is_string(values.type):
                    values = values.cast(pa.binary())
                elif pa.types.is_large_string(values.type):
                    values = values.cast(pa.large_binary())
                others = [batch.column(name).to_pylist() for name in columns[1:]]
                for index, value in enumerate(values.to_pylist()):
                    row += 1
                    where = f"{path}, row {row}"
                    document = Document(_as_text(value, where, settings, counts))
                    rest = {
                        name: other[index] for name, other in zip(columns[1:], others, strict=True)
                    }
                    if keep.keeps(document, rest, where):
                        yield document
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or no parquet: {error}.") from None


def _batch_rows(file: Any, column: str) -> int:
    """Rows of a batch, by the mean size of a text."""
    metadata = file.metadata
    n_bytes = n_rows = 0
    for group in range(metadata.num_row_groups):
        described = metadata.row_group(group)
        n_rows += described.num_rows
        for index in range(described.num_columns):
            if described.column(index).path_in_schema == column:
                n_bytes += described.column(index).total_uncompressed_size
    return max(1, min(1000, BATCH_BYTES * n_rows // max(n_bytes, 1)))


def _as_text(value: Any, where: str, settings: TextSettings, counts: Counts) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return _decode(value, where, settings, counts)
    if not isinstance(value, str):
        raise UserError(
            f"{where}: '{settings.text_column}' is a {type(value).__name__}, text is wanted."
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # tiktoken's own rule: pairs are joined, one U+FFFD for each that stays alone.
        joined = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        counts.replaced_bytes += joined.count("\ufffd") - value.count("\ufffd")
        return joined
    return value


def _decode(
    content: bytes, where: str, settings: TextSettings, counts: Counts, offset: int = 0
) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if settings.encoding_errors == "refuse":
            place = offset + error.start
            raise not_utf8(where, place, content[error.start], error.reason) from None
        text = content.decode("utf-8", errors="replace")
        counts.replaced_bytes += text.count("\ufffd") - content.count(b"\xef\xbf\xbd")
        return text
