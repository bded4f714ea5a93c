"""Reading members of tar and zip archives without ever unpacking one.

Members are read as streams and written by the caller to paths checked here, so that what makes
unpacking dangerous (absolute names, `..`, links, devices, modes, owners) has no way to the disk; for
tar this is stricter than the standard library's `data` filter, and it holds for zip too, which has
none.
"""

from __future__ import annotations

import fnmatch
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

from snakegpt.errors import UserError
from snakegpt.locks import is_inside

Taken = TypeVar("Taken")

CHUNK_BYTES = 1 << 20
DAMAGED = (
    EOFError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_members(
    archive: Path, wanted: Callable[[str], bool], take: Callable[[str, IO[bytes]], Taken]
) -> list[Taken]:
    """What `take` makes of the name and stream of each wanted regular file, in the archive's order.

    raises   UserError for a damaged archive, for any member whose name leaves the archive's folder,
             and for a wanted member that is a link; each names member and archive
    """
    try:
        if zipfile.is_zipfile(archive):
            members = _zip_members(archive, wanted)
        elif tarfile.is_tarfile(archive):
            members = _tar_members(archive, wanted)
        else:
            raise UserError(f"{archive.name} is neither a tar nor a zip archive, or it is damaged.")
        return [take(name, stream) for name, stream in members]
    except DAMAGED as error:
        raise UserError(f"archive {archive.name} is damaged: {error}.") from None


def _tar_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(archive) as tar:
        for info in tar:
            _check(archive, info.name, info.issym() or info.islnk(), wanted)
            if info.isreg() and wanted(info.name):
                stream = tar.extractfile(info)
                assert stream is not None  # it is a regular file
                with stream:
                    yield info.name, stream
        # The compressed stream's checksum comes last, after what tarfile has any reason to read.
        assert tar.fileobj is not None  # it is open
        while tar.fileobj.read(CHUNK_BYTES):
            pass


def _zip_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            # `filename` has been made harmless for Windows; `orig_filename` is what the archive says.
            name = info.orig_filename
            _check(archive, name, stat.S_ISLNK(info.external_attr >> 16), wanted)
            if not info.is_dir() and wanted(name):
                with zipped.open(info) as stream:
                    yield name, stream


def _check(archive: Path, name: str, is_link: bool, wanted: Callable[[str], bool]) -> None:
    if not is_inside(name):
        raise UserError(
            f"archive {archive.name} has a member {name!r}, which would be written outside its"
            " folder. Nothing is taken from such an archive."
        )
    if is_link and wanted(name):
        raise UserError(
            f"archive {archive.name}: member {name!r} is a link, and links are not followed."
            " Name the file it points to."
        )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of the glob patterns (fnmatch: `*` crosses `/` too)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
