"""What made a file, from what, where and with which code: its provenance up to the pinned corpus files.

python -m snakegpt.store show results/models/gpt2/weights.safetensors
python -m snakegpt.store show 3f6a91c0             an object's sha256, an action's key, or how one starts
python -m snakegpt.store show results/models/gpt2/weights.safetensors --diff | git apply
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snakegpt.errors import UserError
from snakegpt.identity import digest
from snakegpt.progress import duration, quantity
from snakegpt.store import provenance
from snakegpt.store.command import new_command, pipeline_of, print_json, print_lines, store_of
from snakegpt.store.links import RESULTS, digest_of, maker, pointers
from snakegpt.store.objects import Store, read_record
from snakegpt.store.why import adoption_line, when

SHORTEST_PREFIX = 6  # hex digits
FILES_SHOWN = 10  # of a corpus


@dataclass(frozen=True)
class Found:
    """What somebody asked about.

    what     in words, as "results/models/gpt2/weights.safetensors"
    sha256   of the object, None where an action is meant
    record   of the action that made it, or that is meant; None if none is known
    remarks  what is not as it should be
    """

    what: str
    sha256: str | None
    record: dict[str, Any] | None
    remarks: tuple[str, ...] = ()


def add(commands: Any) -> None:
    """The command `show`."""
    parser = new_command(
        commands, "show", _run, "what made a file, from what, where and with which code"
    )
    parser.add_argument(
        "thing",
        help="a file below results/, an object's sha256 or an action's key (6 digits or more)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON: every record, sources first"
    )
    parser.add_argument(
        "--diff", action="store_true", help="print what was not committed when it was made"
    )


def _run(args: argparse.Namespace) -> None:
    store = store_of(pipeline_of(args))
    found = find(store, args.thing)
    if args.diff:
        sys.stdout.buffer.write(uncommitted(store, found))
    elif args.json:
        print_json(as_json(store, found))
    else:
        print_lines(lines(store, found))


# ---- finding -----------------------------------------------------------------------------------


def find(store: Store, thing: str) -> Found:
    """What a path, a digest or a key, or the start of one, stands for.

    raises   UserError if it is nothing that the store knows, or more than one thing
    """
    path = Path(os.path.relpath(thing))
    if os.path.lexists(path) or RESULTS in path.parents:
        return _file(store, path)
    if not re.fullmatch(r"[0-9a-f]+", thing):
        raise UserError(
            f"'{thing}' is neither a file nor a digest.\n"
            "  name a file below results/, an object's sha256 or an action's key"
        )
    if len(thing) < SHORTEST_PREFIX:
        raise UserError(
            f"'{thing}' is too short to name one thing: {SHORTEST_PREFIX} digits at least."
        )
    keys = [path.stem for path in _starting(store.action_path(thing).parent, thing)]
    objects = [path.name for path in _starting(store.object_path(thing).parent, thing)]
    matches = [f"action {key}" for key in keys] + [f"object {sha256}" for sha256 in objects]
    if not matches:
        raise UserError(f"the store {store.root} has no object and no action {thing}.")
    if len(matches) > 1:
        told = "".join(f"\n  {match}" for match in matches[:10])
        raise UserError(f"{thing} names {len(matches):,} things; give more digits:{told}")
    if keys:
        record = store.record_of(keys[0])
        remarks = () if record else ("its record is damaged",)
        return Found(f"action {keys[0]}", None, record, remarks)
    return _object(store, objects[0])


def _starting(folder: Path, start: str) -> list[Path]:
    return sorted(folder.glob(f"{start}*"))


def _file(store: Store, path: Path) -> Found:
    resolved = Path(os.path.realpath(path))
    if RESULTS not in path.parents:
        for folder, known in (("actions", resolved.stem), ("objects", resolved.name)):
            if Path(os.path.realpath(store.root / folder)) in resolved.parents:
                return find(store, known)
    record = maker(path)
    try:
        sha256 = digest_of(store, path)
    except FileNotFoundError:
        sha256 = None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a file in it.") from None
    if record is None:
        # A copy that somebody made: its bytes say what it is.
        if sha256 and store.object_path(sha256).exists():
            found = _object(store, sha256)
            return Found(str(path), sha256, found.record, (f"a copy of {found.what}",))
        raise UserError(f"nothing in the store {store.root} made {path}.")
    made = {entry.path: entry for entry in _entries(store, record)}
    names = [name for name in made if path == Path(name) or path.as_posix().endswith(f"/{name}")]
    wanted = made[max(names, key=len)].sha256 if names else None
    if sha256 is None:
        return Found(
            str(path), wanted, record, ("the file is gone; the same command makes it again",)
        )
    if wanted and sha256 != wanted:
        remark = f"the file is not what the action made: its sha256 is {sha256}"
        return Found(str(path), wanted, record, (remark,))
    return Found(str(path), sha256, record)


def _object(store: Store, sha256: str) -> Found:
    """An object, and an action that made it: one that results/ shows, before any other."""
    stored = sorted((store.root / "actions").glob("*/*.json"))
    shown = list(dict.fromkeys(Path(os.path.realpath(path)) for _, path in pointers(RESULTS)))
    # Records name their objects in plain text; only those of folders name lists of them.
    for word in (sha256, '"folder"'):
        for path in itertools.chain(shown, stored):
            with contextlib.suppress(FileNotFoundError):
                record = read_record(path) if word.encode() in path.read_bytes() else None
                what = _role(store, record, sha256) if record else None
                if what:
                    return Found(what, sha256, record)
    return Found(f"object {sha256}", sha256, None, ("no action in the store names it",))


def _role(store: Store, record: Mapping[str, Any], sha256: str) -> str | None:
    """What an object is to an action that left it; None if it only read it, or knows nothing of it."""
    for entry in _entries(store, record):
        if entry.sha256 == sha256:
            return f"{entry.path} of {_label(record)}"
    for name, output in record["outputs"].items():
        if output["sha256"] == sha256:
            return f"the list of files in {name} of {_label(record)}"
    if record["provenance"].get("diff", {}).get("sha256") == sha256:
        return f"what was not committed when {_label(record)} ran"
    return None


def _entries(store: Store, record: Mapping[str, Any]) -> list[Any]:
    try:
        return list(store.entries(record["outputs"]))
    except FileNotFoundError:  # a folder's listing is gone; the files beside it are known
        files = {name: o for name, o in record["outputs"].items() if "folder" not in o}
        return list(store.entries(files))


# ---- telling -----------------------------------------------------------------------------------


def uncommitted(store: Store, found: Found) -> bytes:
    """What was not in the commit when an action ran, as `git apply` takes it.

    raises   UserError if there was nothing, or it is not known
    """
    made = found.record["provenance"] if found.record else {}
    diff = made.get("diff")
    if not diff:
        known = "everything was committed" if made.get("git_commit") else "no commit is known"
        raise UserError(f"{found.what} has no difference to show: {known}.")
    try:
        return store.object_path(diff["sha256"]).read_bytes()
    except FileNotFoundError:
        raise UserError(f"the object {diff['sha256']} with the difference is gone.") from None


def as_json(store: Store, found: Found) -> dict[str, Any]:
    """For programs: the thing, and the records of all actions behind it, sources first."""
    chain = provenance.chain_of(store, [found.record])
    actions = [{**record, "code_digest": digest(record["code"])} for record in chain]
    return {
        "what": found.what,
        "sha256": found.sha256,
        "action": found.record["key"] if found.record else None,
        "remarks": list(found.remarks),
        "actions": actions,
    }


def lines(store: Store, found: Found) -> list[str]:
    """The provenance for a terminal: the thing, what made it, and all that lies behind it."""
    told = [found.what, *(f"  {remark}" for remark in found.remarks)]
    if found.sha256:
        path = store.object_path(found.sha256)
        size = quantity(path.stat().st_size, "B") if path.exists() else "gone from the store"
        told.append(f"  sha256    {found.sha256}  ({size})")
    if found.record is None:
        return told
    chain = provenance.chain_of(store, [found.record])
    told += ["", *_action(store, found.record, None)]
    before = found.record
    for group in _alike(chain[:-1][::-1]):
        told += ["", *_action(store, group[0], before, len(group))]
        before = group[0]
    return told


def _alike(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The parts of one corpus together: there may be a thousand."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["stage"], record["name"].partition("/")[0]), []).append(record)
    return list(groups.values())


def _label(record: Mapping[str, Any]) -> str:
    return f"{record['stage']} {record['name']}"


def _action(
    store: Store, record: Mapping[str, Any], before: Mapping[str, Any] | None, n_alike: int = 1
) -> list[str]:
    """One action. What it shares with the one told before it, its commit and versions, is left out."""
    made = record["provenance"]
    title = f"{_label(record)}  {record['key'][:12]}"
    if n_alike > 1:
        name = record["name"].partition("/")[0]
        title = f"{record['stage']} {name} ({n_alike:,} parts), one of them {record['key'][:12]}"
    rows = [("made", f"{when(made['finished'])} by {made.get('user', 'unknown')} on {made['host']},"
                     f" in {duration(made['wall_s'])}")]  # fmt: skip
    if "adopted" in record:
        rows.append(("adopted", adoption_line(record["adopted"]).removeprefix("adopted ")))
    rows += [("settings" if i == 0 else "", row) for i, row in enumerate(_settings(record))]
    code = record["code"]
    modules = ", ".join(name.removeprefix("snakegpt.") for name in code["modules"])
    rows.append(
        ("code", f"{digest(code)[:12]}, REVISION {code['revision']}: {modules or 'its own'}")
    )
    rows += [row for row in _surroundings(made) if before is None or row not in _surroundings(before["provenance"])]  # fmt: skip
    for role, entries in record["inputs"].items():
        shown = f"{entries[0]['path']}  {entries[0]['sha256'][:12]}" if entries else "none"
        if len(entries) > 1:
            shown = f"{len(entries):,} files, {shown} first"
        rows.append(("from", f"{role}: {shown}"))
        rows += [
            ("", f"  made by an action that is no longer known ({entry['action'][:12]})")
            for entry in entries[:1]
            if entry.get("action") and provenance.made(store, entry) is None
        ]
    return [title, *(f"  {name:<9} {text}".rstrip() for name, text in rows), *_pins(record)]


def _surroundings(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    commit = made.get("git_commit") or "none: the code was in no repository"
    if made.get("dirty"):
        diff = made.get("diff", {}).get("sha256")
        commit += f" with uncommitted changes ({diff[:12]}; --diff prints them)" if diff else " and uncommitted changes"  # fmt: skip
    versions = (
        ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())
        or "unknown"
    )
    return [("commit", commit), ("versions", versions), ("platform", str(made.get("platform", "unknown")))]  # fmt: skip


def _settings(record: Mapping[str, Any]) -> list[str]:
    """Science settings, a line a block; pinned files have lines of their own."""
    found = []
    for name, value in record["science"].items():
        if name in ("files", "adopted"):  # told by the corpus and by the adopted action
            continue
        if isinstance(value, Mapping):
            told = ", ".join(f"{key} {_brief(item)}" for key, item in value.items())
            found.append(f"{name}: {told}")
        else:
            found.append(f"{name} {_brief(value)}")
    return found


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({', '.join(f'{key} {_brief(item)}' for key, item in value.items())})"
    text = "null" if value is None else str(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _pins(record: Mapping[str, Any]) -> list[str]:
    """The files that an action was told to fetch, each pinned by its sha256."""
    files = record["science"].get("files") or []
    if not files or record["stage"] not in ("fetch_corpus", "fetch_weights"):
        return []
    total = quantity(sum(file["bytes"] for file in files), "B")
    told = [f"  pinned    {len(files):,} files, {total}, by corpora.lock.json"]
    told += [
        f"            {file['sha256'][:12]}  {quantity(file['bytes'], 'B'):>7}  {file['path']}"
        for file in files[:FILES_SHOWN]
    ]
    if len(files) > FILES_SHOWN:
        told.append(f"            and {len(files) - FILES_SHOWN:,} more (--json has all)")
    return told
