"""What `verify` found, and what that touches: the actions that name it and the results that show it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from snakegpt.errors import UserError
from snakegpt.progress import quantity
from snakegpt.store.links import pointer
from snakegpt.store.objects import Store
from snakegpt.store.pins import pins
from snakegpt.store.reach import MALFORMED, Shown, objects_named, registered, shelves, shown

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
    let_go    objects that are not there and that no result and no pin needs: `gc` took them, or an
              import left them out
    """

    metadata: bool
    records: int = 0
    checked: int = 0
    checked_bytes: int = 0
    skipped: int = 0
    unnamed: int = 0
    let_go: int = 0
    findings: list[Finding] = field(default_factory=list)

    def found(self, kind: Kind, name: str, problem: str) -> Finding:
        """Add a finding."""
        finding = Finding(kind, name, problem)
        self.findings.append(finding)
        return finding

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


@dataclass
class Faults:
    """What is wrong with objects, by digest, before it is known whom it concerns.

    bad      findings; those that are missing are added once somebody needs them
    missing  not there
    sizes    size of good objects that some record has wrong
    moved    (device, inode) of those that were moved aside
    """

    bad: dict[bytes, Finding] = field(default_factory=dict)
    missing: set[bytes] = field(default_factory=set)
    sizes: dict[bytes, int] = field(default_factory=dict)
    moved: set[tuple[int, int]] = field(default_factory=set)


def name_what_is_touched(store: Store, report: Report, faults: Faults) -> None:
    """Add actions and results to the findings, and find what results lead to in vain."""
    _Naming(store, report, faults).run()


class _Naming:
    def __init__(self, store: Store, report: Report, faults: Faults) -> None:
        self.store, self.report, self.faults = store, report, faults
        # (action, output) -> what is wrong with it
        self.places: dict[tuple[str, str], Finding] = {}

    def run(self) -> None:
        """Go through the results, and through the records where something was found."""
        shown_keys = self._find_lost_records()
        if self.faults.bad or self.faults.sizes:
            for _, shelf in shelves(self.store.root / "actions"):
                for entry in shelf:
                    self._name_action(os.path.splitext(entry.name)[0], shown_keys)
        elif self.faults.missing:
            for key in shown_keys:
                self._name_action(key, shown_keys)
        if self.faults.missing or self.report.findings:
            self._name_results()
        self.report.let_go = len(self.faults.missing - self.faults.bad.keys())
        for finding in self.report.findings:
            finding.actions.sort()
            finding.results.sort()

    def _find_lost_records(self) -> set[str]:
        """Keys that results and pins lead to, in this store; those without a record are found missing."""
        keys: set[str] = set()
        lost: dict[str, Finding] = {}

        def need(key: str, what: str) -> None:
            if os.path.lexists(self.store.action_path(key)):
                keys.add(key)
                return
            if key not in lost:
                lost[key] = self.report.found("missing", key, "no such action record")
            lost[key].results.append(what)

        for link, results in self._shown():
            if link.key and self._leads_here(link.key, link.path, results):
                need(link.key, link.path)
        try:
            for name, pinned in pins(self.store).items():
                for key in pinned:
                    need(key, f"pin {name}")
        except UserError as error:
            self.report.found("foreign", str(self.store.root / "pins"), str(error))
        return keys

    def _shown(self) -> Iterator[tuple[Shown, str]]:
        """All links of all results/ folders that can be read, and their folder."""
        for root in registered(self.store):
            with contextlib.suppress(OSError):  # a colleague's in part: named as far as it is seen
                for link in shown(root.results):
                    yield link, root.results

    def _name_action(self, key: str, shown_keys: Container[str]) -> None:
        """Add an action to what was found of its objects.

        What is missing of actions that no result and no pin leads to is nobody's loss: `gc` keeps the
        records of what results were made from, and not the objects; so may an import.
        """
        record = self.store.record_of(key)
        if record is None:
            return
        with contextlib.suppress(OSError, *MALFORMED):
            label = f"{record['stage']} {record['name']} ({key[:12]})"
            for digest, n_bytes in objects_named(self.store, record, set(), set()):
                if digest in self.faults.missing and key in shown_keys:
                    self._lack(digest)
                finding = self.faults.bad.get(digest)
                if finding and label not in finding.actions:
                    finding.actions.append(label)
                elif self.faults.sizes.get(digest, n_bytes) != n_bytes:
                    problem = f"it says {n_bytes:,} bytes of {digest.hex()[:12]}, which is whole"
                    self.report.found("foreign", key, problem).actions.append(label)
            for name, output in record["outputs"].items():
                finding = self.faults.bad.get(bytes.fromhex(output["sha256"]))
                if finding:
                    self.places[key, name] = finding

    def _lack(self, digest: bytes) -> None:
        if digest not in self.faults.bad:
            self.faults.bad[digest] = self.report.found("missing", digest.hex(), "no such object")

    def _name_results(self) -> None:
        records = {f.name: f for f in self.report.findings if f.kind == "foreign"}
        for link, _ in self._shown():
            if link.sha256:
                digest = bytes.fromhex(link.sha256)
                if digest in self.faults.missing and not os.path.exists(link.path):
                    self._lack(digest)
                found = [self.faults.bad.get(digest)]
            else:
                place = (link.key or "", os.path.basename(link.path))
                found = [records.get(link.key or ""), self.places.get(place)]
            for finding in filter(None, found):
                self._remove_moved(link.path)
                if link.path not in finding.results:
                    finding.results.append(link.path)

    def _leads_here(self, key: str, path: str, results: str) -> bool:
        """Whether a result's pointer leads into this store; asked only where it matters."""
        record = self.store.action_path(key)
        if not self.faults.missing and os.path.lexists(record):
            return True
        target = os.path.realpath(pointer(Path(path), Path(results)))
        return target == os.path.realpath(record)

    def _remove_moved(self, path: str) -> None:
        """Remove a result that is a hard link to an object that was moved aside: it is as damaged."""
        with contextlib.suppress(OSError):
            found = os.lstat(path)
            if (found.st_dev, found.st_ino) in self.faults.moved:
                os.unlink(path)
