"""Readable names: what results/ shows of the store, each artefact beside a pointer to its action.

    results/models/gpt2/weights.safetensors              -> ../../../store/objects/ab/ab12...
    results/.actions/models/gpt2/weights.safetensors.json -> the record of the action that made it

Symbolic links, unless the setting store.link or the filesystem wants hard links, reflinks or copies;
pages for browsers are copies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from snakegpt.artefacts import Note
from snakegpt.errors import UserError
from snakegpt.identity import file_digest
from snakegpt.store.objects import Entry, LinkMode, Store, read_record

RESULTS = Path("results")
ACTIONS = ".actions"  # below results/


def pointer(path: Path, results: Path = RESULTS) -> Path:
    """Where the link to the action record of an artefact stands."""
    relative = path.relative_to(results)
    return results / ACTIONS / relative.parent / f"{relative.name}.json"


def maker(path: Path, results: Path = RESULTS) -> dict[str, Any] | None:
    """The record of the action that made a result, or None if none is known."""
    with contextlib.suppress(ValueError):  # not below results/
        path = path.relative_to(results)
        # A file of a published folder has its folder's pointer.
        for artefact in (path, *path.parents[:-1]):
            record = read_record(pointer(results / artefact, results))
            if record:
                return record
    return None


def digest_of(store: Store, path: Path, results: Path = RESULTS) -> str:
    """sha256 of a file, without reading it where it is what the store put there.

    raises   FileNotFoundError
    """
    target = Path(os.path.realpath(path))
    if target == Path(os.path.realpath(store.object_path(target.name))):
        return target.name
    with contextlib.suppress(ValueError, OSError):
        note = Note(*json.loads(_stamp(path, results).read_text(encoding="utf-8")))
        if note.fits(path):
            return note.sha256
    return file_digest(path)


def link(store: Store, record: Mapping[str, Any], folder: Path, results: Path = RESULTS) -> None:
    """Make `folder` show exactly what an action published, among the results of other actions.

    Links are always renewed, so that Snakemake sees an output that is younger than its inputs.

    raises   UserError if a folder stands where a file is to be, or the other way round
    """
    outputs = record["outputs"]
    before = next((r for name in outputs if (r := maker(folder / name, results))), None)
    for name in set(before["outputs"] if before else ()) - set(outputs):
        _remove(folder / name)
        pointer(folder / name, results).unlink(missing_ok=True)
    try:
        for name, output in outputs.items():
            if "folder" in output:
                listing = {entry.path: entry for entry in store.listing(output["sha256"])}
                for stray in _files(folder / name):
                    if stray.relative_to(folder / name).as_posix() not in listing:
                        stray.unlink()
        for entry in store.entries(outputs):
            _show(store, entry, folder / entry.path, results)
        for name in outputs:
            _point(pointer(folder / name, results), store.action_path(record["key"]), results)
    except (IsADirectoryError, NotADirectoryError) as error:
        raise UserError(
            f"{error.filename2 or error.filename} cannot be made: {error.strerror}.\n"
            "  move away what stands there; results/ is for the pipeline to write"
        ) from None
    register(store, results)


# ---- ways to show an object --------------------------------------------------------------------


def _show(store: Store, entry: Entry, path: Path, results: Path) -> None:
    target = store.object_path(entry.sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(results)
    ways = _WAYS[store.link_mode]
    if store.link_mode == "auto" and path.suffix == ".html":
        # Browsers follow symbolic links, and show what has no .html in its name as source.
        ways = [_reflink, _copy]
    for way in ways:
        try:
            way(target, path, aside, entry.mode)
        except OSError:
            aside.unlink(missing_ok=True)
            if way is ways[-1]:
                raise
            continue
        os.replace(aside, path)
        aside.unlink(
            missing_ok=True
        )  # renaming one hard link onto another of the same file does nothing
        stamp = _stamp(path, results)
        if path.is_symlink():
            stamp.unlink(missing_ok=True)
        else:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            found = path.stat()
            fields = [entry.sha256, found.st_size, found.st_mtime_ns, found.st_ino]
            stamp.write_text(json.dumps(fields), encoding="utf-8")
        return


def _aside(results: Path) -> Path:
    """Where this process makes links before it gives them their names; a kill leaves one at most."""
    folder = results / ACTIONS
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{socket.gethostname()}.{os.getpid()}"
    aside.unlink(missing_ok=True)
    return aside


def _symlink(target: Path, path: Path, aside: Path, _mode: int) -> None:
    aside.symlink_to(os.path.relpath(os.path.realpath(target), os.path.realpath(path.parent)))


def _hardlink(target: Path, _path: Path, aside: Path, _mode: int) -> None:
    os.link(target, aside)
    os.utime(aside)  # of the object as well: a hard link has no time of its own


def _reflink(target: Path, _path: Path, aside: Path, mode: int) -> None:
    with target.open("rb") as source, aside.open("wb") as sink:
        fcntl.ioctl(sink, 0x40049409, source.fileno())  # FICLONE of linux/fs.h: shares the blocks
    aside.chmod(mode | 0o200)


def _copy(target: Path, _path: Path, aside: Path, mode: int) -> None:
    shutil.copyfile(target, aside)
    aside.chmod(mode | 0o200)  # what is written to a copy or a reflink never reaches the object


_WAYS: dict[LinkMode, list[Callable[[Path, Path, Path, int], None]]] = {
    "auto": [_symlink, _hardlink, _reflink, _copy],
    "symlink": [_symlink],
    "hardlink": [_hardlink],
    "reflink": [_reflink],
    "copy": [_copy],
}


def _stamp(path: Path, results: Path) -> Path:
    """Where the digest of a result that is no symbolic link is kept, with the stat fields it is true for."""
    relative = path.relative_to(results)
    return results / ACTIONS / relative.parent / f"{relative.name}.digest"


def _point(path: Path, target: Path, results: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(results)
    _symlink(target, path, aside, 0)
    os.replace(aside, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _dangling(folder: str) -> Iterator[str]:
    """Symbolic links to nothing below a folder, pointers left out; quick with many thousand links."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                if not os.path.exists(entry.path):
                    yield entry.path
            elif entry.is_dir() and entry.name != ACTIONS:
                yield from _dangling(entry.path)


