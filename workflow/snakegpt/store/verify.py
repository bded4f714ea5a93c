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
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from snakegpt.durable import write_atomically
from snakegpt.errors import UserError
from snakegpt.identity import file_digest
from snakegpt.progress import Progress, quantity
from snakegpt.store.command import add_settings, age_s, pipeline_of, print_json, store_of
from snakegpt.store.links import pointer
from snakegpt.store.objects import Store, read_record
from snakegpt.store.pins import pins
from snakegpt.store.reach import (
    MALFORMED,
    as_digest,
    now_or_here,
    objects_named,
    registered,
    shelves,
    shown,
    strays,
)


def add(commands: Any) -> None:
    """The command `verify`."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="rehash what the store holds",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("--metadata", action="store_true", help="check existence and size, read no object")
    flag("--older-than", type=age_s, metavar="AGE", help="only what was last read longer ago: 7d")
    flag("--all", action="store_true", help="also objects that no record names")
    flag("--threads", type=int, metavar="N", help="objects read at a time; default: one a core")
    flag("--json", action="store_true", help="for programs")
    add_settings(parser)
    parser.set_defaults(run=_run)


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

Kind = Literal["damaged", "missing", "foreign", "unreadable"]


@dataclass
class Finding:
    """Something wrong, and what it touches.

    name     sha256 of an object, key of an action, or path of what is neither
    moved    where a damaged object is now
    actions  "stage name (key)" of those that name it; `results`: paths that show it
    """

    kind: Kind
    name: str
    problem: str
    moved: str | None = None
    actions: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For a terminal."""
        moved = f"; moved to {self.moved}" if self.moved else ""
        lines = [f"{self.kind}  {self.name}: {self.problem}{moved}"]
        lines += _some("named by", self.actions)
        return lines + _some("shown as", self.results)


def _some(what: str, names: list[str], most: int = 5) -> list[str]:
    more = [f"    ... {len(names) - most:,} more"] if len(names) > most else []
    return [*(f"    {what} {name}" for name in names[:most]), *more]


