"""Corpora on the Hugging Face hub, through huggingface_hub: its endpoint, cache, token and offline mode.

The hub's client checks only the size of what it downloads over plain HTTP, so every file is hashed here
against the lock. The token is the client's business (HF_TOKEN, `hf auth login`) and is never printed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from snakegpt.errors import UserError
from snakegpt.locks import Entry, File
from snakegpt.settings import HuggingFaceSource
from snakegpt.sources.archives import matches
from snakegpt.sources.transfers import Meter, check_disk, fingerprint, in_parallel, verify

PROBE_TIMEOUT_S = 5


def lock(
    name: str,
    source: HuggingFaceSource,
    folder: Path,
    workers: int,
    meter: Meter,
    commit: str | None = None,
) -> Entry:
    """Resolve the revision to a commit and take the files' digests from the hub's own records.

    Files that are not in large-file storage have no sha256 there: those are downloaded and hashed.

    commit   to take where the source names no revision; None: the newest
    """
    hub = _client(name)
    revision = source.revision or commit
    info = _asking(
        name,
        lambda: hub.HfApi().dataset_info(source.repo, revision=revision, files_metadata=True),
    )
    found = [s for s in info.siblings or [] if matches(s.rfilename, source.files)]
    if not found:
        some = ", ".join(sorted(s.rfilename for s in info.siblings or [])[:5])
        raise UserError(
            f"corpus {name}: no file of {source.repo} matches {' or '.join(source.files)}.\n"
            f"  it has, for example: {some}"
        )

    small = [sibling.size or 0 for sibling in found if not sibling.lfs]
    check_disk(
        folder, sum(small), f"corpus {name}: hashing the files that the hub has no sha256 of"
    )

    def one(sibling: Any) -> File:
        if sibling.lfs:
            return File(sibling.rfilename, sibling.lfs["sha256"], int(sibling.size))
        path = _download(hub, name, source, info.sha, sibling.rfilename, folder)
        return File(sibling.rfilename, *fingerprint(path))

    files = sorted(in_parallel(one, found, workers), key=lambda file: file.path)
    return Entry(source.model_dump(mode="json"), tuple(files), revision=info.sha)


def fetch(
    name: str, source: HuggingFaceSource, entry: Entry, folder: Path, workers: int, meter: Meter
) -> None:
    """Write the locked files below `folder`, from the locked commit."""
    if entry.revision is None:
        raise UserError(f"corpus {name}: its lock entry names no commit; lock it again.")
    hub = _client(name)
    revision = entry.revision
    scratch = folder / ".hub"

    def one(file: File) -> None:
        path = _download(hub, name, source, revision, file.path, scratch)
        verify(fingerprint(path), file, name, f"{source.repo} at {revision[:12]}")
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
        meter.add(file.bytes)

    in_parallel(one, entry.files, workers)
    shutil.rmtree(scratch, ignore_errors=True)


def _client(name: str) -> Any:
    """huggingface_hub, after making sure within seconds that there is a hub to ask.

    The client itself retries for 23 s before it says so.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub
    import requests
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"corpus {name} is on the Hugging Face hub, which cannot be reached: HF_HUB_OFFLINE is set."
        )
    try:
        requests.head(endpoint, timeout=PROBE_TIMEOUT_S, allow_redirects=False)
    except requests.RequestException as error:
        raise UserError(_unreachable(name, endpoint, type(error).__name__)) from None
    return huggingface_hub


def _unreachable(name: str, endpoint: str, reason: str) -> str:
    return (
        f"corpus {name} is on the Hugging Face hub, which cannot be reached: {endpoint} ({reason}).\n"
        "  check network and proxy (HTTPS_PROXY), or name a mirror in HF_ENDPOINT; then run the same"
        " command again"
    )


def _download(
    hub: Any, name: str, source: HuggingFaceSource, revision: str, path: str, folder: Path
) -> Path:
    return Path(
        _asking(
            name,
            lambda: hub.hf_hub_download(
                source.repo, path, repo_type="dataset", revision=revision, local_dir=folder
            ),
        )
    )


def _asking(name: str, ask: Any) -> Any:
    """The hub's answer; its refusals as errors for people, without the client's traceback."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return ask()
    except GatedRepoError as error:
        reason = "access is gated: accept its terms on the hub and set HF_TOKEN"
        raise UserError(f"corpus {name}: {reason} ({_first_line(error)})") from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        reason = "the hub has no such repository or revision, or hides it without HF_TOKEN"
        raise UserError(f"corpus {name}: {reason} ({_first_line(error)})") from None
    except LocalEntryNotFoundError as error:
        reason = "the hub cannot be reached or drops the connection; run the same command again"
        raise UserError(f"corpus {name}: {reason} ({_first_line(error)})") from None
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(f"corpus {name}: the hub answers: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