# ---- which results use a store -----------------------------------------------------------------


def register(store: Store, results: Path = RESULTS) -> None:
    """Let the store know these results, so that `gc` keeps what they show."""
    absolute = os.path.realpath(results)
    root = store.root / "roots" / hashlib.sha256(absolute.encode()).hexdigest()[:16]
    if not root.is_symlink():
        with contextlib.suppress(OSError):  # a store that can only be read is kept by its owner
            root.symlink_to(absolute)


def roots(store: Store) -> Iterator[Path]:
    """The results/ folders that use a store and still exist."""
    for root in sorted((store.root / "roots").glob("*")):
        if root.is_dir():
            yield Path(os.path.realpath(root))


def pointers(results: Path) -> Iterator[tuple[Path, Path]]:
    """(result, record it points to) of every artefact below a results/ folder."""
    for path in sorted((results / ACTIONS).rglob("*.json")):
        relative = path.relative_to(results / ACTIONS)
        yield results / relative.with_name(relative.name.removesuffix(".json")), path


def mend(store: Store, results: Path = RESULTS) -> int:
    """Remove links whose objects are gone; the run that follows restores or rebuilds them.

    returns  how many
    raises   UserError if there is no store at all where they point: it was moved perhaps, and
             rebuilding everything is not what anybody wants
    """
    broken = [Path(path) for path in _dangling(str(results))]
    if broken and not (store.root / "objects").is_dir():
        raise UserError(
            f"{len(broken):,} results point into a store that is gone; {store.root} is none.\n"
            "  if it was moved: set store.path in config.yaml, or SNAKEGPT_STORE, to where it is now\n"
            f"  if it is lost:   rm -r {results} and run again, which rebuilds everything"
        )
    for path in broken:
        path.unlink()
    return len(broken)