@dataclass
class Report:
    """What was checked and what was found.

    skipped   objects that were read lately enough
    unnamed   objects that no record names and nobody asked to check
    let_go    objects that are not there and that no result shows: their actions would run again
    """

    metadata: bool
    records: int = 0
    checked: int = 0
    checked_bytes: int = 0
    skipped: int = 0
    unnamed: int = 0
    let_go: int = 0
    findings: list[Finding] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = [line for finding in self.findings for line in finding.lines()]
        how = "present at full size" if self.metadata else "read"
        size = quantity(self.checked_bytes, "B")
        facts = [f"{self.records:,} records, {self.checked:,} objects {how} ({size})"]
        facts += [f"{self.skipped:,} read lately"] if self.skipped else []
        facts += [f"{self.unnamed:,} without a record (--all)"] if self.unnamed else []
        facts += [f"{self.let_go:,} let go"] if self.let_go else []
        kinds = {finding.kind for finding in self.findings}
        lines.append(f"{', '.join(facts)}: {len(self.findings) or 'nothing'} found")
        if kinds & {"damaged", "missing"}:
            lines.append("the next run restores or rebuilds what is damaged or missing")
        if "foreign" in kinds:
            lines.append(
                "what is foreign is left where it is: move it away;"
                " an action whose record is removed runs again"
            )
        return lines


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
    if not (store.root / "objects").is_dir():
        raise UserError(
            f"there is no store at {store.root}.\n"
            "  set store.path in config.yaml or SNAKEGPT_STORE to where it is"
        )
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: at least 1 is wanted.")
    threads = threads or len(os.sched_getaffinity(0))
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
        self.sizes: dict[bytes, int] = {}  # of good objects whose size some record has wrong
        self.bad: dict[bytes, Finding] = {}
        self.moved: set[tuple[int, int]] = set()  # (device, inode)

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
            self._found("foreign", path, "it is no folder of objects")
        for path in strays(self.store.root / "actions"):
            self._found("foreign", path, "it is no folder of action records")
        self._name_what_is_touched()
        return self.report

    def _show_progress(self) -> None:
        if self.done // self.scale < self.progress.total:
            self.progress.update(self.done // self.scale)

    def _found(self, kind: Kind, name: str, problem: str) -> Finding:
        finding = Finding(kind, name, problem)
        self.report.findings.append(finding)
        return finding

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
                    self._found("foreign", key if as_digest(key) else entry.path, problem)
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
                self._found("foreign", entry.path, problem)
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
                self.sizes[digest] = size
        if not self.metadata:
            self._show_progress()

    def _missing(self, digest: bytes) -> None:
        if not os.path.lexists(self.store.object_path(digest.hex())):
            self.bad[digest] = self._found("missing", digest.hex(), "no such object")

    def _bad(self, check: _Check) -> None:
        path = self.store.object_path(check.digest.hex())
        # Read again: it may have been replaced by a good one, or the memory was at fault.
        again = self._read(check.digest, str(path))
        if not again.kind or again.kind == "missing":
            return self._take(again)
        kind = again.kind
        finding = self.bad[check.digest] = self._found(kind, check.digest.hex(), again.problem)
        if kind == "damaged":
            aside = self.store.root / "damaged" / check.digest.hex()
            try:
                found = path.lstat()
                aside.parent.mkdir(exist_ok=True)
                os.replace(path, aside)
                finding.moved = str(aside)
                self.moved.add((found.st_dev, found.st_ino))
            except OSError as error:
                finding.problem += f"; it could not be moved aside: {error.strerror}"

    # ---- what is touched ----

    def _name_what_is_touched(self) -> None:
        """Go through records and results once more, for what was found."""
        self.places: dict[
            tuple[str, str], Finding
        ] = {}  # (action, output) -> what is wrong with it
        if self.bad or self.sizes:
            for _, shelf in shelves(self.store.root / "actions"):
                for entry in shelf:
                    record = read_record(entry.path)
                    if record and f"{record.get('key')}.json" == entry.name:
                        with contextlib.suppress(OSError, *MALFORMED):
                            self._name_action(record)
        self._name_results()
        pinned = {key[:12] for keys in pins(self.store).values() for key in keys}
        for finding in [f for f in self.bad.values() if f.kind == "missing" and not f.results]:
            # Of an action whose record alone is kept, as provenance: after gc, or import --without.
            if not any(label[-13:-1] in pinned for label in finding.actions):
                self.report.findings.remove(finding)
                self.report.let_go += 1
        for finding in self.report.findings:
            finding.actions.sort()
            finding.results.sort()

    def _name_action(self, record: dict[str, Any]) -> None:
        key = record["key"]
        label = f"{record['stage']} {record['name']} ({key[:12]})"
        for name, output in record["outputs"].items():
            finding = self.bad.get(bytes.fromhex(output["sha256"]))
            if finding:
                self.places[key, name] = finding
        for digest, n_bytes in objects_named(self.store, record, set(), set()):
            finding = self.bad.get(digest)
            if finding and label not in finding.actions:
                finding.actions.append(label)
            elif self.sizes.get(digest, n_bytes) != n_bytes:
                problem = (
                    f"it says {n_bytes:,} bytes of {digest.hex()[:12]}, which is whole without"
                )
                self._found("foreign", key, problem).actions.append(label)

    def _name_results(self) -> None:
        records = {f.name: f for f in self.report.findings if f.kind == "foreign"}
        gone: dict[str, Finding] = {}

        def miss(key: str, what: str) -> None:
            if key not in gone:
                gone[key] = self._found("missing", key, "no such action record")
            gone[key].results.append(what)

        for root in registered(self.store):
            if root.problem:
                continue
            with contextlib.suppress(OSError):  # a colleague's in part: named as far as it is seen
                for link in shown(root.results):
                    if link.sha256:
                        found = [self.bad.get(bytes.fromhex(link.sha256))]
                    else:
                        key = link.key or ""
                        place = (key, os.path.basename(link.path))
                        found = [records.get(key), self.places.get(place)]
                        if self._is_lost(key, link.path, root.results):
                            miss(key, link.path)
                    for finding in filter(None, found):
                        self._remove_moved(link.path)
                        if link.path not in finding.results:
                            finding.results.append(link.path)
        for name, keys in pins(self.store).items():
            for key in keys:
                if not os.path.lexists(self.store.action_path(key)):
                    miss(key, f"pin {name}")

    def _is_lost(self, key: str, path: str, results: str) -> bool:
        """Whether a result's pointer leads into this store, to a record that is not there."""
        if os.path.lexists(self.store.action_path(key)):
            return False
        target = os.path.realpath(pointer(Path(path), Path(results)))
        return target == os.path.realpath(self.store.action_path(key))

    def _remove_moved(self, path: str) -> None:
        """Remove a result that is a hard link to an object that was moved aside: it is as damaged."""
        with contextlib.suppress(OSError):
            found = os.lstat(path)
            if (found.st_dev, found.st_ino) in self.moved:
                os.unlink(path)


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
            write_atomically(self.path, lambda aside: aside.write_text(text, encoding="utf-8"))


def key_of(record: Mapping[str, Any]) -> str:
    """The key that a record's content gives, see `identity.Action.key`.

    raises   KeyError, TypeError or ValueError if it is no record
    """
    inputs = {
        role: [entry["sha256"] for entry in entries] for role, entries in record["inputs"].items()
    }
    parts = {name: record[name] for name in ("stage", "science", "code")}
    # `identity.canonical_json` without its walk in search of what JSON cannot say: this was read from it.
    text = json.dumps(
        {**parts, "inputs": inputs}, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _scale(total: int, metadata: bool) -> tuple[int, str]:
    """(what a step of the progress line stands for, its unit)."""
    if metadata:
        return 1, "objects"
    return (10**6, "MB") if total >= 10**8 else (10**3, "kB")
