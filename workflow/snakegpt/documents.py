"""Documents of a raw file: plain text, JSON lines or parquet, also gzip- or zstandard-compressed.

A file's kind follows from its name, in capitals or not. Text is kept as it is (line ends, byte order
mark, NUL, any Unicode normal form); only what cannot be text is dealt with, and counted: bytes that are
no UTF-8, by `encoding_errors`, and lone surrogates, which JSON can spell and UTF-8 cannot, by tiktoken's
own rule. Memory is bounded whatever the size of a file or a document.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import orjson

from snakegpt.errors import UserError
from snakegpt.formats import JSON_LINES, PARQUET, kind_of
from snakegpt.settings import Closed

CHUNK_BYTES = 1 << 20  # read at a time
LARGE = 1 << 22  # characters of a document that waits on disk
PIECE = 1 << 20  # characters that are encoded at a time
MOST_UNCUT = 1 << 25  # characters without a place to cut
MOST_LINE_BYTES = 1 << 27  # of a JSON line, which cannot be read in pieces
BATCH_BYTES = 1 << 24  # of parquet rows in memory


class TextSettings(Closed):
    """Which documents a file holds; settings.Corpus says what each field means."""

    text_column: str = "text"
    document_separator: str | None = None
    encoding_errors: Literal["refuse", "replace"] = "refuse"
    minimum_characters: int = 0
    filter: str | None = None


@dataclass
class Counts:
    """What was left out or altered on the way.

    dropped         documents, by reason
    replaced_bytes  places where invalid UTF-8 or a lone surrogate became U+FFFD
    """

    dropped: Counter[str] = field(default_factory=lambda: Counter({"empty": 0}))
    replaced_bytes: int = 0


# ---- one document ------------------------------------------------------------------------------

# The 25 characters of Unicode's White_Space; Python's `\s` knows four more, which tiktoken's does not.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

# White space after a letter or digit begins a new pretoken in the patterns of gpt2, cl100k and o200k
# alike, so cutting before it changes no id (tests compare with uncut text).
_CUT = re.compile(rf"(?<=[^\W_])[{_SPACE}]")


class Document:
    """A text: in memory, or on disk where it is large.

    digest   blake2b-128 of its UTF-8
    n_bytes  of its UTF-8
    """

    __slots__ = ("_file", "_text", "digest", "n_bytes", "n_characters")

    def __init__(self, text: str) -> None:
        self._text: str | None = text
        self._file: IO[str] | None = None
        content = text.encode("utf-8")
        self.digest = hashlib.blake2b(content, digest_size=16).digest()
        self.n_characters, self.n_bytes = len(text), len(content)

    @classmethod
    def spooled(cls, file: IO[str], n_characters: int, n_bytes: int, digest: bytes) -> Document:
        """A text in a temporary UTF-8 file, which is closed when the next document is asked for."""
        self = cls.__new__(cls)
        self._text, self._file, self.digest = None, file, digest
        self.n_characters, self.n_bytes = n_characters, n_bytes
        return self

    def chunks(self) -> Iterator[str]:
        """The text in pieces cut anywhere."""
        if self._text is not None:
            yield self._text
        elif self._file is not None:
            self._file.seek(0)
            while chunk := self._file.read(PIECE):
                yield chunk

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """The characters from `start` to `stop`, cut where that changes no id.

        raises   UserError if there is no such place in 32 million characters
        """
        stop = self.n_characters if stop is None else stop
        if self._text is not None and stop - start <= PIECE:
            yield self._text[start:stop]
            return
        waiting, position = "", 0
        for chunk in self.chunks():
            begin, end = max(start - position, 0), stop - position
            position += len(chunk)
            waiting += chunk[begin : max(end, 0)]
            if len(waiting) > PIECE:
                cut = _last_cut(waiting)
                if cut:
                    yield waiting[:cut]
                    waiting = waiting[cut:]
                elif len(waiting) > MOST_UNCUT:
                    raise UserError(
                        f"a document has {len(waiting):,} characters without white space after a letter"
                        " or digit,\n  so that it cannot be encoded in pieces: it is no text"
                    )
        if waiting:
            yield waiting


def _last_cut(text: str) -> int:
    """The last place where a text may be cut; 0 if there is none."""
    window = 1 << 12
    while True:
        start = max(0, len(text) - window)
        found = 0
        for match in _CUT.finditer(text, start):
            found = match.start()
        if found or start == 0:
            return found
        window *= 16


class _Builder:
    """Puts a document together from the pieces that are read."""

    def __init__(self, scratch: Path | None) -> None:
        self._scratch = scratch
        self._begin()

    def _begin(self) -> None:
        self._parts: list[str] = []
        self._n_waiting = 0
        self._file: IO[str] | None = None
        self._n_characters = self._n_bytes = 0
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, text: str) -> None:
        self._parts.append(text)
        self._n_waiting += len(text)
        if self._n_waiting > LARGE:
            self._spill()

    def finish(self) -> Document:
        if self._file is None:
            document = Document("".join(self._parts))
        else:
            self._spill()
            self._file.flush()
            document = Document.spooled(
                self._file, self._n_characters, self._n_bytes, self._digest.digest()
            )
        self._begin()
        return document

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(  # noqa: SIM115
                "w+", encoding="utf-8", newline="", dir=self._scratch
            )
        text = "".join(self._parts)
        content = text.encode("utf-8")
        self._digest.update(content)
        self._n_characters += len(text)
        self._n_bytes += len(content)
        self._file.write(text)
        self._parts, self._n_waiting = [], 0


# ---- files -------------------------------------------------------------------------------------


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
    keep = _Filter(settings, counts)
    kind = kind_of(path.name)
    if kind == PARQUET:
        documents = _parquet(path, settings, counts, keep)
    elif kind == JSON_LINES:
        documents = _json_lines(path, settings, counts, keep, span)
    else:
        documents = _text(path, settings, counts, keep, span, scratch)
    return documents


class _Filter:
    """Decides which documents are kept, and counts the others."""

    def __init__(self, settings: TextSettings, counts: Counts) -> None:
        self._settings, self._counts = settings, counts
        self.columns: set[str] = set()
        if settings.filter is not None:
            self._prepare(settings.filter)

    def _prepare(self, expression: str) -> None:
        import ast

        from simpleeval import EvalWithCompoundTypes, InvalidExpression

        self._evaluator = EvalWithCompoundTypes(functions=dict(FILTER_FUNCTIONS))
        try:
            self._parsed = self._evaluator.parse(expression)
        except (InvalidExpression, SyntaxError) as error:
            raise UserError(f"filter: '{expression}' is no expression: {error}.") from None
        names = {node.id for node in ast.walk(self._parsed) if isinstance(node, ast.Name)}
        self.columns = (
            names - set(FILTER_FUNCTIONS) - {"text", "characters", "true", "false", "null"}
        )

    def keeps(self, document: Document, row: Mapping[str, Any], where: str) -> bool:
        if not document.n_characters:
            self._counts.dropped["empty"] += 1
        elif document.n_characters < self._settings.minimum_characters:
            self._counts.dropped["short"] += 1
        elif self._settings.filter is not None and not self._evaluate(document, row, where):
            self._counts.dropped["filter"] += 1
        else:
            return True
        return False

    def _evaluate(self, document: Document, row: Mapping[str, Any], where: str) -> bool:
        missing = self.columns - row.keys()
        if missing:
            raise UserError(
                f"{where} has no column '{min(missing)}', which the corpus's filter names."
                f" Its columns: {', '.join(row) or 'none'}.\n"
                "  every filter may use `text` and `characters` besides"
            )
        text = next(document.chunks(), "")  # of a large document its first million characters
        self._evaluator.names = {
            **row,
            "text": text,
            "characters": document.n_characters,
            "true": True,
            "false": False,
            "null": None,
        }
        try:
            return bool(self._evaluator.eval(self._settings.filter, previously_parsed=self._parsed))
        except Exception as error:  # whatever an expression can do wrong with this row's values
            raise UserError(f"{where}: the corpus's filter fails: {error}.") from None


FILTER_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "len": len,
    "min": min,
    "max": max,
    "abs": abs,
    "round": round,
    "int": int,
    "float": float,
    "str": str,
}


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.GzipFile(path, "rb"))
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstandard(path))
    return path.open("rb", buffering=CHUNK_BYTES)


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


# ---- plain text --------------------------------------------------------------------------------


def _text(
    path: Path,
    settings: TextSettings,
    counts: Counts,
    keep: _Filter,
    span: tuple[int, int] | None,
    scratch: Path | None,
) -> Iterator[Document]:
    builder = _Builder(scratch)
    texts = _decoded(path, settings, counts, span)
    separator = settings.document_separator
    for text, ends in texts if separator is None else _split(texts, separator):
        builder.add(text)
        if ends:
            document = builder.finish()
            if keep.keeps(document, {}, str(path)):
                yield document


def _split(texts: Iterator[tuple[str, bool]], separator: str) -> Iterator[tuple[str, bool]]:
    """(text, whether a document ends with it), cut at each separator."""
    waiting = ""
    for text, last in texts:
        waiting += text
        *whole, waiting = waiting.split(separator)
        for document in whole:
            yield document, True
        if last:
            yield waiting, True
            return
        # The end may be the beginning of a separator.
        ready = len(waiting) - len(separator) + 1
        if ready > 0:
            yield waiting[:ready], False
            waiting = waiting[ready:]


def _decoded(
    path: Path, settings: TextSettings, counts: Counts, span: tuple[int, int] | None
) -> Iterator[tuple[str, bool]]:
    """(text, whether it is the last) of a file, or of the documents that begin in a span of it."""
    decoder = _Decoder(path, settings, counts)
    try:
        with _open(path) as file:
            if span is None:
                chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
            else:
                assert settings.document_separator  # see formats.can_be_divided
                decoder.offset, stop = _span(file, span, settings.document_separator.encode())
                if decoder.offset >= span[1]:
                    return  # no document begins here
                chunks = _between(file, decoder.offset, stop)
            for chunk in chunks:
                yield decoder.decode(chunk), False
    except _damaged() as error:
        raise UserError(f"{path} is damaged: {error}.") from None
    yield decoder.decode(b"", last=True), True


def _span(file: IO[bytes], span: tuple[int, int], separator: bytes) -> tuple[int, int]:
    """Where the documents that begin in a span begin and end, in bytes."""
    start, stop = span
    begin = 0 if start == 0 else _after(file, start - len(separator), separator)
    return begin, _after(file, stop - len(separator), separator, keep=len(separator))


def _after(file: IO[bytes], start: int, separator: bytes, keep: int = 0) -> int:
    """The place after the first separator from `start` on, less `keep`; the file's end if there is none."""
    position, waiting = max(start, 0), b""
    file.seek(position)
    while chunk := file.read(CHUNK_BYTES):
        waiting += chunk
        found = waiting.find(separator)
        if found >= 0:
            return position + found + len(separator) - keep
        cut = max(0, len(waiting) - len(separator) + 1)
        position += cut
        waiting = waiting[cut:]
    return file.seek(0, io.SEEK_END)


