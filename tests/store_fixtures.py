"""What the tests of moving results between stores share: actions, checkouts, an S3 server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from snakegpt.identity import Action
from snakegpt.store import Store

CACHE = Path(__file__).parent / ".cache"
PINS = Path(__file__).parent / "s3_server.txt"
TINY = Path(__file__).parent / "tiny.yaml"

# What the tiny experiment's tokens need.
MANIFEST = "results/tokens/generated-generated_char/manifest.json"
STAGES = {"fetch_corpus", "build_tokenizer", "encode_tokens", "index_tokens"}


def made(store: Store, files: dict[str, bytes], **science: Any) -> dict[str, Any]:
    """A finished action that made these files; its key is its identity's, as the runner's is."""
    action = Action("train_model", science, {"revision": 1, "modules": {}}, {"tokens": ["e" * 64]})
    with store.workspace(action.key) as folder:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        outputs = store.publish(folder)
    diff = b"changed since the commit"
    record = {
        "key": action.key,
        "stage": action.stage,
        "name": "tiny",
        "science": action.science,
        "code": action.code,
        "inputs": {"tokens": [{"path": "results/tokens/a", "sha256": "e" * 64}]},
        "unhashed": {},
        "outputs": outputs,
        "execution": {},
        "provenance": {"user": "me", "diff": {"sha256": store.put(diff), "bytes": len(diff)}},
    }
    store.record(action.key, record)
    return record


def new_store(root: Path) -> Store:
    store = Store(root)
    store.make()
    return store


def contents(store: Store) -> dict[str, bytes]:
    """Every object by its name; each of them has to deserve it."""
    found = {p.name: p.read_bytes() for p in (store.root / "objects").rglob("*") if p.is_file()}
    assert all(hashlib.sha256(content).hexdigest() == name for name, content in found.items())
    return found


_LOCKS: list[bytes] = []


class Checkout:
    """A folder with settings, text and a store of its own, whose stages run as the rules run them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "texts").mkdir(parents=True)
        (folder / "texts/a.txt").write_text("the cat sat on the mat. " * 300, encoding="utf-8")
        (folder / "config.yaml").write_text(TINY.read_text(encoding="utf-8"), encoding="utf-8")
        lock = folder / "corpora.lock.json"
        if not _LOCKS:
            self.call("snakegpt.stages.lock_corpora", "--configfile", "config.yaml")
            _LOCKS.append(lock.read_bytes())
        lock.write_bytes(_LOCKS[0])  # the same text, so the same pins

    def call(self, *words: str, status: int = 0) -> str:
        """Run a module; returns what it printed."""
        environment = {k: v for k, v in os.environ.items() if k != "SNAKEGPT_STORE"}
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def make(self, path: str, *flags: str) -> str:
        """Bring a result and all it needs, each stage through the runner."""
        script = (
            "import sys, json, subprocess\n"
            "from snakegpt.locks import read\n"
            "from snakegpt.pipeline import Pipeline\n"
            "from snakegpt.settings import load_files\n"
            "pipeline = Pipeline(load_files(['config.yaml']), read('corpora.lock.json'))\n"
            "made = set()\n"
            "def make(request):\n"
            "    if request.folder + request.name in made: return\n"
            "    made.add(request.folder + request.name)\n"
            "    for paths in (*request.inputs.values(), *request.unhashed.values()):\n"
            "        for path in paths:\n"
            "            source = pipeline.find(path)\n"
            "            if source: make(source)\n"
            "    words = [request.stage, request.name, '--output', request.folder, *sys.argv[2:]]\n"
            "    words += ['--settings', json.dumps(request.settings)]\n"
            "    words += ['--execution', json.dumps(request.execution)]\n"
            "    for role, paths in request.inputs.items(): words += ['--input', role, *paths]\n"
            "    for role, paths in request.unhashed.items(): words += ['--unhashed', role, *paths]\n"
            "    subprocess.run([sys.executable, '-m', 'snakegpt.run', *words], check=True)\n"
            "make(pipeline.find(sys.argv[1]))\n"
        )
        file = self.folder / "make_results.py"
        file.write_text(script, encoding="utf-8")
        environment = {k: v for k, v in os.environ.items() if k != "SNAKEGPT_STORE"}
        done = subprocess.run(
            [sys.executable, str(file), path, *flags],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr


# ---- S3 ----------------------------------------------------------------------------------------


@dataclass
class S3:
    """A server that checks signatures and policies; the bucket is `shared`.

    writer, reader  (access key, secret) of one who may do all and of one who may only read
    """

    endpoint: str
    writer: tuple[str, str]
    reader: tuple[str, str]

    def be(self, monkeypatch: pytest.MonkeyPatch, who: tuple[str, str]) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", self.endpoint)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", who[0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", who[1])


@contextlib.contextmanager
def s3_server() -> Iterator[S3]:
    """moto's server as a process of its own, on a free port."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(packages(PINS)),
        "AWS_ACCESS_KEY_ID": "owner",
        "AWS_SECRET_ACCESS_KEY": "owner",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        endpoint = ""
        while not endpoint:
            line = server.stdout.readline()
            assert line, "the S3 server ended"
            endpoint = "".join(re.findall(r"http://127\.0\.0\.1:\d+", line))
        users = subprocess.run(
            [sys.executable, "-c", _USERS, endpoint],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        # Its log goes nowhere: a pipe that nobody reads would stop it.
        with subprocess.Popen(["cat"], stdin=server.stdout, stdout=subprocess.DEVNULL):
            try:
                yield S3(endpoint, **{name: tuple(k) for name, k in json.loads(users).items()})
            finally:
                server.terminate()
                server.wait()
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


_USERS = """
import json, sys
import boto3, requests
iam = boto3.client("iam", endpoint_url=sys.argv[1])
boto3.client("s3", endpoint_url=sys.argv[1]).create_bucket(Bucket="shared")
keys = {}
for user, actions in {"writer": ["s3:*"], "reader": ["s3:GetObject", "s3:ListBucket"]}.items():
    iam.create_user(UserName=user)
    statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_user_policy(UserName=user, PolicyName="all", PolicyDocument=policy)
    key = iam.create_access_key(UserName=user)["AccessKey"]
    keys[user] = key["AccessKeyId"], key["SecretAccessKey"]
# From here on every request has to be signed by a user whose policy allows it.
requests.post(sys.argv[1] + "/moto-api/reset-auth", data=b"0").raise_for_status()
print(json.dumps(keys))
"""


def packages(pins: Path) -> Path:
    """The packages that a file of pins names, installed once into a folder of their own."""
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()[:12]
    folder = CACHE / f"{pins.stem}-{digest}"
    if not folder.is_dir():
        aside = folder.with_name(f"{folder.name}-{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--target", str(aside), "-r", str(pins)]
        if subprocess.run(command, check=False).returncode:
            pytest.skip(f"what {pins.name} names cannot be downloaded")
        with contextlib.suppress(OSError):  # another test process was faster
            aside.rename(folder)
    return folder
