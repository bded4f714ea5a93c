"""Archives of Debian packages, by apt-get, from the mirrors that this machine is configured for.

A mirror keeps only the newest version of a release, so a locked one may be gone one day. The digest
that apt checks is that of the signed package lists; dpkg-deb reads the archive (see `archives`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from snakegpt.errors import UserError
from snakegpt.locks import Archive
from snakegpt.settings import RegistrySource
from snakegpt.sources.clients import call, last_lines
from snakegpt.sources.transfers import Meter


def download(source: RegistrySource, pin: Archive | None, folder: Path, meter: Meter) -> Path:
    """The .deb; apt keeps to the rate of `meter` by itself."""
    for program in ("apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise UserError(
                f"cannot download {source.package}: this machine has no {program}.\n"
                "  fetch the corpus on a Debian or Ubuntu machine, and bring it here with"
                " `python -m snakegpt.store export`; or take the text from another source"
            )
    command = [
        "apt-get",
        "--quiet=2",
        "-o",
        "Acquire::Retries=1",
        "-o",
        "Acquire::http::Timeout=10",
    ]
    command += ["-o", "Acquire::https::Timeout=10", "-o", "APT::Sandbox::User=root"]
    if meter.throttle.rate:
        kilobytes = max(1, meter.throttle.rate // 1000)
        for scheme in ("http", "https"):
            command += ["-o", f"Acquire::{scheme}::Dl-Limit={kilobytes}"]
    status, output = call([*command, "download", source.package.replace("==", "=")], folder)
    found = sorted(folder.glob("*.deb")) if status == 0 else []
    if len(found) != 1:
        raise UserError(_explain(source, output))
    return found[0]


def _explain(source: RegistrySource, output: str) -> str:
    package, version = source.package.split("==")
    head = f"cannot download {source.package} with apt-get: "
    if "Unable to locate package" in output:
        return head + (
            "it knows no such package.\n  refresh its lists (apt-get update), or change the name"
        )
    if "was not found" in output or "404" in output:
        known = _versions(package)
        return head + (
            f"version {version} is gone from the mirror, which keeps only the newest.\n"
            f"  there now: {known or 'none'}; refresh the lists (apt-get update), then set"
            " `package:` to what there is and lock it again, or name a mirror that keeps all versions"
        )
    if "Could not" in output or "Unable to connect" in output or "Failed to fetch" in output:
        return head + (
            "the mirror cannot be reached.\n  check the network and proxy, then run the same command"
            " again\n" + last_lines(output, 3)
        )
    return head + "it failed.\n" + last_lines(output)


def _versions(package: str) -> str:
    """The versions of a package that apt knows."""
    if not shutil.which("apt-cache"):
        return ""
    _, output = call(["apt-cache", "madison", package])
    found = [line.split("|")[1].strip() for line in output.splitlines() if line.count("|") == 2]
    return ", ".join(dict.fromkeys(found))
