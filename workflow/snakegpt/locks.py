"""The lock file: which bytes every corpus, and all pretrained weights, are made of.

corpora.lock.json stands beside config.yaml and is committed. It makes the workflow's jobs known
before anything is downloaded, and any change upstream an error:

    {"format": 1,
     "corpora": {name: {"source":   the settings it was made from,
                        "revision": commit of a hub repository, else null,
                        "archive":  {"name", "sha256", "bytes"} of a package, else null,
                        "files":    [{"path", "sha256", "bytes"}, ...] sorted by path}},
     "weights": the same of pretrained weights, left out while there are none}

A file's path is relative and names it inside its source: the member's name in a package archive
(its top folder included, as the glob patterns see it), the file's name in a hub repository, the
last part of a URL, and for local files what follows the part of the pattern without wildcards.

The Snakefile reads this file each time it is parsed: standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from snakegpt.durable import write_text_atomically
from snakegpt.errors import UserError

FORMAT = 1
TABLES = ("corpora", "weights")  # no name stands in both
RELOCK = "python -m snakegpt.stages.lock_corpora"


def update_command(what: str) -> str:
    """What takes a source as it is now; `what` is a name, or a name with its noun: `corpus mine`."""
    return f"{RELOCK} --update {what.split()[-1]}"


@dataclass(frozen=True)
class File:
    """One file of a source; the fields are those of the JSON."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Archive:
    """The package archive that a registry corpus is unpacked from."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Entry:
    """What the lock file says of one corpus, or of some weights."""

    source: Mapping[str, Any]
    files: tuple[File, ...]
    revision: str | None = None
    archive: Archive | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files)

    def as_json(self) -> dict[str, Any]:
        """The entry as plain JSON values."""
        return asdict(self) | {"source": dict(self.source), "files": [*map(asdict, self.files)]}


def read(path: str | Path) -> dict[str, Entry]:
    """All entries of a lock file by name, of corpora and weights; none if there is no such file.

    raises   UserError that names the first thing wrong with it
    """
    return {name: entry for table in _tables(path).values() for name, entry in table.items()}


def _tables(path: str | Path) -> dict[str, dict[str, Entry]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {table: {} for table in TABLES}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the lock file {path}: {error}.") from None
    try:
        tree = json.loads(text)
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise ValueError(f'"format" is not {FORMAT}')
        tree = {"weights": {}, **tree}
        return {
            table: {name: _entry(name, value) for name, value in tree[table].items()}
            for table in TABLES
        }
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"the lock file {path} is damaged: {reason}.\n"
            f"  restore it (git checkout {path}), or remove it and lock again: {RELOCK} --all"
        ) from None


def _entry(name: str, value: Mapping[str, Any]) -> Entry:
    files = tuple(File(**_pin(f"{name}.files[{i}]", f)) for i, f in enumerate(value["files"]))
    paths = [file.path for file in files]
    if not files:
        raise ValueError(f"{name}.files is empty")
    if paths != sorted(set(paths)):
        raise ValueError(f"{name}.files is not sorted by path or names a path twice")
    for path in paths:
        if not is_inside(path):
            raise ValueError(f"{name}.files: path {path!r} leaves its folder")
    archive = value["archive"] and Archive(**_pin(f"{name}.archive", value["archive"]))
    if archive and (not is_inside(archive.name) or "/" in archive.name):
        raise ValueError(f"{name}.archive: name {archive.name!r} leaves its folder")
    if not isinstance(value["source"], dict) or "kind" not in value["source"]:
        raise ValueError(f"{name}.source is no source")
    return Entry(value["source"], files, value["revision"], archive)


def _pin(where: str, value: Any) -> dict[str, Any]:
    """The fields of a File or Archive, checked by hand: the file may have been edited by hand."""
    if not re.fullmatch(r"[0-9a-f]{64}", str(value["sha256"])):
        raise ValueError(f"{where}.sha256 = {value['sha256']!r} is not 64 lower-case hex digits")
    if type(value["bytes"]) is not int or value["bytes"] < 0:
        raise ValueError(f"{where}.bytes = {value['bytes']!r} is not a number of bytes")
    name = "path" if "path" in value else "name"
    if not isinstance(value[name], str) or value[name].rpartition("/")[2] in ("", ".", ".."):
        raise ValueError(f"{where}.{name} = {value[name]!r} is no file name")
    return dict(value)


def is_inside(path: str) -> bool:
    """Whether a path, as an archive, a URL or a lock file spells it, stays inside its folder."""
    absolute = path.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", path)
    return (
        bool(path) and not absolute and "\0" not in path and (".." not in re.split(r"[/\\]", path))
    )


def is_current(entry: Entry, source: Mapping[str, Any]) -> bool:
    """Whether an entry was made from these source settings; a setting that is null may be absent."""
    return _set(entry.source) == _set(source)


def changes(entry: Entry, source: Mapping[str, Any]) -> str:
    """The source settings that differ from those an entry was made from, for people."""
    old, new = _set(entry.source), _set(source)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys)


def _set(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if value is not None}


def drift(old: Entry, new: Entry) -> list[str]:
    """What differs between two locks of one source, a line a file, for people."""
    before, after = (
        {f.path: f for f in entry.files}
        | ({entry.archive.name: entry.archive} if entry.archive else {})
        for entry in (old, new)
    )
    lines = []
    for path in sorted(before.keys() | after.keys()):
        was, now = (
            f"sha256 {pin.sha256}, {pin.bytes:,} bytes" if pin else "no such file"
            for pin in (before.get(path), after.get(path))
        )
        if was != now:
            lines.append(f"{path}\n    locked: {was}\n    found:  {now}")
    return lines


def put(path: str | Path, entries: Mapping[str, Entry], table: str = "corpora") -> None:
    """Merge entries into a table of a lock file, atomically; all other entries stay as they are."""
    path = Path(path)
    with _alone(path.absolute().parent):
        tables = _tables(path)
        tables[table] |= entries
        tree: dict[str, Any] = {"format": FORMAT}
        for name, known in tables.items():
            if known or name == "corpora":
                tree[name] = {key: entry.as_json() for key, entry in known.items()}
        text = json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False)
        write_text_atomically(path, text + "\n")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep two that are locked at once from losing each other's entry.

    The folder itself is locked, so that no second file lies about; where a filesystem cannot lock
    folders (some NFS), the two are merely unlikely to meet.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
