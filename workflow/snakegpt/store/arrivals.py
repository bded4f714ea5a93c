"""What comes from another store, a remote one or an archive, is taken on nobody's word.

A record has to be the one that its key names, which is the digest of the identity it states; names
and paths have to stay below the folder they are shown in; objects get their names here only once
their bytes have been hashed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from snakegpt.identity import Action
from snakegpt.store.objects import Store

SHA256 = re.compile(r"[0-9a-f]{64}")


# What JSON of another shape than ours runs into.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class Unfit(Exception):
    """Something is not what its name says, or is not there; the message names it."""


def record_from(content: bytes, key: str) -> dict[str, Any]:
    """The action record in some bytes.

    raises   Unfit if it is not the record of `key`, or states what no stage publishes
    """
    try:
        record = json.loads(content)
        inputs = {
            role: [e["sha256"] for e in entries] for role, entries in record["inputs"].items()
        }
        action = Action(record["stage"], record["science"], record["code"], inputs)
        is_own = record["key"] == key == action.key
        outputs, provenance = record["outputs"], record["provenance"]
        is_sound = bool(outputs) and all(
            _is_name(name) and _is_object(output) for name, output in outputs.items()
        )
        is_sound = is_sound and ("diff" not in provenance or _is_object(provenance["diff"]))
    except _MALFORMED:
        raise Unfit(f"the record {key} is damaged") from None
    if not is_own:
        raise Unfit(f"the record {key} is another action's: its identity has another digest")
    if not is_sound:
        raise Unfit(f"the record {key} names outputs that no stage can have published")
    return dict(record)


def check_listings(store: Store, outputs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse folders whose listings, which the store has, lead out of the folder.

    raises   Unfit
    """
    for sha256, _ in listings(outputs):
        try:
            entries = store.listing(sha256)
            is_sound = all(
                _is_below(entry.path) and _is_size(entry.bytes) and SHA256.fullmatch(entry.sha256)
                for entry in entries
            )
        except _MALFORMED:
            is_sound = False
        if not is_sound:
            raise Unfit(f"object {sha256} is no listing of a folder")


def listings(outputs: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, int]]:
    """(sha256, bytes) of the objects that list folders: they name the others, so they come first."""
    return [(o["sha256"], o["bytes"]) for o in outputs.values() if "folder" in o]


def _is_object(value: Mapping[str, Any]) -> bool:
    return bool(SHA256.fullmatch(value["sha256"])) and _is_size(value["bytes"])


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _is_name(name: str) -> bool:
    return _is_below(name) and len(PurePosixPath(name).parts) == 1


def _is_below(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and path == "/".join(parts) and ".." not in parts and "\0" not in path
