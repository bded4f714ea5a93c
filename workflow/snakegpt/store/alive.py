"""What keeps what in a store: from results, pins, running actions and youth to records and objects.

Kept whole, which means with their objects, are the actions that the pointers of a results/ folder lead
to, that a pin names, that run now, or that are young. Of the actions that made their inputs the records
are kept, so that provenance stays whole. What results/ shows is kept in any case.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from snakegpt.errors import UserError
from snakegpt.progress import quantity
from snakegpt.store import leases
from snakegpt.store.objects import Store
from snakegpt.store.pins import pins
from snakegpt.store.reach import (
    MALFORMED,
    Root,
    ancestors,
    as_digest,
    called,
    now_or_here,
    objects_named,
    registered,
    shelves,
    shown,
)

GRACE_S = 3600.0  # longer than any action takes from finding its first object to its record


@dataclass(slots=True)
class Amount:
    """Files and their bytes."""

    files: int = 0
    bytes: int = 0

    def add(self, n_bytes: int, n_files: int = 1) -> None:
        """Count files in."""
        self.files += n_files
        self.bytes += n_bytes

    def __str__(self) -> str:
        plural = "" if self.files == 1 else "s"
        return f"{quantity(self.bytes, 'B')} in {self.files:,} file{plural}" if self.files else "-"


@dataclass(slots=True)
class Group:
    """What the actions of one name and stage own. A shared object counts with the first that names it."""

    name: str
    stage: str
    stays: Amount = field(default_factory=Amount)
    goes: Amount = field(default_factory=Amount)


@dataclass(frozen=True)
class Times:
    """What is too young to go, in seconds since the epoch by the filesystem's clock.

    spared  everything touched since then
    unused  everything modified since then: what `--older-than` spares
    """

    spared: float
    unused: float

    def spare(self, found: os.stat_result) -> bool:
        """Whether a file is too young to go."""
        return touched(found) >= self.spared or found.st_mtime >= self.unused


def touched(found: os.stat_result) -> float:
    """When a file was last written or came to where it is.

    A file that is moved into the store keeps the modification time that its stage, or the archive it
    was unpacked from, gave it; the time of the last change of its inode is the filesystem's own.
    """
    return max(found.st_mtime, found.st_ctime)


def times(
    store: Store, now: float, live: dict[str, float], older_than_s: float | None = None
) -> Times:
    """What is young at this time, with these keys leased (and since when)."""
    since = [now - GRACE_S, *live.values()]
    for key in live:
        for path in (store.root / "locks" / key, store.root / "locks" / f"{key}.lease"):
            # By the filesystem's clock; the owner's may be another.
            with contextlib.suppress(FileNotFoundError):
                since.append(path.stat().st_mtime)
    spared = min(since)
    return Times(spared, spared if older_than_s is None else min(spared, now - older_than_s))


class Reach:
    """What is kept and what is not, once `mark` has filled it.

    whole    actions whose objects are kept -> whom they count with; `roots` says by what
    records  actions of which only the record is kept
    dead     actions that nothing keeps
    objects  digest of a kept object -> whom it counts with; `doomed`: of the others that have a record
    broken   kept actions whose record, or a listing that it names, is damaged or gone
    """

    def __init__(self, store: Store, watched: set[bytes] | None = None) -> None:
        self.store = store
        self.groups: dict[tuple[str, str], Group] = {}
        self.roots: dict[bytes, list[str]] = {}
        self.whole: dict[bytes, Group] = {}
        self.records: dict[bytes, Group] = {}
        self.dead: dict[bytes, Group] = {}
        self.objects: dict[bytes, Group] = {}
        self.doomed: dict[bytes, Group] = {}
        self.broken: set[bytes] = set()
        self._opened: set[bytes] = set()
        self._opened_doomed: set[bytes] = set()
        self._pending: list[str] = []
        # For `why_kept` alone: what shows or names a watched object, what was made from each action.
        self._watched = watched
        self.showing: dict[bytes, list[str]] = {}
        self.naming: dict[bytes, set[bytes]] = {}
        self.made_from: dict[bytes, set[bytes]] = {}

    def group(self, name: str, stage: str) -> Group:
        """The group of this name and stage."""
        return self.groups.setdefault((name, stage), Group(name, stage))

    def _group_of(self, record: dict[str, Any]) -> Group:
        return self.group(str(record.get("name", "?")), str(record.get("stage", "?")))

    def keep(self, key: str, reason: str) -> None:
        """Keep an action and its objects; `follow` then keeps the records of its ancestors."""
        digest = as_digest(key)
        if digest is None:
            return
        self.roots.setdefault(digest, []).append(reason)
        if digest in self.whole or digest in self.broken:
            return
        record = self.store.record_of(key)
        if record is None:
            self._must_be_readable(key)
            self.broken.add(digest)
            return
        self.whole[digest] = self._group_of(record)
        self.keep_objects(record, digest)
        self._climb(record, digest)

    def _must_be_readable(self, key: str) -> None:
        """What is damaged needs nothing more; what another person may read, or another minute, does."""
        try:
            self.store.action_path(key).read_bytes()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _unreadable(error) from None

    def keep_objects(self, record: dict[str, Any], key: bytes) -> None:
        """Keep what a record names."""
        group = self._group_of(record)
        opened = self._opened if self._watched is None else set()
        lost: set[bytes] = set()
        try:
            for digest, _ in objects_named(self.store, record, opened, lost):
                self.objects.setdefault(digest, group)
                if self._watched and digest in self._watched:
                    self.naming.setdefault(digest, set()).add(key)
        except MALFORMED:
            self.broken.add(key)
        except OSError as error:
            raise _unreadable(error) from None
        if lost:
            self.broken.add(key)

    def follow(self) -> None:
        """Keep the records of all ancestors of what is kept."""
        while self._pending:
            key = self._pending.pop()
            digest = as_digest(key)
            if digest is None or digest in self.whole or digest in self.records:
                continue
            record = self.store.record_of(key)
            if record:
                self.records[digest] = self._doom_objects(record)
                self._climb(record, digest)

    def doom(self, key: bytes) -> None:
        """Note an action that nothing keeps, and its objects."""
        record = self.store.record_of(key.hex())
        self.dead[key] = (
            self._doom_objects(record) if record else self.group("", "unreadable records")
        )

    def _doom_objects(self, record: dict[str, Any]) -> Group:
        group = self._group_of(record)
        with contextlib.suppress(OSError, *MALFORMED):
            for digest, _ in objects_named(self.store, record, self._opened_doomed, set()):
                if digest not in self.objects:
                    self.doomed.setdefault(digest, group)
        return group

    def _climb(self, record: dict[str, Any], digest: bytes) -> None:
        for key in ancestors(record):
            self._pending.append(key)
            if self._watched is not None and (above := as_digest(key)):
                self.made_from.setdefault(above, set()).add(digest)


def mark(
    store: Store,
    live: Iterable[str],
    limits: Times,
    roots: Sequence[Root],
    watched: set[bytes] | None = None,
) -> Reach:
    """What is kept and what is not.

    live     keys of the actions that run
    watched  objects to say of what shows and names them
    raises   UserError if part of a results/ folder, or a pin, cannot be read
    """
    reach = Reach(store, watched)
    visible = _keep_results(reach, roots, watched or set())
    for name, keys in pins(store).items():
        for key in keys:
            reach.keep(key, f"pin {name}")
    for key in live:
        if store.action_path(key).exists():
            reach.keep(key, "an action that runs")
    reach.follow()
    left = []
    for _, shelf in shelves(store.root / "actions"):
        for entry in shelf:
            key, ending = os.path.splitext(entry.name)
            digest = as_digest(key) if ending == ".json" else None
            if digest is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if digest not in reach.whole and limits.spare(found):
                    reach.keep(key, "its age")
                group = reach.whole.get(digest)
                if group:
                    group.stays.add(found.st_size)
                elif digest not in reach.broken:
                    left.append(digest)
    reach.follow()
    for digest in left:
        if digest not in reach.records:
            reach.doom(digest)
    alone = reach.group("in results/", "no record")
    for digest in visible:
        reach.objects.setdefault(digest, reach.doomed.get(digest, alone))
    return reach


def _keep_results(reach: Reach, roots: Sequence[Root], watched: set[bytes]) -> set[bytes]:
    """Keep the actions that results point to; returns the objects that results show."""
    visible = set()
    for root in roots:
        if root.problem:
            continue
        try:
            for link in shown(root.results):
                if link.key:
                    reach.keep(link.key, f"result {link.path}")
                elif link.sha256:
                    digest = bytes.fromhex(link.sha256)
                    visible.add(digest)
                    if digest in watched:
                        reach.showing.setdefault(digest, []).append(f"result {link.path}")
        except OSError as error:
            raise _unreadable(error) from None
    return visible


def _unreadable(error: OSError) -> UserError:
    return UserError(
        f"{error.filename} cannot be read: {error.strerror}.\n"
        "  gc must see everything that results need: run it as somebody who can read this"
    )


def running(store: Store) -> dict[str, float]:
    """Keys of the actions that run, or may on another machine, and since when by their own clocks."""
    locks = store.root / "locks"
    left = leases.abandoned(locks)
    return {key: since for key, since in leases.living(locks).items() if key not in left}


# ---- what keeps this alive ---------------------------------------------------------------------


def why_kept(
    store: Store, name: str, *, older_than_s: float | None = None
) -> dict[str, dict[str, list[str]]]:
    """What keeps the actions and objects alive that a name stands for, see `called`.

    returns  {"records": {key: reasons}, "objects": {sha256: reasons}}; no reason: it would go
    raises   UserError if the name stands for nothing
    """
    keys, digests = called(store, name)
    watched = {bytes.fromhex(sha256) for sha256 in digests}
    live = running(store)
    limits = times(store, now_or_here(store), live, older_than_s)
    reach = mark(store, live, limits, registered(store), watched)
    records = {key: _reasons(reach, bytes.fromhex(key)) for key in sorted(keys)}
    objects = {}
    for digest in sorted(watched):
        reasons = set(reach.showing.get(digest, ()))
        for key in reach.naming.get(digest, ()):
            reasons.update(reach.roots.get(key, ()))
        with contextlib.suppress(FileNotFoundError):
            if not reasons and limits.spare(store.object_path(digest.hex()).stat()):
                reasons.add("its age")
        objects[digest.hex()] = sorted(reasons)
    return {"records": records, "objects": objects}


def _reasons(reach: Reach, key: bytes) -> list[str]:
    """What keeps a record: its own roots, and those of everything that was made from it."""
    reasons = set(reach.roots.get(key, ()))
    seen, pending = {key}, [key]
    while pending:
        for later in reach.made_from.get(pending.pop(), set()) - seen:
            seen.add(later)
            pending.append(later)
            reasons.update(f"{reason}, made from it" for reason in reach.roots.get(later, ()))
    return sorted(reasons)
