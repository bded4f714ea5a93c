"""Archives of npm packages: by npm, or without it from the registry that npm is configured to use.

`npm pack` gives the registry's .tgz as it is and runs none of its scripts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import requests

from snakegpt.errors import UserError
from snakegpt.locks import Archive
from snakegpt.settings import RegistrySource
from snakegpt.sources.clients import call, last_lines
from snakegpt.sources.downloads import Origin, hashed_to, public
from snakegpt.sources.transfers import Meter

ASK_TIMEOUT_S = (5, 60)


def download(source: RegistrySource, pin: Archive | None, folder: Path, meter: Meter) -> Path:
    """The .tgz; npm checks it against the registry's own digest."""
    name, version = source.package.rsplit("==", 1)
    target = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not shutil.which("npm"):
        hashed_to(Origin(_tarball(name, version)), target, meter)
        return target
    command = ["npm", "pack", f"{name}@{version}", "--pack-destination", str(folder)]
    command += ["--ignore-scripts", "--loglevel", "error", "--no-update-notifier"]
    command += ["--fetch-retries", "1", "--fetch-retry-mintimeout", "1000"]
    status, output = call(command)
    found = sorted(folder.glob("*.tgz")) if status == 0 else []
    if len(found) != 1:
        raise UserError(_explain(source, output))
    return found[0].rename(target)


def _explain(source: RegistrySource, output: str) -> str:
    head = f"cannot download {source.package} with npm: "
    if any(code in output for code in ("E404", "ETARGET", "ENOVERSIONS", "notarget")):
        return head + "the registry has no such package or version."
    lost = ("ECONNREFUSED", "ENOTFOUND", "EAI_AGAIN", "ETIMEDOUT", "ECONNRESET", "ENETUNREACH")
    if any(code in output for code in lost):
        return head + (
            "the package registry cannot be reached.\n  check the network, proxy and npm"
            " configuration (npm config list), then run the same command again"
        )
    return head + "it failed.\n" + last_lines(output)


def _tarball(name: str, version: str) -> str:
    """URL of a package's archive, as the configured registry tells it."""
    registry = _registry(name)
    if registry is None:
        raise UserError(
            f"cannot download {name}=={version}: there is no npm, and no registry is configured.\n"
            "  install npm, or set NPM_CONFIG_REGISTRY to the URL of a registry"
        )
    url = f"{registry.rstrip('/')}/{quote(name, safe='@')}/{version}"
    try:
        answer = requests.get(url, timeout=ASK_TIMEOUT_S)
        answer.raise_for_status()
        return str(answer.json()["dist"]["tarball"])
    except requests.HTTPError as error:
        if error.response.status_code == 404:
            raise UserError(
                f"cannot download {name}=={version}: the registry has no such package or version."
            ) from None
        status = f"{error.response.status_code} {error.response.reason}"
        raise UserError(f"cannot ask {public(url)}: the server answers {status}.") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{public(url)} is no npm registry: it tells no tarball.") from None
    except requests.RequestException as error:
        raise UserError(
            f"the package registry cannot be reached: {public(url)} ({type(error).__name__}).\n"
            "  check the network, proxy and NPM_CONFIG_REGISTRY, then run the same command again"
        ) from None


def _registry(name: str) -> str | None:
    """The registry for a package: that of its scope, else the environment's, else of an .npmrc."""
    settings = dict(_npmrc())
    scope = name.partition("/")[0]
    of_environment = {key.lower(): value for key, value in os.environ.items()}
    return (
        settings.get(f"{scope}:registry")
        or of_environment.get("npm_config_registry")
        or settings.get("registry")
    )


def _npmrc() -> Iterator[tuple[str, str]]:
    """Settings of the user's and this folder's .npmrc, later ones winning."""
    user = os.environ.get("NPM_CONFIG_USERCONFIG") or os.path.expanduser("~/.npmrc")
    for path in (Path(user), Path(".npmrc")):
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                key, equals, value = line.partition("=")
                if equals and not key.strip().startswith(("#", ";")):
                    yield key.strip(), os.path.expandvars(value.strip().strip("\"'"))
