"""As much of the Hugging Face hub as listing and downloading a repository takes, on loopback.

The real huggingface_hub talks to it through HF_ENDPOINT.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from data_fixtures import Faults

TOKEN = "hf_verysecret"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE_FILES = 3  # of a listing


@dataclass
class Hub:
    """One repository.

    kind     dataset or model, which have other addresses
    files    of the newest commit; `earlier` holds those of other commits
    lfs      which of them are in large-file storage, so that the hub knows their sha256
    served   name -> other bytes than the true ones, with the true ones' ETag
    faults   what goes wrong with files; api_faults: with everything else
    gated    only who has the token gets in: "files" hides those alone, "all" the listing too
    cdn      URL of another host that large files are sent on to
    asked    name of each file asked for, and the range of it
    headers  those of each request
    """

    repo: str = "some/texts"
    commit: str = COMMIT
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    served: dict[str, bytes] = field(default_factory=dict)
    earlier: dict[str, dict[str, bytes]] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    api_faults: Faults = field(default_factory=Faults)
    gated: str = ""
    cdn: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    url: str = ""
    kind: str = "dataset"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.headers.append(dict(handler.headers.items()))
        parts = urlsplit(handler.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        info = f"/api/{self.kind}s/{self.repo}"
        folder = "/datasets" if self.kind == "dataset" else ""
        if path == "/":
            self._json(handler, {})
            return
        for commit, files in {self.commit: self.files, **self.earlier}.items():
            resolve = f"{folder}/{self.repo}/resolve/{commit}/"
            if path.startswith(resolve) and path.removeprefix(resolve) in files:
                self._file(handler, commit, files, path.removeprefix(resolve))
                return
            newest = path == info and commit == self.commit
            if newest or path == f"{info}/revision/{commit}":
                if not self._refused(handler, "all") and not self.api_faults.refuse(handler):
                    self._json(
                        handler, {"id": self.repo, "sha": commit, "siblings": [], "tags": []}
                    )
                return
            if path == f"{info}/tree/{commit}":
                if not self._refused(handler, "all") and not self.api_faults.refuse(handler):
                    self._listing(handler, path, files, int(query.get("cursor", ["0"])[0]))
                return
        self._refuse(handler, 404, "RevisionNotFound")

    def _file(
        self, handler: BaseHTTPRequestHandler, commit: str, files: Mapping[str, bytes], name: str
    ) -> None:
        self.asked.append((name, handler.headers.get("Range", "")))
        if self._refused(handler, "all", "files") or self.faults.refuse(handler):
            return
        if self.cdn and name in self.lfs:
            handler.send_response(302)
            handler.send_header("Location", f"{self.cdn}/{name}?signature=alsosecret")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        headers = {
            "ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Content-Type": "application/octet-stream",
        }
        self.faults.send(handler, self.served.get(name, files[name]), headers)

    def _refused(self, handler: BaseHTTPRequestHandler, *kinds: str) -> bool:
        if self.gated not in kinds or handler.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        known = handler.headers.get("Authorization")
        self._refuse(handler, 403 if known else 401, "GatedRepo")
        return True

    def _refuse(self, handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
        handler.send_response(status)
        handler.send_header("X-Error-Code", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def _listing(
        self, handler: BaseHTTPRequestHandler, path: str, files: Mapping[str, bytes], first: int
    ) -> None:
        listed = []
        for name, content in list(files.items())[first : first + PAGE_FILES]:
            about: dict[str, Any] = {"type": "file", "path": name, "oid": "0" * 40}
            about["size"] = len(content)
            if name in self.lfs:
                sha256 = hashlib.sha256(content).hexdigest()
                about["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            listed.append(about)
        more = {}
        if first + PAGE_FILES < len(files):
            following = f"{self.url}{path}?recursive=True&cursor={first + PAGE_FILES}"
            more = {"Link": f'<{following}>; rel="next"'}
        self._json(handler, [{"type": "directory", "path": "data", "oid": "0" * 40}, *listed], more)

    def _json(
        self, handler: BaseHTTPRequestHandler, value: Any, headers: Mapping[str, str] | None = None
    ) -> None:
        self.api_faults.send(
            handler,
            json.dumps(value).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )


def hub_env(folder: Path, url: str, **more: str) -> dict[str, str]:
    """The environment of a user of the hub at a URL, with a token."""
    names = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf")}
    return {**os.environ, **names, "HF_TOKEN": TOKEN, **more}
