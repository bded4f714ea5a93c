"""Files that are hashed while they are written, so that publishing them reads no byte a second time.

A stage writes its big outputs through `create`, or says with `note` what it hashed on the way (a
download). The runner finds the notes in the file that NOTES names; a stage run by hand has none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from snakegpt.identity import file_digest

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

NOTES = "SNAKEGPT_DIGESTS"  # environment variable: the file that notes are appended to

WRITE_BEHIND_BYTES = 1 << 26  # sent to the disk in the background, so that the last fsync is short


class Note(NamedTuple):
    """The digest of a file, and the stat fields that say whether it still is that file."""

    sha256: str
    bytes: int
    mtime_ns: int
    inode: int

    def fits(self, path: Path) -> bool:
        """Whether the file was left alone since."""
        found = path.stat()
        return (found.st_size, found.st_mtime_ns, found.st_ino) == self[1:]


class WriteBehind:
    """A binary file that is written at its end, and sent to the disk meanwhile.

    resumed  keep what the file holds already, and write behind it
    """

    def __init__(self, path: Path, *, resumed: bool = False) -> None:
        self._file = path.open("ab" if resumed else "wb", buffering=0)
        self._behind: threading.Thread | None = None
        self.n_bytes = self._sent = self._file.tell()

    def write(self, data: ReadableBuffer) -> None:
        """Append bytes, all of them or an OSError."""
        view = memoryview(data).cast("B")
        self.n_bytes += view.nbytes
        while view:
            view = view[self._file.write(view) :]
        idle = self._behind is None or not self._behind.is_alive()
        if idle and self.n_bytes - self._sent >= WRITE_BEHIND_BYTES:
            self._sent = self.n_bytes
            self._behind = threading.Thread(target=self._write_behind, daemon=True)
            self._behind.start()

    def _write_behind(self) -> None:
        # An error is said again by the fsync of whoever publishes the file, where it can be handled.
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Wait for what is on its way."""
        if self._behind:
            self._behind.join()
        self._file.close()


class HashedFile:
    """A new binary file whose sha256 is known when it is closed.

    with HashedFile(path) as file:
        file.write(b"...")
    file.sha256, file.n_bytes

    resumed  keep what the file holds already, which is read once, and write behind it
    """

    def __init__(self, path: Path, *, resumed: bool = False) -> None:
        self.path, self._digest = path, hashlib.sha256()
        if resumed:
            with path.open("rb") as kept:
                self._digest = hashlib.file_digest(kept, "sha256")
        self._file = WriteBehind(path, resumed=resumed)

    def write(self, data: ReadableBuffer) -> None:
        """Append bytes, all of them or an OSError."""
        self._digest.update(data)
        self._file.write(data)

    @property
    def n_bytes(self) -> int:
        return self._file.n_bytes

    @property
    def sha256(self) -> str:
        """Digest (hex) of what was written so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            note(self.path, self.sha256)


def note(path: Path, sha256: str) -> None:
    """Tell the runner, if there is one, the digest of a finished file."""
    notes = os.environ.get(NOTES)
    if notes:
        found = path.stat()
        entry = [str(path.absolute()), sha256, found.st_size, found.st_mtime_ns, found.st_ino]
        with open(notes, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_notes(notes: Path) -> dict[Path, Note]:
    """Every noted file by its absolute path; empty if there are no notes."""
    if not notes.exists():
        return {}
    entries = map(json.loads, notes.read_text(encoding="utf-8").splitlines())
    return {Path(path): Note(*rest) for path, *rest in entries}


def digest_of_new(path: Path, notes: Mapping[Path, Note]) -> str:
    """sha256 of a file that a stage left, from its note where there is one that fits."""
    noted = notes.get(path.absolute())
    if noted and noted.fits(path):
        return noted.sha256
    return file_digest(path)
