"""Files on the Hugging Face hub: huggingface_hub asks it what there is, under its endpoint, token,
cache and offline mode; the bytes come by `downloads`.

The hub's own client starts a file over when its process is killed, and checks only the size of what
comes over plain HTTP. So files are downloaded here, resumed across processes, and each one is hashed
against the lock. The token is the client's business (HF_TOKEN, `hf auth login`): it goes to the hub
alone, and is never printed or written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import requests
import requests.auth

from snakegpt.errors import UserError
from snakegpt.locks import Entry, File
from snakegpt.settings import HuggingFaceSource
from snakegpt.sources.archives import matches
from snakegpt.sources.downloads import Origin, Trouble, asked_wait_s, bring, hashed, persistently
from snakegpt.sources.transfers import Drifts, Meter, copy, fingerprint, hand_over, in_parallel

Answer = TypeVar("Answer")

PROBE_TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 60  # the client itself waits for ever
GATED = "access is gated: accept its terms on the hub and set HF_TOKEN"
HIDDEN = "the hub has no such repository or revision, or hides it without HF_TOKEN"


def lock(
    what: str,
    source: HuggingFaceSource,
    workers: int,
    meter: Meter,
    commit: str | None = None,
) -> Entry:
    """Resolve the revision to a commit and take the files' digests from the hub's own records.

    Files that are not in large-file storage have no sha256 there: those are read and hashed.

    commit   to take where the source names no revision; None: the newest
    """
    hub = _reached(what)
    revision = source.revision or commit
    api = hub.HfApi()
    info = _asking(
        what,
        lambda: api.repo_info(
            source.repo,
            repo_type=source.repo_type,
            revision=revision,
            timeout=ANSWER_TIMEOUT_S,
        ),
    )

    def listing() -> list[Any]:
        # Not the siblings of `info`: of a big repository those are not all.
        tree = api.list_repo_tree(
            source.repo, repo_type=source.repo_type, revision=info.sha, recursive=True
        )
        return [item for item in tree if isinstance(item, hub.RepoFile)]

    there = _asking(what, listing)
    found = [file for file in there if matches(file.path, source.files)]
    if not found:
        some = ", ".join(sorted(file.path for file in there)[:5])
        raise UserError(
            f"{what}: no file of {source.repo} matches {' or '.join(source.files)}.\n"
            f"  it has, for example: {some}"
        )

    def one(file: Any) -> File:
        if file.lfs:
            return File(file.path, file.lfs.sha256, int(file.lfs.size))
        return File(file.path, *hashed(_origin(hub, source, info.sha, file.path), meter))

    files = sorted(in_parallel(one, found, workers), key=lambda file: file.path)
    return Entry(source.model_dump(mode="json"), tuple(files), revision=info.sha)


def fetch(
    what: str,
    source: HuggingFaceSource,
    entry: Entry,
    folder: Path,
    state: Path,
    workers: int,
    meter: Meter,
) -> None:
    """Write the locked files below `folder`, from the locked commit.

    The client's cache is looked at first, which is all there is to look at when it is offline.
    """
    if entry.revision is None:
        raise UserError(f"{what}: its lock entry names no commit; lock it again.")
    hub = _client()
    revision = entry.revision

    def cached(file: File) -> bool:
        path = hub.try_to_load_from_cache(
            source.repo, file.path, revision=revision, repo_type=source.repo_type
        )
        if not isinstance(path, str) or fingerprint(Path(path)) != (file.sha256, file.bytes):
            return False
        with open(path, "rb") as stream:
            copy(stream, folder / file.path, meter)
        return True

    here = in_parallel(cached, entry.files, workers)
    missing = [file for file, is_here in zip(entry.files, here, strict=True) if not is_here]
    if not missing:
        return
    _reached(what)

    def one(file: File) -> None:
        origin = _origin(hub, source, revision, file.path)
        hand_over(bring(file, origin, state, meter, what), folder / file.path)

    with Drifts(what) as drifts:
        in_parallel(drifts.noting(one), missing, workers)


def _client() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub
    import huggingface_hub.hf_api

    return huggingface_hub


def _reached(what: str) -> Any:
    """huggingface_hub, after making sure within seconds that there is a hub to ask.

    The client itself retries for 23 s before it says so.
    """
    hub = _client()
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{what}: on the Hugging Face hub, which cannot be reached: HF_HUB_OFFLINE is set"
            " and the hub's cache lacks it."
        )
    try:
        requests.head(endpoint, timeout=PROBE_TIMEOUT_S, allow_redirects=False)
    except requests.RequestException as error:
        raise UserError(
            f"{what}: on the Hugging Face hub, which cannot be reached:"
            f" {endpoint} ({type(error).__name__}).\n"
            "  check network and proxy (HTTPS_PROXY), or name a mirror in HF_ENDPOINT; then run the"
            " same command again"
        ) from None
    return hub


class _Bearer(requests.auth.AuthBase):
    """The token for the hub; requests leaves it out when it is sent on to another host."""

    def __init__(self, header: str | None) -> None:
        self._header = header

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._header:
            request.headers["Authorization"] = self._header
        return request


def _origin(hub: Any, source: HuggingFaceSource, revision: str, path: str) -> Origin:
    return Origin(
        hub.hf_hub_url(source.repo, path, repo_type=source.repo_type, revision=revision),
        _Bearer(hub.utils.build_hf_headers().get("authorization")),
        {401: HIDDEN, 403: GATED, 404: HIDDEN},
    )


def _asking(what: str, ask: Callable[[], Answer]) -> Answer:
    """The hub's answer, asked for as often as it takes; its refusals as errors for people."""
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = _client()

    def attempt() -> Answer:
        hub.get_session().timeout = ANSWER_TIMEOUT_S
        try:
            return ask()
        except GatedRepoError as error:
            raise Trouble(f"{GATED} ({_first_line(error)})", hopeless=True) from None
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise Trouble(f"{HIDDEN} ({_first_line(error)})", hopeless=True) from None
        except HfHubHTTPError as error:
            status, headers = error.response.status_code, error.response.headers
            raise Trouble(
                f"the hub answers: {_first_line(error)}", status, asked_wait_s(headers)
            ) from None
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise Trouble(f"the hub drops the connection ({reason})") from None
        except HFValidationError as error:
            raise Trouble(_first_line(error), hopeless=True) from None
        except ValueError as error:  # no JSON: something else than a hub stands there
            raise Trouble(f"the hub's answer is damaged ({error})") from None

    try:
        return persistently(attempt, "the hub")
    except Trouble as trouble:
        raise UserError(f"{what}: {trouble}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
