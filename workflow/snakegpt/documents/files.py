"""The bytes of a raw file, decompressed where its name says so."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 1 << 20  # read at a time


def open_file(path: Path) -> IO[bytes]:
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


def damaged() -> tuple[type[BaseException], ...]:
    import zstandard

    return (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError)
