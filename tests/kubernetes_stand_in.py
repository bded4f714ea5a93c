"""As much of a Kubernetes cluster as Snakemake's executor calls: its API, and pods that are processes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Cluster:
    """Jobs, each with one pod: a process in a folder of its own, which stands for its own disk.

    folder       of the pods, their logs, and the claims, which are folders too
    environment  what the image sets; a pod sees nothing else but its own variables
    jobs         name -> manifest, in the order of their creation; deleted ones stay, for tests to see
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.jobs: dict[str, dict[str, Any]] = {}
        self.deleted: set[str] = set()
        self.evicted: set[str] = set()
        self.secrets: dict[str, dict[str, str]] = {}
        self._pods: dict[str, subprocess.Popen[bytes]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))

    @contextlib.contextmanager
    def serving(self) -> Iterator[Cluster]:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            for name in self._pods:
                self._kill(name)

    def kubeconfig(self) -> str:
        server = f"http://127.0.0.1:{self._server.server_port}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": server}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        }
        return json.dumps(config)  # which is YAML

    def claim(self, name: str) -> Path:
        return self.folder / "claims" / name

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8")

    def evict(self, name: str) -> None:
        """As a node that is taken back: the pod is gone, and its job has failed."""
        self.evicted.add(name)
        self._kill(name)

    def _kill(self, name: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pods[name].pid, signal.SIGKILL)
        self._pods[name].wait()

    # ---- what the API does ----

    def create(self, job: dict[str, Any]) -> None:
        name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        words = [*container["command"], *container["args"]]
        claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if v.get("persistentVolumeClaim")}  # fmt: skip
        for mount in container["volumeMounts"]:
            if (
                mount["name"] in claims
            ):  # no mount without root: the command says where it is instead
                claim = self.claim(claims[mount["name"]])
                claim.mkdir(parents=True, exist_ok=True)
                words = [word.replace(mount["mountPath"], str(claim)) for word in words]
        variables = dict(self.environment)
        for variable in container["env"]:
            wanted = variable["valueFrom"]["secretKeyRef"]
            variables[variable["name"]] = self.secrets[wanted["name"]][wanted["key"]]
        own = self.folder / name
        own.mkdir()
        with (self.folder / f"{name}.log").open("wb") as log:
            self._pods[name] = subprocess.Popen(
                words, cwd=own, env=variables, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.jobs[name] = job

    def status(self, name: str) -> dict[str, Any]:
        code = self._pods[name].poll()
        key = "active" if code is None else "failed" if code else "succeeded"
        return {**self.jobs[name], "status": {key: 1}}

    def pods(self, name: str) -> list[dict[str, Any]]:
        if name not in self._pods or name in self.evicted:
            return []
        code = self._pods[name].poll()
        state = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
        needed = {"image": "", "imageID": "", "ready": code is None, "restartCount": 0}
        container = {"name": "snakemake", "state": state, **needed}
        return [{"metadata": {"name": name}, "status": {"containerStatuses": [container]}}]


def _handler_of(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/secrets"):
                values = {k: base64.b64decode(v).decode() for k, v in body["data"].items()}
                cluster.secrets[body["metadata"]["name"]] = values
            else:
                cluster.create(body)
            self._answer(body, 201)

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            if found := re.search(r"/jobs/([^/]+)/status$", url.path):
                self._answer(cluster.status(found[1]))
            elif url.path.endswith("/pods"):
                name = query["labelSelector"][0].removeprefix("job-name=")
                self._answer({"items": cluster.pods(name)})
            elif found := re.search(r"/pods/([^/]+)/log$", url.path):
                # As the kubelet: of a container that never started again there is no previous one.
                if query.get("previous") == ["True"]:
                    message = (
                        f'previous terminated container "snakemake" in pod "{found[1]}" not found'
                    )
                    self._answer({"kind": "Status", "message": message, "code": 400}, 400)
                else:
                    self._answer(cluster.log(found[1]))

        def do_DELETE(self) -> None:
            kind, name = urlsplit(self.path).path.split("/")[-2:]
            if kind == "jobs":
                cluster.deleted.add(name)
            if kind == "secrets":
                del cluster.secrets[name]
            self._answer({})

        def _answer(self, content: Any, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *words: Any) -> None:
            """Say nothing."""

    return Handler
