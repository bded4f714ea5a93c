"""Readable names: relative links from results/ into the store, each beside a pointer to its action.

results/models/gpt2/weights.safetensors              -> ../../../store/objects/ab/ab12...
results/.actions/models/gpt2/weights.safetensors.json -> the record of the action that made it
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snakegpt.store.objects import Store, read_record

RESULTS = Path("results")


def pointer(path: Path, results: Path = RESULTS) -> Path:
    """Where the link to the action record of a result stands."""
    relative = path.relative_to(results)
    return results / ".actions" / relative.parent / f"{relative.name}.json"


def maker(path: Path, results: Path = RESULTS) -> dict[str, Any] | None:
    """The record of the action that made a result, or None if none is known."""
    try:
        return read_record(pointer(path, results))
    except ValueError:  # not below results/
        return None


def link(store: Store, record: Mapping[str, Any], folder: Path, results: Path = RESULTS) -> None:
    """Make `folder` show exactly what an action published, among the results of other actions.

    Links are always renewed, so that Snakemake sees an output that is younger than its inputs.
    """
    outputs = record["outputs"]
    before = next((r for name in outputs if (r := maker(folder / name, results))), None)
    for name in set(before["outputs"] if before else ()) - set(outputs):
        (folder / name).unlink(missing_ok=True)
        pointer(folder / name, results).unlink(missing_ok=True)
    for name, output in outputs.items():
        _point(pointer(folder / name, results), store.action_path(record["key"]))
        _point(folder / name, store.object_path(output["sha256"]))


def _point(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    aside = link.with_name(f".{link.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(os.path.realpath(target), os.path.realpath(link.parent)))
    os.replace(aside, link)
