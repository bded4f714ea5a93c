"""What stands in a store and what leads to it: the walks that `gc` and `verify` share.

Made for a million objects: a digest is 32 bytes, folders are read entry by entry, a record is read,
used and dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from snakegpt.errors import UserError
from snakegpt.store.links import ACTIONS
from snakegpt.store.objects import Store
from snakegpt.store.provenance import sources_of

MALFORMED = (AttributeError, KeyError, TypeError, ValueError)

_HEX = re.compile("[0-9a-f]{64}").fullmatch


def filesystem_now(store: Store) -> float:
    """The time by the clock that stamps this store's files, seconds since the epoch.

    raises   OSError if the store cannot be written
    """
    path = store.root / "tmp" / f"clock-{os.getpid()}"
    path.touch()
    try:
        return path.stat().st_mtime
    finally:
        path.unlink()


def now_or_here(store: Store) -> float:
    """`filesystem_now`, or this machine's time where the store can only be read."""
    try:
        return filesystem_now(store)
    except OSError:
        return time.time()


def as_digest(name: str) -> bytes | None:
    """The 32 bytes of a sha256 in lower-case hex, or None if that is not what the name is."""
    return bytes.fromhex(name) if _HEX(name) else None


# ---- what stands in the store ------------------------------------------------------------------


def shelves(folder: Path) -> Iterator[tuple[int, list[os.DirEntry[str]]]]:
    """(first byte, entries) of each two-digit folder of objects/ or actions/, all 256 in order."""
    for first in range(256):
        try:
            with os.scandir(folder / f"{first:02x}") as found:
                entries = list(found)
        except (FileNotFoundError, NotADirectoryError):
            entries = []
        yield first, entries


def strays(folder: Path) -> list[str]:
    """Paths in objects/ or actions/ that are none of its two-digit folders."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
        return sorted(
            entry.path
            for entry in found
            if not (re.fullmatch("[0-9a-f]{2}", entry.name) and entry.is_dir(follow_symlinks=False))
        )
    return []


def objects_named(
    store: Store, record: Mapping[str, Any], opened: set[bytes], lost: set[bytes]
) -> Iterator[tuple[bytes, int]]:
    """(digest, bytes) of every object that a record needs to stay complete, its diff included.

    opened   listings whose content is known already: their files are left out; grows
    lost     gets the listings that are gone or damaged
    raises   one of MALFORMED if the record, or a listing, is none
    """
    diff = record.get("provenance", {}).get("diff")
    for output in (*record["outputs"].values(), *([diff] if diff else ())):
        digest = bytes.fromhex(output["sha256"])
        yield digest, int(output["bytes"])
        if "folder" not in output or digest in opened:
            continue
        try:
            entries = store.listing(output["sha256"])
        except FileNotFoundError:
            lost.add(digest)
            continue
        opened.add(digest)
        for entry in entries:
            yield bytes.fromhex(entry.sha256), entry.bytes


def ancestors(record: Mapping[str, Any]) -> Iterator[str]:
    """Keys of the actions that made a record's inputs, and of the one it was adopted from."""
    for entry in sources_of(record):
        if entry.get("action"):
            yield entry["action"]
    adopted = record.get("adopted")
    if adopted and adopted.get("from"):
        yield adopted["from"]


# ---- what leads to it --------------------------------------------------------------------------


class Root(NamedTuple):
    """A results/ folder that uses a store: its entry in roots/, where it is, why it cannot be read.

    deleted  whether it is gone from a place that is still there, so that no disk is out of reach
    """

    entry: Path
    results: str
    problem: str | None = None
    deleted: bool = False


def registered(store: Store) -> list[Root]:
    """Every results/ folder that was ever shown a result of this store."""
    found = []
    for entry in sorted((store.root / "roots").glob("*")):
        results = os.path.realpath(entry)
        try:
            os.scandir(results).close()
            found.append(Root(entry, results))
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            deleted = gone and os.path.isdir(os.path.dirname(results))
            found.append(Root(entry, results, error.strerror, deleted))
    return found


class Shown(NamedTuple):
    """A result, and what it leads to: the action its pointer names, or the object it shows."""

    path: str
    key: str | None = None
    sha256: str | None = None


def shown(results: str) -> Iterator[Shown]:
    """All that the links in a results/ folder lead to.

    raises   OSError if part of it cannot be read: whoever deletes must see everything
    """
    actions = os.path.join(results, ACTIONS)
    pending = [results]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except FileNotFoundError:
            continue  # removed meanwhile
        inside = folder == actions or folder.startswith(actions + os.sep)
        place = results + folder.removeprefix(actions) if inside else folder
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
                continue
            name, kind = os.path.splitext(entry.name) if inside else (entry.name, "")
            path = os.path.join(place, name)
            with contextlib.suppress(FileNotFoundError):
                if entry.is_symlink():
                    target = os.path.basename(os.readlink(entry.path)).removesuffix(kind)
                    if _HEX(target):
                        yield Shown(path, key=target) if inside else Shown(path, sha256=target)
                elif kind == ".digest":
                    stamp = _stamp(entry.path)
                    if stamp:
                        yield Shown(path, sha256=stamp)


def _stamp(path: str) -> str | None:
    """The digest in the stamp beside a result that is no symbolic link."""
    with open(path, encoding="utf-8") as file, contextlib.suppress(ValueError, TypeError):
        sha256 = json.load(file)[0]
        return sha256 if _HEX(sha256) else None
    return None


def below(path: str, folder: str) -> bool:
    """Whether a path is a folder or something in it."""
    return path == folder or path.startswith(folder + os.sep)


# ---- what people call it -----------------------------------------------------------------------


def called(store: Store, name: str) -> tuple[set[str], set[str]]:
    """(action keys, digests of objects) that a name stands for.

    name     a file or folder below a results/ folder, or the first 6 or more digits of a key or sha256
    raises   UserError if it is nothing that this store knows, or more than one thing
    """
    if re.fullmatch("[0-9a-f]{6,64}", name) and not os.path.lexists(name):
        keys = _begin(store.root / "actions", name, ".json")
        digests = _begin(store.root / "objects", name, "")
        if len(keys) + len(digests) > 1:
            raise UserError(f"'{name}' begins {len(keys) + len(digests)} names; give more digits.")
    else:
        keys, digests = _of_results(store, name)
    if not keys and not digests:
        raise UserError(
            f"'{name}' is nothing that the store {store.root} knows.\n"
            "  name a file or folder below results/, or the first digits of a key or sha256"
        )
    return keys, digests


def _begin(folder: Path, start: str, ending: str) -> set[str]:
    found = (path.name.removesuffix(ending) for path in (folder / start[:2]).glob(f"{start}*"))
    return {name for name in found if _HEX(name)}


def _of_results(store: Store, name: str) -> tuple[set[str], set[str]]:
    head, tail = os.path.split(os.path.abspath(name))
    path = os.path.join(os.path.realpath(head), tail)
    keys, digests = set(), set()
    for root in registered(store):
        if root.problem is None and below(path, root.results):
            for link in shown(root.results):
                # A file in a published folder has its folder's pointer.
                if link.key and (below(link.path, path) or below(path, link.path)):
                    keys.add(link.key)
                elif link.sha256 and below(link.path, path):
                    digests.add(link.sha256)
    return keys, digests
