"""Archives of Python packages, by pip.

Two facts about `pip download`: for a wheel it executes nothing, while for an sdist it runs the
package's metadata step; with a known digest it checks the archive before that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from snakegpt.errors import UserError
from snakegpt.locks import Archive
from snakegpt.settings import RegistrySource
from snakegpt.sources.clients import call, last_lines
from snakegpt.sources.transfers import Meter


def download(source: RegistrySource, pin: Archive | None, folder: Path, meter: Meter) -> Path:
    """The archive; with a known digest pip takes no other. `meter` sees nothing of it."""
    requirements = folder / "requirements.txt"
    digest = f" --hash=sha256:{pin.sha256}" if pin else ""
    requirements.write_text(f"{source.package}{digest}\n", encoding="utf-8")
    target = folder / "archive"

    def attempt(*options: str) -> tuple[int, str]:
        # One retry: pip's default of five waits long before it says that there is no network.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
        command += ["--retries", "1", "--progress-bar", "off", "--disable-pip-version-check"]
        command += ["--dest", str(target), "--requirement", str(requirements), *options]
        return call(command)

    if source.packaging == "wheel":
        status, output = attempt("--only-binary", ":all:")
    else:
        status, output = _attempt_sdist(attempt)
    found = sorted(target.glob("*")) if status == 0 else []
    if len(found) != 1:
        raise UserError(_explain(source, output))
    return found[0]


def _attempt_sdist(attempt: Callable[..., tuple[int, str]]) -> tuple[int, str]:
    """The metadata step with this environment's pinned setuptools, else as the package itself asks.

    Build isolation would download a build system first, and a newer one at that as years go by.
    """
    status, output = attempt("--no-binary", ":all:", "--no-build-isolation")
    if status and "No matching distribution" not in output and "HASHES" not in output:
        return attempt("--no-binary", ":all:")
    return status, output


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
    return head + "it failed.\n" + last_lines(output)
