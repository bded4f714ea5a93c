"""Documents of plain text: a file, or what lies between separators."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from snakegpt.documents.choice import Counts, Filter, TextSettings, not_utf8
from snakegpt.documents.document import Builder, Document
from snakegpt.documents.files import CHUNK_BYTES, damaged, open_file
from snakegpt.errors import UserError


def plain_text(
    path: Path,
    settings: TextSettings,
    counts: Counts,
    keep: Filter,
    span: tuple[int, int] | None,
    scratch: Path | None,
) -> Iterator[Document]:
    builder = Builder(scratch)
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
        with open_file(path) as file:
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
    except damaged() as error:
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
            raise not_utf8(
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
