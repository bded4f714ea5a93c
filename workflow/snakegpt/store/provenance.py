"""Who made what, from what, where and with which versions: gathered after a run, read by reports and `show`."""

from __future__ import annotations

import datetime
import getpass
import importlib.metadata
import platform
import socket
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from snakegpt.store.links import maker
from snakegpt.store.objects import Store

# Libraries whose version can change a stage's bytes: recorded with every action, for people.
LIBRARIES = ("torch", "numpy", "tiktoken", "transformers", "safetensors", "pyarrow", "snakemake")


def gather(store: Store, key: str, wall_s: float) -> dict[str, Any]:
    """What an action's record says of the run that is ending."""
    return {
        **who_and_when(),
        "wall_s": round(wall_s, 3),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions()},
        **_git(store, key),
    }


def who_and_when() -> dict[str, str]:
    """User and time (UTC, ISO 8601)."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        user = "unknown"
    finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"finished": finished, "user": user}


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(store: Store, key: str) -> dict[str, Any]:
    """Commit of the code, and the object that holds what was changed since, if anything was."""

    def git(*arguments: str) -> bytes | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True
            )
        except FileNotFoundError:
            return None
        return done.stdout if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return {"git_commit": None, "dirty": False}
    diff = git("diff", "HEAD", "--binary", "--no-color", "--no-ext-diff") or b""
    found: dict[str, Any] = {"git_commit": commit.decode().strip(), "dirty": bool(diff)}
    if diff:
        found["diff"] = {
            "sha256": store.put(diff, store.root / "tmp" / f"{key}-diff"),
            "bytes": len(diff),
        }
    return found


def objects_named(store: Store, record: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(sha256, bytes) of every object that a record needs to stay complete.

    raises   FileNotFoundError if a folder's listing is gone or damaged
    """
    objects = list(store.objects_of(record["outputs"]))
    diff = record.get("provenance", {}).get("diff")
    if diff:
        objects.append((diff["sha256"], diff["bytes"]))
    return objects


def chain(store: Store, paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The records of the actions that made some results, and their inputs, upward; sources first."""
    found: dict[str, dict[str, Any]] = {}

    def visit(record: dict[str, Any] | None) -> None:
        if record is None or record["key"] in found:
            return
        for entry in sources_of(record):
            key = entry.get("action")
            visit((key and store.record_of(key)) or maker(Path(entry["path"])))
        found[record["key"]] = record

    for path in paths:
        visit(maker(path))
    return list(found.values())


def sources_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every input entry of a record: path, the action that made it, and sha256 if it is part of the key."""
    groups = [*record.get("inputs", {}).values(), *record.get("unhashed", {}).values()]
    return [entry for entries in groups for entry in entries]


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as reports show it: what, from which digests, to which digests, where and when."""
    hashed = [entry for entries in record["inputs"].values() for entry in entries]
    return {
        "stage": record["stage"],
        "name": record["name"],
        "key": record["key"],
        "inputs": {entry["path"]: entry["sha256"] for entry in hashed},
        "outputs": {name: output["sha256"] for name, output in record["outputs"].items()},
        **({"adopted": record["adopted"]} if "adopted" in record else {}),
        **record["provenance"],
    }
