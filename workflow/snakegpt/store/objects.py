"""The store on disk: immutable objects, action records, state of unfinished actions.

    objects/ab/ab12...           bytes, mode 0444, named by sha256
    actions/cd/cd34....json      what an action published and where it ran; written last
    state/<key>/                 what an interrupted action resumes from
    tmp/<key>-<pid>/             what a running action writes; same filesystem, so publishing is a rename
    locks/<key>                  held by the process that runs the action

A crash at any point leaves a missing record (the action runs again) or a complete one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from snakegpt.durable import sync, write_atomically
from snakegpt.errors import UserError
from snakegpt.identity import file_digest

Outputs = dict[str, dict[str, Any]]  # relative path -> {"sha256": ..., "bytes": ...}


class Store:
    """One content-addressed store; several experiments, checkouts and people may share it."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @classmethod
    def locate(cls, default: str | Path) -> Store:
        """The store that SNAKEGPT_STORE names, else the one at `default`."""
        return cls(os.environ.get("SNAKEGPT_STORE") or default)

    def object_path(self, sha256: str) -> Path:
        return self.root / "objects" / sha256[:2] / sha256

    def action_path(self, key: str) -> Path:
        return self.root / "actions" / key[:2] / f"{key}.json"

    def state_path(self, key: str) -> Path:
        return self.root / "state" / key

    def holds(self, sha256: str, n_bytes: int) -> bool:
        """Whether an object is there at its full size; a truncated one counts as missing."""
        try:
            return self.object_path(sha256).stat().st_size == n_bytes
        except FileNotFoundError:
            return False

    def digest_of(self, path: Path) -> str:
        """sha256 of a file; read off the name when it is a link to an object of this store."""
        target = Path(os.path.realpath(path))
        if target == Path(os.path.realpath(self.object_path(target.name))):
            return target.name
        return file_digest(path)

    # ---- publishing ----

    def publish(self, folder: Path) -> Outputs:
        """Move every file below a folder of this filesystem into the store.

        returns  relative path -> digest and size, sorted
        """
        outputs: Outputs = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            outputs[path.relative_to(folder).as_posix()] = self._publish_file(path)
        return outputs

    def _publish_file(self, path: Path) -> dict[str, Any]:
        if path.is_symlink():
            raise AssertionError(f"stages write files, not links: {path}")
        sha256, n_bytes = file_digest(path), path.stat().st_size
        if self.holds(sha256, n_bytes):
            path.unlink()
        else:
            sync(path)
            path.chmod(0o444)
            target = self.object_path(sha256)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
            sync(target.parent)
        return {"sha256": sha256, "bytes": n_bytes}

    def record(self, key: str, record: Mapping[str, Any]) -> None:
        """Write an action's record; from here on its outputs are found by look-up."""
        path = self.action_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))

    def look_up(self, key: str) -> dict[str, Any] | None:
        """An action's record if it is readable and every object it names is whole, else None (a miss)."""
        record = read_record(self.action_path(key))
        if record is None or record.get("key") != key:
            return None
        whole = all(self.holds(o["sha256"], o["bytes"]) for o in record["outputs"].values())
        return record if whole else None

    # ---- running ----

    @contextlib.contextmanager
    def claim(self, key: str, waiting: Callable[[], None]) -> Iterator[int]:
        """Hold the right to run an action; calls `waiting` once if another process holds it.

        yields   the claim's file descriptor: a child that inherits it keeps the claim alive
        """
        path = self.root / "locks" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock.fileno()

    @contextlib.contextmanager
    def workspace(self, key: str) -> Iterator[Path]:
        """An empty folder for the outputs of a running action; gone afterwards, whatever happened."""
        parent = self.root / "tmp"
        parent.mkdir(parents=True, exist_ok=True)
        for left_by_a_crash in parent.glob(f"{key}-*"):  # the caller holds the claim
            shutil.rmtree(left_by_a_crash, ignore_errors=True)
        folder = parent / f"{key}-{os.getpid()}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def make(self) -> None:
        """Create the store's folders if need be.

        raises   UserError if that is not possible
        """
        try:
            for folder in ("objects", "actions", "state", "tmp", "locks"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the store {self.root} cannot be written: {error.strerror}.\n"
                "  set `store:` in config.yaml or SNAKEGPT_STORE to a folder you can write"
            ) from None


def read_record(path: Path) -> dict[str, Any] | None:
    """An action record, or None if it is missing or no valid record (half-written, edited)."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("outputs"), dict) else None
