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

from snakegpt.store.links import RESULTS, maker
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


def chain(store: Store, paths: Iterable[Path], results: Path = RESULTS) -> list[dict[str, Any]]:
    """The records of the actions that made some results, and their inputs, upward; sources first."""
    return chain_of(store, (maker(path, results) for path in paths), results)


def chain_of(
    store: Store, records: Iterable[dict[str, Any] | None], results: Path = RESULTS
) -> list[dict[str, Any]]:
    """Some records and those of the actions that made their inputs, upward, each once; sources first."""
    found: dict[str, dict[str, Any]] = {}

    def visit(record: dict[str, Any] | None) -> None:
        if record is None or record["key"] in found:
            return
        for entry in sources_of(record):
            if entry.get("action") not in found:  # a thousand parts share their corpus
                visit(made(store, entry, results))
        found[record["key"]] = record

    for record in records:
        visit(record)
    return list(found.values())


def made(store: Store, entry: Mapping[str, Any], results: Path = RESULTS) -> dict[str, Any] | None:
    """The record of the action that made an input, if it is still known."""
    key = entry.get("action")
    record = store.record_of(key) if key else None
    if record:
        return record
    path = Path(entry["path"])
    record = maker(results.parent / path, results)
    # What made the file of that name since may be another action.
    same = record and entry.get("sha256") in (
        None,
        *(o["sha256"] for o in record["outputs"].values()),
    )
    return record if same else None


# Stages whose page tells of what lies behind their inputs (their rule says --provenance).
TOLD = frozenset({"build_report"})


def told(
    store: Store, stage: str, science: dict[str, Any], inputs: Iterable[Path]
) -> dict[str, Any]:
    """Science settings of a stage, with the adoptions behind its inputs if it tells of them.

    An adoption changes no byte of what a report reads, and must be in the report all the same.
    """
    if stage not in TOLD:
        return science
    adopted = [
        {"key": record["key"], **record["adopted"]}
        for record in chain(store, inputs)
        if "adopted" in record
    ]
    return {**science, "adopted": adopted} if adopted else science


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
