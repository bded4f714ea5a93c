"""Reading members of tar, zip and Debian archives without ever unpacking one.

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
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

from snakegpt.errors import UserError
from snakegpt.locks import is_inside

Taken = TypeVar("Taken")

CHUNK_BYTES = 1 << 20
DEB_MAGIC = b"!<arch>\n"
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
             and for a wanted member that is a link; each names member and archive. Links in a
             Debian package are left out instead: manual pages and documents have many, to files
             that are there anyway
    """
    try:
        if _is_deb(archive):
            members = _deb_members(archive, wanted)
        elif zipfile.is_zipfile(archive):
            members = _zip_members(archive, wanted)
        elif tarfile.is_tarfile(archive):
            members = _tar_members(archive, wanted)
        else:
            raise UserError(f"{archive.name} is no tar, zip or Debian archive, or it is damaged.")
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


def _is_deb(archive: Path) -> bool:
    with archive.open("rb") as file:
        return file.read(len(DEB_MAGIC)) == DEB_MAGIC


def _deb_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, IO[bytes]]]:
    """Members as dpkg-deb streams them; their names begin at the root (`usr/share/...`)."""
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints) as process,
    ):
        assert process.stdout is not None  # it is a pipe
        damage = None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for info in tar:
                    name = info.name.removeprefix("./")
                    if name not in ("", "."):
                        _check(archive, name, False, wanted)
                    if info.isreg() and wanted(name):
                        stream = tar.extractfile(info)
                        assert stream is not None  # it is a regular file
                        with stream:
                            yield name, stream
        except tarfile.TarError as error:
            damage = error
        except BaseException:  # no-one reads on
            process.kill()
            raise
        while process.stdout.read(CHUNK_BYTES):  # what tar has no reason to read
            pass
        if process.wait():
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().removeprefix("dpkg-deb: ")
            raise UserError(f"archive {archive.name} is damaged: {said or 'dpkg-deb fails'}.")
        if damage:
            raise damage


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
