"""Make room: remove what no result, pinned name or live state needs. A dry run unless told otherwise.

python -m snakegpt.store gc                              what would go and what stays
python -m snakegpt.store gc --delete --older-than 30d    remove what nobody used for 30 days
python -m snakegpt.store gc --why results/models/gpt2    what keeps this alive
python -m snakegpt.store pin paper results/models/gpt2   keep it under a name, whatever becomes of results/
"""

# Safe beside running actions:
# - nothing goes that is younger than an hour or than the oldest lease, by the filesystem's own clock;
# - records go before objects, and what a record needs that became young meanwhile stays: no record
#   promises what was taken away;
# - each file is moved aside, looked at once more, and only then removed: whoever publishes or finds an
#   object makes it young, and either finds it gone and writes its own, or keeps it.

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from snakegpt.durable import sync
from snakegpt.errors import UserError
from snakegpt.progress import duration
from snakegpt.store import leases
from snakegpt.store.alive import Group, mark, running, times, touched, why_kept
from snakegpt.store.command import add_settings, age_s, pipeline_of, print_json, store_of
from snakegpt.store.objects import Store
from snakegpt.store.reach import Root, as_digest, filesystem_now, now_or_here, registered, shelves


def add(commands: Any) -> None:
    """The command `gc`."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser: argparse.ArgumentParser = commands.add_parser(
        "gc",
        help="what no result needs, and removing it",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("--delete", action="store_true", help="remove it; without this nothing is touched")
    flag("--older-than", type=age_s, metavar="AGE", help=_OLDER_THAN)
    flag("--damaged", action="store_true", help="also what verify moved to damaged/")
    flag("--forget", nargs="+", default=[], metavar="DIR", help=_FORGET)
    flag("--why", metavar="NAME", help="what keeps a result, a key or a sha256 alive")
    flag("--json", action="store_true", help="for programs")
    add_settings(parser)
    parser.set_defaults(run=_run)


_OLDER_THAN = (
    "spare what was made or used within this age (30d, 12h, ...), and let the state of unfinished"
    " actions go when it is older; without it such state always stays"
)
_FORGET = "results/ folders that are gone for good, though their disk or machine is out of reach"


def _run(args: argparse.Namespace) -> None:
    store = store_of(pipeline_of(args))
    if args.why:
        reasons = why_kept(store, args.why, older_than_s=args.older_than)
        print_json(reasons) if args.json else _print_reasons(reasons)
        return
    report = collect(
        store,
        delete=args.delete,
        older_than_s=args.older_than,
        damaged=args.damaged,
        forget=args.forget,
    )
    print_json(report.as_json()) if args.json else print("\n".join(report.lines()))


def _print_reasons(kept: dict[str, dict[str, list[str]]], most: int = 10) -> None:
    for what, named in (("record of action", kept["records"]), ("object", kept["objects"])):
        for digest, reasons in named.items():
            print(f"{what} {digest}")
            for reason in reasons[:most] or ["nothing keeps it"]:
                print(f"  {reason}")
            if len(reasons) > most:
                print(f"  ... {len(reasons) - most:,} more")


@dataclass
class Report:
    """What stays and what goes (or went, if `deleted`), and what people should know besides."""

    deleted: bool
    groups: list[Group]
    notes: list[str]

    def total(self) -> Group:
        """The sum of all groups."""
        total = Group("total", "")
        for group in self.groups:
            total.stays.add(group.stays.bytes, group.stays.files)
            total.goes.add(group.goes.bytes, group.goes.files)
        return total

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"total": asdict(self.total()), **asdict(self)}

    def lines(self, most: int = 20) -> list[str]:
        """For a terminal: the largest groups, those that go first."""
        largest = sorted(self.groups, key=lambda group: (-group.goes.bytes, -group.stays.bytes))
        rows = [("name", "stage", "stays", "went" if self.deleted else "goes")]
        rows += [(g.name, g.stage, str(g.stays), str(g.goes)) for g in largest[:most]]
        if len(largest) > most:
            rows.append((f"... {len(largest) - most:,} more", "", "", ""))
        total = self.total()
        rows.append((total.name, "", str(total.stays), str(total.goes)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        hint = [] if self.deleted else ["nothing was touched; --delete removes what goes"]
        return [*lines, *self.notes, *hint]


def collect(
    store: Store,
    *,
    delete: bool = False,
    older_than_s: float | None = None,
    damaged: bool = False,
    forget: Sequence[str] = (),
) -> Report:
    """Say what no result needs, and remove it if told to.

    older_than_s  spare what was made or used within so many seconds; let older unfinished state go
    damaged       also what `verify` moved aside
    forget        results/ folders that are gone for good
    raises        UserError if there is no store, or it is not known what some results need
    """
    if not (store.root / "objects").is_dir():
        raise UserError(
            f"there is no store at {store.root}.\n"
            "  set store.path in config.yaml or SNAKEGPT_STORE to where it is"
        )
    roots = registered(store)
    if delete:
        _forget_the_gone(roots, [os.path.realpath(folder) for folder in forget])
    return _Collection(store, delete, older_than_s, roots).run(damaged)


def _forget_the_gone(roots: Sequence[Root], forgotten: Sequence[str]) -> None:
    """Stop before anything is removed that results out of sight may need."""
    out_of_sight = {root.results for root in roots if root.problem}
    for folder in forgotten:
        if folder not in out_of_sight:
            raise UserError(
                f"--forget {folder}: it can be read, or uses another store.\n"
                "  a results/ folder that is deleted is forgotten by itself"
            )
    for root in roots:
        if root.problem and not root.deleted and root.results not in forgotten:
            raise UserError(
                f"what {root.results} needs is not known: {root.problem}.\n"
                "  if it is on another disk or machine: run gc where it can be read\n"
                f"  if it is gone for good: gc --delete --forget {root.results}"
            )
    for root in roots:
        if root.problem:
            with contextlib.suppress(OSError):  # a colleague's; it is asked about again
                root.entry.unlink()


class _Collection:
    """One run of `collect`."""

    def __init__(
        self, store: Store, delete: bool, older_than_s: float | None, roots: Sequence[Root]
    ) -> None:
        self.store, self.delete, self.older_than_s, self.roots = store, delete, older_than_s, roots
        self.refused: list[OSError] = []
        try:
            self.now = filesystem_now(store) if delete else now_or_here(store)
        except OSError as error:
            raise UserError(
                f"the store {store.root} cannot be written: {error.strerror}."
            ) from None
        locks = store.root / "locks"
        self.left = leases.abandoned(locks)
        if delete:
            for key in sorted(self.left):
                with leases.attempt(locks, key):
                    pass  # taken over from the dead, and given back
        self.live = running(store)
        self.limits = times(store, self.now, self.live, older_than_s)
        self.reach = mark(store, self.live, self.limits, roots)

    def run(self, damaged: bool) -> Report:
        """Count, and remove, one kind of thing after the other."""
        self._sweep_records()
        self._sweep_objects()
        self._sweep_tmp()
        self._sweep_state()
        if damaged:
            for path in sorted((self.store.root / "damaged").glob("*")):
                self._sweep(str(path), self.reach.group("", "damaged"), path.lstat())
        groups = [g for g in self.reach.groups.values() if g.stays.files or g.goes.files]
        return Report(self.delete, sorted(groups, key=lambda g: (g.name, g.stage)), self._notes())

    def _notes(self) -> list[str]:
        notes = [
            f"{root.results} keeps nothing: {root.problem}" for root in self.roots if root.problem
        ]
        if self.live:
            spared = duration(self.now - self.limits.spared)
            notes.append(
                f"actions that run: {len(self.live):,}; nothing younger than {spared} goes"
            )
        if self.left:
            notes.append(f"locks of dead processes: {len(self.left):,}")
        broken = sorted(key.hex()[:12] for key in self.reach.broken)
        if broken:
            notes.append(
                f"kept actions that are not whole: {len(broken):,} ({', '.join(broken[:5])});"
                " see verify"
            )
        if self.refused:
            first = self.refused[0]
            notes.append(
                f"files that could not be removed: {len(self.refused):,},"
                f" such as {first.filename}: {first.strerror}"
            )
        return notes

    # ---- records and objects ----

    def _sweep_records(self) -> None:
        for key, group in self.reach.records.items():
            if key in self.reach.whole:
                continue
            with contextlib.suppress(FileNotFoundError):
                group.stays.add(self.store.action_path(key.hex()).stat().st_size)
        for key, group in self.reach.dead.items():
            path = self.store.action_path(key.hex())
            with contextlib.suppress(FileNotFoundError):
                if not self._sweep(str(path), group, path.lstat()):
                    # Used a moment ago, or it cannot be removed: what it promises stays as well.
                    record = self.store.record_of(key.hex())
                    if record:
                        self.reach.keep_objects(record, key)
        if self.delete:
            for shelf in (self.store.root / "actions").glob("[0-9a-f][0-9a-f]"):
                sync(shelf)  # also after a power cut, no record promises what is gone

    def _sweep_objects(self) -> None:
        kept, doomed = self.reach.objects, self.reach.doomed
        unnamed = self.reach.group("", "objects without a record")
        for _, shelf in shelves(self.store.root / "objects"):
            for entry in shelf:
                digest = as_digest(entry.name)
                if digest is None:
                    continue  # not ours: verify names it
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    group = kept.get(digest)
                    if group:
                        group.stays.add(found.st_size)
                    elif stat.S_ISREG(found.st_mode):
                        self._sweep(entry.path, doomed.get(digest, unnamed), found)

    def _sweep(self, path: str, group: Group, found: os.stat_result) -> bool:
        """Count a file that nothing keeps, and remove it, unless it is young; returns whether it goes."""
        goes = not self.limits.spare(found)
        if goes and self.delete:
            try:
                goes = self._take_away(path, found)
            except FileNotFoundError:
                pass  # by another gc
            except OSError as error:
                self.refused.append(error)
                goes = False
        (group.goes if goes else group.stays).add(found.st_size)
        return goes

    def _take_away(self, path: str, seen: os.stat_result) -> bool:
        """Remove a file, unless it is not the one any more that was seen."""
        if self.limits.spare(os.lstat(path)):
            return False
        aside = str(self.store.root / "tmp" / f"gc-{os.getpid()}")
        os.rename(path, aside)
        found = os.lstat(aside)
        unchanged = (found.st_ino, found.st_mtime_ns) == (seen.st_ino, seen.st_mtime_ns)
        if not unchanged and not os.path.lexists(path):
            os.rename(aside, path)  # somebody published it or found it in this moment
            return False
        os.unlink(aside)
        return unchanged

    # ---- what actions leave beside them ----

    def _sweep_tmp(self) -> None:
        """Workspaces of dead actions, and files written aside that never got their name."""
        group = self.reach.group("", "left by crashes")
        for path in sorted((self.store.root / "tmp").glob("*")):
            tree = _Tree.of(path)
            if path.name[:64] in self.live or tree.touched >= self.limits.spared:
                self.reach.group("", "written now").stays.add(tree.bytes, tree.files)
            else:
                self._sweep_tree(path, group, tree)
        names = (("actions", "??/.*"), ("locks", ".*"), ("pins", ".*"), ("verified", ".*"))
        for folder, pattern in names:
            for path in sorted((self.store.root / folder).glob(pattern)):
                with contextlib.suppress(FileNotFoundError):
                    self._sweep(str(path), group, path.lstat())

    def _sweep_state(self) -> None:
        """State of actions that finished, or that nobody resumed for as long as the age limit."""
        group = self.reach.group("", "state of unfinished actions")
        for path in sorted((self.store.root / "state").glob("*")):
            key, tree = path.name, _Tree.of(path)
            unused = self.older_than_s is not None and tree.modified < self.limits.unused
            needed = not (unused or self.store.look_up(key))
            if key in self.live or tree.touched >= self.limits.spared or needed:
                group.stays.add(tree.bytes, tree.files)
            elif self.delete:
                # Nobody may resume from it meanwhile.
                with leases.attempt(self.store.root / "locks", key) as free:
                    if free:
                        self._sweep_tree(path, group, tree)
                    else:
                        group.stays.add(tree.bytes, tree.files)
            else:
                group.goes.add(tree.bytes, tree.files)

    def _sweep_tree(self, path: Path, group: Group, tree: _Tree) -> None:
        """Count a folder or file that is to go, and remove it."""
        if self.delete:
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                self.refused.append(error)
                group.stays.add(tree.bytes, tree.files)
                return
        group.goes.add(tree.bytes, tree.files)


@dataclass
class _Tree:
    """A folder with all that is in it, or a file: what it holds, when something in it last changed."""

    files: int = 0
    bytes: int = 0
    touched: float = 0.0
    modified: float = 0.0

    @classmethod
    def of(cls, path: Path) -> _Tree:
        tree = cls()
        tree._count(str(path))
        for folder, folders, files in os.walk(path):
            for name in (*folders, *files):
                tree._count(os.path.join(folder, name))
        return tree

    def _count(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # a running action's
            found = os.lstat(path)
            if not stat.S_ISDIR(found.st_mode):
                self.files += 1
                self.bytes += found.st_size
            self.touched = max(self.touched, touched(found))
            self.modified = max(self.modified, found.st_mtime)