def _between(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while start < stop and (chunk := file.read(min(CHUNK_BYTES, stop - start))):
        start += len(chunk)
        yield chunk


class _Decoder:
    """UTF-8 piece by piece, with the policy for what is none."""

    def __init__(self, path: Path, settings: TextSettings, counts: Counts) -> None:
        self._path, self._counts = path, counts
        self._refuses = settings.encoding_errors == "refuse"
        self._decoder = codecs.getincrementaldecoder("utf-8")(
            "strict" if self._refuses else "replace"
        )
        self.offset = 0  # of the next byte in the file
        self._tail = b""  # of what was decoded

    def decode(self, content: bytes, *, last: bool = False) -> str:
        unread = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(content, last)
        except UnicodeDecodeError as error:
            place = self.offset - unread + error.start
            raise _not_utf8(
                str(self._path), place, error.object[error.start], error.reason
            ) from None
        self.offset += len(content)
        if not self._refuses:
            # Those that the file spells itself, perhaps across two pieces, are no replacements.
            joined = self._tail + content
            self._tail = joined[-2:]
            n_spelt = joined.count(b"\xef\xbf\xbd")
            self._counts.replaced_bytes += text.count("\ufffd") - n_spelt
        return text


def _not_utf8(where: str, offset: int, byte: int, reason: str) -> UserError:
    return UserError(
        f"{where} is not valid UTF-8 at byte {offset:,} (0x{byte:02x}: {reason}).\n"
        "  repair the file, or set encoding_errors: replace to have U+FFFD in its place"
    )


# ---- rows --------------------------------------------------------------------------------------


def _json_lines(
    path: Path,
    settings: TextSettings,
    counts: Counts,
    keep: _Filter,
    span: tuple[int, int] | None,
) -> Iterator[Document]:
    start, stop = span or (0, None)
    offset, number = start, 0
    try:
        with _open(path) as file:
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
    except _damaged() as error:
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


def _parquet(
    path: Path, settings: TextSettings, counts: Counts, keep: _Filter
) -> Iterator[Document]:
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
            raise _not_utf8(where, place, content[error.start], error.reason) from None
        text = content.decode("utf-8", errors="replace")
        counts.replaced_bytes += text.count("\ufffd") - content.count(b"\xef\xbf\xbd")
        return text
