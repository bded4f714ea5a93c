"""Documents of a raw file: plain text, JSON lines or parquet, also gzip- or zstandard-compressed.

A file's kind follows from its name, in capitals or not. Text is kept as it is (line ends, byte order mark, NUL, any Unicode
normal form); only what cannot be text is dealt with, and counted: bytes that are no UTF-8, by
`encoding_errors`, and lone surrogates, which JSON can spell and UTF-8 cannot, by tiktoken's own rule.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from snakegpt.errors import UserError
from snakegpt.settings import Closed

PARQUET, JSON_LINES = (".parquet",), (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
CHUNK_BYTES = 1 << 16  # of a compressed file


class TextSettings(Closed):
    """Which documents a file holds; settings.Corpus says what each field means."""

    text_column: str = "text"
    document_separator: str | None = None
    encoding_errors: Literal["refuse", "replace"] = "refuse"


@dataclass
class Counts:
    """What was left out or altered on the way.

    dropped         documents, by reason
    replaced_bytes  places where invalid UTF-8 or a lone surrogate became U+FFFD
    """

    dropped: Counter[str] = field(default_factory=lambda: Counter({"empty": 0}))
    replaced_bytes: int = 0


def read_documents(path: Path, settings: TextSettings, counts: Counts) -> Iterator[str]:
    """The documents of a file, in order; empty ones are dropped and counted.

    raises   UserError that names file and place: damaged compression, invalid UTF-8 under `refuse`,
             a line that is no JSON, a column that is not there
    """
    suffix = path.suffix.lower()
    kind = suffix if suffix not in COMPRESSED else Path(path.stem).suffix.lower()
    if kind in PARQUET:
        documents = _parquet(path, settings, counts)
    elif kind in JSON_LINES:
        documents = _json_lines(path, settings, counts)
    else:
        documents = _text(path, settings, counts)
    for document in documents:
        if document:
            yield document
        else:
            counts.dropped["empty"] += 1


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.GzipFile(path, "rb"))
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstandard(path))
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """The content of all frames of a file.

    zstandard's own stream reader ends without a word where a truncated file does.
    """

    def __init__(self, path: Path) -> None:
        import zstandard

        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._file = path.open("rb")
        self._unread = self._ready = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._unread or self._file.read(CHUNK_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a zstandard frame")
                return 0
            self._frame = self._frame or self._new_frame()
            self._ready, self._unread = self._frame.decompress(chunk), b""
            if self._frame.eof:
                self._unread, self._frame = self._frame.unused_data, None
        n_bytes = min(len(buffer), len(self._ready))
        buffer[:n_bytes] = self._ready[:n_bytes]
        self._ready = self._ready[n_bytes:]
        return n_bytes


def _damaged() -> tuple[type[BaseException], ...]:
    import zstandard

    return (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError)


def _text(path: Path, settings: TextSettings, counts: Counts) -> Iterator[str]:
    try:
        with _open(path) as file:
            content = file.read()
    except _damaged() as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    text = _decode(content, str(path), settings, counts)
    if settings.document_separator is None:
        yield text
    else:
        yield from text.split(settings.document_separator)


def _json_lines(path: Path, settings: TextSettings, counts: Counts) -> Iterator[str]:
    offset = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    text = _decode(line, str(path), settings, counts, offset)
                    yield _field(text, f"{path}, line {number}", settings, counts)
                offset += len(line)
    except _damaged() as error:
        raise UserError(f"{path} is damaged: {error}.") from None


def _field(line: str, where: str, settings: TextSettings, counts: Counts) -> str:
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
    return _as_text(row[settings.text_column], where, settings, counts)


def _parquet(path: Path, settings: TextSettings, counts: Counts) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = settings.text_column
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise UserError(
                    f"{path} has no column '{column}'. Its columns: {', '.join(file.schema_arrow.names)}.\n"
                    "  set text_column of the corpus to one of them"
                )
            row = 0
            for batch in file.iter_batches(batch_size=1000, columns=[column]):
                values = batch.column(0)
                # As bytes: nobody checked that what a parquet file calls a string is UTF-8.
                if pa.types.is_string(values.type):
                    values = values.cast(pa.binary())
                elif pa.types.is_large_string(values.type):
                    values = values.cast(pa.large_binary())
                for value in values.to_pylist():
                    row += 1
                    yield _as_text(value, f"{path}, row {row}", settings, counts)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or no parquet: {error}.") from None


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
            raise UserError(
                f"{where} is not valid UTF-8 at byte {offset + error.start:,}"
                f" (0x{content[error.start]:02x}: {error.reason}).\n"
                "  repair the file, or set encoding_errors: replace to have U+FFFD in its place"
            ) from None
        text = content.decode("utf-8", errors="replace")
        counts.replaced_bytes += text.count("\ufffd") - content.count(b"\xef\xbf\xbd")
        return text
