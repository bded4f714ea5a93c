"""Names that keep results for good: pins/<name> holds the keys of the actions it keeps, one a line.

python -m snakegpt.store pin paper results/models/gpt2 results/evaluations/gpt2
python -m snakegpt.store unpin paper
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from snakegpt.durable import write_atomically
from snakegpt.errors import UserError, nearest
from snakegpt.store.command import add_settings, pipeline_of, print_json, store_of
from snakegpt.store.objects import Store
from snakegpt.store.reach import called


def add(commands: Any) -> None:
    """The commands `pin` and `unpin`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "pin", help="keep results from `gc` under a name; without one, list the names"
    )
    parser.add_argument("name", nargs="?", help="letters, digits, and . _ - between them")
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help="files or folders below results/, or keys"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    add_settings(parser)
    parser.set_defaults(run=_run_pin)
    parser = commands.add_parser("unpin", help="give a name up; `gc` may take what it kept")
    parser.add_argument("name")
    add_settings(parser)
    parser.set_defaults(run=_run_unpin)


def _run_pin(args: argparse.Namespace) -> None:
    store = store_of(pipeline_of(args))
    if args.name:
        if not args.targets:
            raise UserError(f"pin {args.name}: name what it keeps, such as results/models/gpt2")
        pin(store, args.name, args.targets)
    found = pins(store)
    if args.json:
        print_json(found)
        return
    for name, keys in found.items():
        if args.name in (None, name):
            print(f"{name}  {', '.join(key[:12] for key in keys)}")


def _run_unpin(args: argparse.Namespace) -> None:
    unpin(store_of(pipeline_of(args)), args.name)


def pin(store: Store, name: str, targets: list[str]) -> list[str]:
    """Keep the actions behind results, or with these keys, under a name.

    returns  their keys, sorted
    raises   UserError if the name is taken or a target is no action's
    """
    if not re.fullmatch(r"\w([\w.-]*\w)?", name):
        raise UserError(f"'{name}' is no name for a pin: letters, digits, and . _ - between them.")
    keys: set[str] = set()
    for target in targets:
        found, _ = called(store, target)
        gone = sorted(key for key in found if store.record_of(key) is None)
        if gone or not found:
            what = f"the record of {gone[0][:12]} is gone" if gone else "it is no action's result"
            raise UserError(f"'{target}' cannot be pinned: {what}.")
        keys |= found
    path = store.root / "pins" / name
    kept = pins(store).get(name)
    if kept is not None and set(kept) != keys:
        raise UserError(
            f"the name '{name}' keeps other results.\n"
            f"  choose another, or give it up first: python -m snakegpt.store unpin {name}"
        )
    path.parent.mkdir(exist_ok=True)
    text = "".join(f"{key}\n" for key in sorted(keys))
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    return sorted(keys)


def unpin(store: Store, name: str) -> None:
    """Give a name up.

    raises   UserError if there is no such name
    """
    known = pins(store)
    if name not in known:
        raise UserError(f"no pin is named '{name}'.{nearest(name, known)}")
    (store.root / "pins" / name).unlink()


def pins(store: Store) -> dict[str, list[str]]:
    """Name -> keys of the actions it keeps. A symbolic link to a record is a pin as well.

    raises   UserError if a pin is damaged: what it kept is not known
    """
    found = {}
    for path in sorted((store.root / "pins").glob("[!.]*")):
        keys = [_leads_to(path)] if path.is_symlink() else _lines(path)
        if not keys or not all(re.fullmatch("[0-9a-f]{64}", key) for key in keys):
            raise UserError(
                f"{path} is no pin: it must hold action keys, one a line.\n"
                "  write them there, or remove it if it is to keep nothing"
            )
        found[path.name] = keys
    return found


def _leads_to(path: Path) -> str:
    return os.path.basename(os.readlink(path)).removesuffix(".json")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []
