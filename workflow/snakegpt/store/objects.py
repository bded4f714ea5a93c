"""The store on disk: immutable objects, action records, state of unfinished actions.

    objects/ab/ab12...           bytes, mode 0444, named by sha256; or a folder's listing, see `Entry`
    actions/cd/cd34....json      what an action published and where it ran; written last
    state/<key>/                 what an interrupted action resumes from
    tmp/<key>-<pid>/             what a running action writes; same filesystem, so publishing is a rename
    locks/                       who runs what, see `leases`
    roots/                       links to the results/ folders that use this store
    pins/                        names that keep actions for good, see `pins`
    verified/                    when `verify` last read each object and found it good
    damaged/                     objects that `verify` found to be other bytes than their names say

A crash at any point leaves a missing record (the action runs again) or a complete one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from snakegpt.artefacts import Note, digest_of_new
from snakegpt.durable import sync, write_atomically
from snakegpt.errors import UserError
from snakegpt.identity import canonical_json, file_digest
from snakegpt.store import leases

# Artefact name -> {"sha256", "bytes"} of its object; a folder's object is its listing, and
# {"folder": {"files", "bytes"}} says how much it lists.
Outputs = dict[str, dict[str, Any]]

Check = Literal["size", "digest"]
LinkMode = Literal["auto", "symlink", "hardlink", "reflink", "copy"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of a folder's listing, or of an action's outputs: path, permissions, object."""

    path: str
    mode: int
    sha256: str
    bytes: int


class Store:
    """One content-addressed store; several experiments, checkouts, machines and people may share it.

    check  what a hit checks of each object: its size, or also its digest
    link   how results/ shows objects, see `links`
    """

    def __init__(self, root: str | Path, *, check: Check = "size", link: LinkMode = "auto") -> None:
        self.root = Path(root)
        self.check, self.link_mode = check, link

    @classmethod
    def locate(
        cls, default: str | Path, *, check: Check = "size", link: LinkMode = "auto"
    ) -> Store:
        """The store that SNAKEGPT_STORE names, else the one at `default`."""
        return cls(os.environ.get("SNAKEGPT_STORE") or default, check=check, link=link)

    def object_path(self, sha256: str) -> Path:
        return self.root / "objects" / sha256[:2] / sha256

    def action_path(self, key: str) -> Path:
        return self.root / "actions" / key[:2] / f"{key}.json"

    def state_path(self, key: str) -> Path:
        return self.root / "state" / key

    # ---- looking up ----

    def holds(self, sha256: str, n_bytes: int) -> bool:
        """Whether an object is there at its full size; a truncated one counts as missing."""
        path = self.object_path(sha256)
        try:
            if path.stat().st_size != n_bytes:
                return False
        except FileNotFoundError:
            return False
        return self.check == "size" or file_digest(path) == sha256

    def look_up(self, key: str) -> dict[str, Any] | None:
        """An action's record if it is readable and every object it names is whole, else None (a miss)."""
        record = self.record_of(key)
        if record is None:
            return None
        try:
            wanted = list(self.objects_of(record["outputs"]))
        except FileNotFoundError:
            return None
        return record if all(self.holds(*pair) for pair in wanted) else None

    def use(self, key: str) -> dict[str, Any] | None:
        """`look_up` for who is about to show the result: it is young again, so that `gc` spares it."""
        record = self.look_up(key)
        try:
            if record:
                os.utime(self.action_path(key))
        except FileNotFoundError:
            return None  # `gc` took it in this moment
        except OSError:
            pass  # a colleague's record, or a store that can only be read
        return record

    def record_of(self, key: str) -> dict[str, Any] | None:
        """An action's record if there is a readable one, whatever became of its objects."""
        record = read_record(self.action_path(key))
        return record if record is not None and record.get("key") == key else None

    def entries(self, outputs: Mapping[str, Mapping[str, Any]]) -> Iterator[Entry]:
        """Every file of an action's outputs, folders opened up.

        raises   FileNotFoundError if a folder's listing is gone or damaged
        """
        for name, output in outputs.items():
            if "folder" in output:
                for entry in self.listing(output["sha256"]):
                    yield dataclasses.replace(entry, path=f"{name}/{entry.path}")
            else:
                yield Entry(name, output.get("mode", 0o444), output["sha256"], output["bytes"])

    def objects_of(self, outputs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
        """(sha256, bytes) of every object that outputs name, the listings of folders included."""
        for output in outputs.values():
            if "folder" in output:
                yield output["sha256"], output["bytes"]
        for entry in self.entries(outputs):
            yield entry.sha256, entry.bytes

    def listing(self, sha256: str) -> list[Entry]:
        """What a folder's object lists.

        raises   FileNotFoundError if it is gone or damaged
        """
        content = self.object_path(sha256).read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise FileNotFoundError(f"the listing {sha256} is damaged")
        return [Entry(**entry) for entry in json.loads(content)["entries"]]

    # ---- publishing ----

    def publish(self, folder: Path, notes: Mapping[Path, Note] | None = None) -> Outputs:
        """Move what is in a folder of this filesystem into the store: its files, and each folder as one.

        notes    digests that were computed while the files were written; others are read once more
        returns  name -> digest and size, sorted
        """
        outputs: Outputs = {}
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                outputs[path.name] = self._publish_folder(path, notes or {})
            else:
                entry = self._publish_file(path, path.name, notes or {})
                outputs[path.name] = {"sha256": entry.sha256, "bytes": entry.bytes}
        self._sync_folders(outputs)
        return outputs

    def _publish_folder(self, folder: Path, notes: Mapping[Path, Note]) -> dict[str, Any]:
        files = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
        entries = [
            self._publish_file(path, path.relative_to(folder).as_posix(), notes) for path in files
        ]
        listing = canonical_json({"entries": [dataclasses.asdict(entry) for entry in entries]})
        sha256 = self.put(listing, folder / ".listing")
        total = sum(entry.bytes for entry in entries)
        return {
            "sha256": sha256,
            "bytes": len(listing),
            "folder": {"files": len(entries), "bytes": total},
        }

    def _publish_file(self, path: Path, name: str, notes: Mapping[Path, Note]) -> Entry:
        if path.is_symlink() or not path.is_file():
            raise AssertionError(f"stages write plain files: {path}")
        found = path.stat()
        sha256 = digest_of_new(path, notes)
        # Of permissions a listing keeps whether a file may be run; the rest is the umask's.
        entry = Entry(name, 0o444 | (found.st_mode & 0o111), sha256, found.st_size)
        self._move_in(path, entry)
        return entry

    def _move_in(self, path: Path, entry: Entry) -> None:
        target = self.object_path(entry.sha256)
        if self.holds(entry.sha256, entry.bytes):
            try:
                with contextlib.suppress(PermissionError):  # a colleague's object
                    os.utime(target)  # young again: `gc` spares what a running action found there
            except FileNotFoundError:
                pass  # `gc` took it in this moment
            else:
                path.unlink()
                return
        sync(path)
        path.chmod(0o444)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)

    def _sync_folders(self, outputs: Outputs) -> None:
        """Bring the new names to the disk, each folder once."""
        for parent in {self.object_path(s).parent for s, _ in self.objects_of(outputs)}:
            sync(parent)

    def put(self, content: bytes, aside: Path | None = None) -> str:
        """Store bytes that are no file yet; returns their sha256.

        aside  where to write them first; a place that the next run of the action cleans up
        """
        entry = Entry("", 0o444, hashlib.sha256(content).hexdigest(), len(content))
        aside = aside or self.root / "tmp" / f"object-{uuid.uuid4().hex}"
        aside.write_bytes(content)
        self._move_in(aside, entry)
        return entry.sha256

    def take_in(self, path: Path, sha256: str, n_bytes: int) -> None:
        """Move a file of this filesystem into the store that was hashed while it was written."""
        self._move_in(path, Entry("", 0o444, sha256, n_bytes))
        sync(self.object_path(sha256).parent)

    def record(self, key: str, record: Mapping[str, Any]) -> None:
        """Write an action's record; from here on its outputs are found by look-up."""
        path = self.action_path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))

    # ---- running ----

    def claim(
        self, key: str, waiting: Callable[[], object]
    ) -> contextlib.AbstractContextManager[leases.Lease]:
        """Hold the right to run an action; calls `waiting` once if another process holds it."""
        return leases.hold(self.root / "locks", key, waiting)

    @contextlib.contextmanager
    def workspace(self, key: str) -> Iterator[Path]:
        """An empty folder for the outputs of a running action; gone afterwards, whatever happened."""
        parent = self.root / "tmp"
        parent.mkdir(parents=True, exist_ok=True)
        for left_by_a_crash in parent.glob(f"{key}-*"):  # the caller holds the claim
            if left_by_a_crash.is_dir():
                shutil.rmtree(left_by_a_crash, ignore_errors=True)
            else:
                left_by_a_crash.unlink(missing_ok=True)
        folder = parent / f"{key}-{os.getpid()}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def make(self) -> None:
        """Create the store's folders if need be.

        raises   UserError if something else stands there; OSError as usual
        """
        try:
            for folder in ("objects", "actions", "state", "tmp", "locks", "roots"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"the store {self.root} cannot be made: {error.filename}: {error.strerror}.\n"
                "  set store.path in config.yaml or SNAKEGPT_STORE to a folder"
            ) from None


def read_record(path: str | Path) -> dict[str, Any] | None:
    """An action record, or None if it is missing or no valid record (half-written, edited)."""
    try:
        with open(path, "rb") as file:
            record = json.loads(file.read())
    except (OSError, ValueError):  # also of bytes that are no text, and of text that is no JSON
        return None
    return record if isinstance(record, dict) and isinstance(record.get("outputs"), dict) else None
