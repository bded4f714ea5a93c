"""Check that the store holds what its records say: objects by sha256, records by their keys.

python -m snakegpt.store verify                    read everything
python -m snakegpt.store verify --older-than 7d    what was not read for a week; goes on after a kill
python -m snakegpt.store verify --metadata         existence and size alone, in seconds

Damaged objects are moved to damaged/, so that the next run rebuilds them. Everything that is found is
named with the actions and results that it touches. Exit status 1 if anything was found.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from snakegpt.durable import write_text_atomically
from snakegpt.errors import UserError
from snakegpt.identity import file_digest
from snakegpt.pipeline import usable_threads
from snakegpt.progress import Progress
from snakegpt.store.command import age_s, new_command, pipeline_of, print_json, store_of
from snakegpt.store.findings import Faults, Kind, Report, name_what_is_touched
from snakegpt.store.objects import Store, key_of, read_record
from snakegpt.store.reach import (
    MALFORMED,
    as_digest,
    now_or_here,
    objects_named,
    shelves,
    strays,
)


def add(commands: Any) -> None:
    """The command `verify`."""
    parser = new_command(commands, "verify", _run, "rehash what the store holds", __doc__)
    flag = parser.add_argument
    flag("--metadata", action="store_true", help="check existence and size, read no object")
    flag("--older-than", type=age_s, metavar="AGE", help="only what was last read longer ago: 7d")
    flag("--all", action="store_true", help="also objects that no record names")
    flag("--threads", type=int, metavar="N", help="objects read at a time; default: one a core")
    flag("--json", action="store_true", help="for programs")


def _run(args: argparse.Namespace) -> None:
    report = verify(
        store_of(pipeline_of(args)),
        metadata=args.metadata,
        older_than_s=args.older_than,
        unnamed=args.all,
        threads=args.threads,
    )
    print_json(report.as_json()) if args.json else print("\n".join(report.lines()))
    if report.findings:
        raise SystemExit(1)


AHEAD = 16  # objects waiting for each thread, so that a big one keeps no other thread idle


def verify(
    store: Store,
    *,
    metadata: bool = False,
    older_than_s: float | None = None,
    unnamed: bool = False,
    threads: int | None = None,
) -> Report:
    """Check the objects that records name, and the records; move damaged objects aside.

    metadata      check existence and size alone
    older_than_s  leave out objects that were read, and found good, within so many seconds
    unnamed       also objects that no record names
    threads       objects read at a time; default: one a core
    raises        UserError if there is no store
    """
    store.require()
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: at least 1 is wanted.")
    threads = threads or usable_threads()
    return _Verification(store, metadata, older_than_s, unnamed).run(threads)


class _Check(NamedTuple):
    """What reading an object gave."""

    digest: bytes
    bytes: int
    kind: Kind | None = None
    problem: str = ""


class _Verification:
    """One run of `verify`."""

    def __init__(
        self, store: Store, metadata: bool, older_than_s: float | None, unnamed: bool
    ) -> None:
        self.store, self.metadata, self.unnamed = store, metadata, unnamed
        self.older_than_s = older_than_s
        self.now = now_or_here(store)
        self.report = Report(metadata)
        # Objects by first byte: digest -> the size that records say.
        self.named: list[dict[bytes, int]] = [{} for _ in range(256)]
        self.lost: set[bytes] = set()  # listings that do not read
        self.disputed: set[bytes] = set()  # records disagree about the size
        self.faults = Faults()

    def run(self, threads: int) -> Report:
        self._read_records()
        total = sum(len(n) if self.metadata else sum(n.values()) for n in self.named)
        scale, unit = _scale(total, self.metadata)
        self.progress = Progress("verify", -(-total // scale), unit)
        self.done, self.scale = 0, scale
        if self.metadata:
            self._check_sizes()
        else:
            self._read_objects(threads)
        self.progress.update(self.progress.total)
        for path in strays(self.store.root / "objects"):
            self.report.found("foreign", path, "it is no folder of objects")
        for path in strays(self.store.root / "actions"):
            self.report.found("foreign", path, "it is no folder of action records")
        name_what_is_touched(self.store, self.report, self.faults)
        return self.report

    def _show_progress(self) -> None:
        if self.done // self.scale < self.progress.total:
            self.progress.update(self.done // self.scale)

    # ---- records ----

    def _read_records(self) -> None:
        opened: set[bytes] = set()
        for first, shelf in shelves(self.store.root / "actions"):
            for entry in shelf:
                if entry.name.startswith("."):
                    continue  # written aside, perhaps right now; gc removes it
                problem = self._problem_of_record(first, entry, opened)
                if problem and os.path.lexists(entry.path):
                    key = entry.name.removesuffix(".json")
                    self.report.found("foreign", key if as_digest(key) else entry.path, problem)
                self.report.records += not problem

    def _problem_of_record(
        self, first: int, entry: os.DirEntry[str], opened: set[bytes]
    ) -> str | None:
        key, ending = os.path.splitext(entry.name)
        digest = as_digest(key)
        if digest is None or digest[0] != first or ending != ".json":
            return "it is not named as an action record is"
        if not entry.is_file(follow_symlinks=False):
            return "it is no regular file"
        record = read_record(entry.path)
        if record is None:
            return "it is no action record: half-written, edited, or not readable"
        try:
            if not record.get("key") == key == key_of(record):
                return "its content does not give its key: edited, or copied from another"
            for object_digest, n_bytes in objects_named(self.store, record, opened, self.lost):
                known = self.named[object_digest[0]].setdefault(object_digest, n_bytes)
                if known != n_bytes:
                    self.disputed.add(object_digest)
        except MALFORMED:
            return "it is no action record: its fields are not what they should be"
        except OSError as error:
            return f"a listing that it names cannot be read: {error.strerror}"
        return None

    # ---- objects ----

    def _check_sizes(self) -> None:
        """Compare sizes; what does not fit, or fits by one record alone, is read after all."""
        unsure = self.lost | self.disputed
        for first, shelf in shelves(self.store.root / "objects"):
            named = self.named[first]
            for digest, entry in self._sort(first, shelf):
                with contextlib.suppress(FileNotFoundError):
                    size = entry.stat(follow_symlinks=False).st_size
                    if size == named.get(digest, size) and digest not in unsure:
                        self.report.checked += 1
                        self.report.checked_bytes += size
                        self.done += 1
                    else:
                        self._take(self._read(digest, entry.path))
            self._show_progress()

    def _read_objects(self, threads: int) -> None:
        """Read objects in order, some ahead, so that many threads have work and memory stays small."""
        window: collections.deque[Future[_Check] | _Shelf] = collections.deque()
        reading: dict[int, _Shelf] = {}
        started: dict[int, float] = {}

        def take() -> None:
            oldest = window.popleft()
            if isinstance(oldest, _Shelf):
                oldest.write()
                del reading[oldest.first]
                return
            check = oldest.result()
            self._take(check)
            if not check.kind:
                reading[check.digest[0]].good[check.digest.hex()] = started[check.digest[0]]

        with ThreadPoolExecutor(threads) as pool:
            try:
                for first, entries in shelves(self.store.root / "objects"):
                    shelf = reading[first] = _Shelf(first, self.store.root / "verified")
                    started[first] = now_or_here(self.store)
                    before = shelf.read()
                    for digest, entry in self._sort(first, entries):
                        checked = before.get(entry.name)
                        if checked is not None and self._is_recent(checked, digest, entry):
                            shelf.good[entry.name] = checked
                            self.report.skipped += 1
                            self.done += self.named[first].get(digest, 0)
                            continue
                        window.append(pool.submit(self._read, digest, entry.path))
                        while len(window) > AHEAD * threads:
                            take()
                    window.append(shelf)
                while window:
                    take()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _is_recent(self, checked: float, digest: bytes, entry: os.DirEntry[str]) -> bool:
        """Whether an object was read lately enough, and has the size that it should have."""
        if self.older_than_s is None or digest in self.lost or digest in self.disputed:
            return False
        age_s = self.now - checked
        if not 0 <= age_s < self.older_than_s:  # a time to come is no time
            return False
        with contextlib.suppress(FileNotFoundError):
            size = entry.stat(follow_symlinks=False).st_size
            return size == self.named[digest[0]].get(digest, size)
        return False

    def _sort(
        self, first: int, shelf: list[os.DirEntry[str]]
    ) -> Iterator[tuple[bytes, os.DirEntry[str]]]:
        """The objects of a shelf that are to be checked; what is missing or foreign is noted."""
        named, present = self.named[first], set()
        for entry in shelf:
            digest = as_digest(entry.name)
            if entry.name.startswith(".nfs"):
                continue  # removed while open: NFS removes it when it is closed
            if digest is None or digest[0] != first or not entry.is_file(follow_symlinks=False):
                problem = "it is no object: no regular file, named by its sha256, where it belongs"
                self.report.found("foreign", entry.path, problem)
                continue
            present.add(digest)
            if digest in named or self.unnamed:
                yield digest, entry
            else:
                self.report.unnamed += 1
        for digest in sorted(named.keys() - present):
            self.done += 1 if self.metadata else named[digest]
            self._missing(digest)

    def _read(self, digest: bytes, path: str) -> _Check:
        """Hash an object."""
        try:
            if file_digest(Path(path)) == digest.hex():
                return _Check(digest, os.stat(path).st_size)
            size = os.stat(path).st_size
        except FileNotFoundError:
            return _Check(digest, 0, "missing")
        except PermissionError as error:
            return _Check(digest, 0, "unreadable", f"{error.strerror}")
        except OSError as error:  # the disk's
            return _Check(digest, 0, "damaged", f"it cannot be read: {error.strerror}")
        wanted = self.named[digest[0]].get(digest, size)
        problem = (
            f"{size:,} bytes, {wanted:,} are recorded"
            if size != wanted
            else "its bytes are not those of its name"
        )
        return _Check(digest, size, "damaged", problem)

    def _take(self, check: _Check) -> None:
        digest, size = check.digest, check.bytes
        wanted = self.named[digest[0]].get(digest, size)
        self.done += 1 if self.metadata else wanted
        if check.kind == "missing":
            self._missing(digest)
        elif check.kind:
            self._bad(check)
        else:
            self.report.checked += 1
            self.report.checked_bytes += size
            if size != wanted or digest in self.disputed:
                self.faults.sizes[digest] = size
        if not self.metadata:
            self._show_progress()

    def _missing(self, digest: bytes) -> None:
        if not os.path.lexists(self.store.object_path(digest.hex())):
            self.faults.missing.add(digest)

    def _bad(self, check: _Check) -> None:
        path = self.store.object_path(check.digest.hex())
        # Read again: it may have been replaced by a good one, or the memory was at fault.
        again = self._read(check.digest, str(path))
        if not again.kind or again.kind == "missing":
            return self._take(again)
        kind = again.kind
        finding = self.faults.bad[check.digest] = self.report.found(
            kind, check.digest.hex(), again.problem
        )
        if kind == "damaged":
            aside = self.store.root / "damaged" / check.digest.hex()
            try:
                found = path.lstat()
                aside.parent.mkdir(exist_ok=True)
                os.replace(path, aside)
                finding.moved = str(aside)
                self.faults.moved.add((found.st_dev, found.st_ino))
            except OSError as error:
                finding.problem += f"; it could not be moved aside: {error.strerror}"


class _Shelf:
    """verified/<two digits>.json: when each object was last read and found good, seconds since the epoch."""

    def __init__(self, first: int, folder: Path) -> None:
        self.first, self.path = first, folder / f"{first:02x}.json"
        self.good: dict[str, float] = {}

    def read(self) -> dict[str, float]:
        """What an earlier run wrote; nothing if it did not, or not whole."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict):
            return {}
        return {name: t for name, t in content.items() if isinstance(t, int | float)}

    def write(self) -> None:
        """Note what is good, so that a run that is killed later goes on from here."""
        if not self.good and not self.path.exists():
            return
        text = json.dumps(self.good)
        with contextlib.suppress(OSError):  # a store that can only be read
            self.path.parent.mkdir(exist_ok=True)
            write_text_atomically(self.path, text)


def _scale(total: int, metadata: bool) -> tuple[int, str]:
    """(what a step of the progress line stands for, its unit)."""
    if metadata:
        return 1, "objects"
    return (10**6, "MB") if total >= 10**8 else (10**3, "kB")
