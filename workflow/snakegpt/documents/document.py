"""One text, in memory or on disk, and where it may be cut."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from snakegpt.errors import UserError

LARGE = 1 << 22  # characters of a document that waits on disk
PIECE = 1 << 20  # characters that are encoded at a time
MOST_UNCUT = 1 << 25  # characters without a place to cut

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


class Builder:
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
