"""Why a result would run again: field by field, the action that made it against the one wanted now."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snakegpt.identity import Action, code_of
from snakegpt.pipeline import Pipeline, Request
from snakegpt.store.command import add_settings, pipeline_of, requested, store_of
from snakegpt.store.links import digest_of, maker
from snakegpt.store.objects import Store


def add(commands: Any) -> None:
    """The command `why`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "why", help="what differs from the action that made a result"
    )
    parser.add_argument("target", help="a file below results/ or a target such as train_gpt2")
    add_settings(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    pipeline = pipeline_of(args)
    reason = why(store_of(pipeline), pipeline, requested(pipeline, args.target))
    first = reason.first()
    if first is not reason:
        print("\n".join(first.lines()))
        print("which everything below it follows from, down to")
    print("\n".join(reason.lines()))


@dataclass(frozen=True)
class Reason:
    """What differs between the action that made a result and the one its settings ask for now.

    status   present: nothing differs; found: it differs, but the store has what is wanted;
             runs: the stage would run; waits: an input is not there yet, see `upstream`
    changes  one line each: setting, code or input, old -> new
    """

    request: Request
    status: str
    key: str | None
    changes: list[str] = field(default_factory=list)
    upstream: list[Reason] = field(default_factory=list)

    def first(self) -> Reason:
        """The uppermost action that is not present: what everything below follows from."""
        for reason in self.upstream:
            found = reason.first()
            if found.status != "present":
                return found
        return self

    def lines(self) -> list[str]:
        """The explanation for a terminal."""
        verdict = {
            "present": "is up to date",
            "found": "differs from what its settings ask for, which the store has: a look-up brings it",
            "runs": "runs",
            "waits": "waits for its inputs",
        }[self.status]
        head = f"{self.request.stage} {self.request.name}: {verdict}"
        if self.key:
            head += f"  ({self.key[:12]})"
        return [head, *(f"  {change}" for change in self.changes)]


def why(store: Store, pipeline: Pipeline, request: Request) -> Reason:
    """Compare what is in results/ with what the settings ask for, from a request upward."""
    upstream = [why(store, pipeline, source) for source in sources(pipeline, request)]
    record = maker(Path(request.outputs[0]))
    try:
        inputs = {
            role: [digest_of(store, Path(path)) for path in paths]
            for role, paths in request.inputs.items()
        }
    except FileNotFoundError as error:
        changes = [] if record else ["nothing has made it yet"]
        return Reason(
            request, "waits", None, [*changes, f"input {error.filename} is not there"], upstream
        )
    action = Action(request.stage, request.settings, code_of(request.stage), inputs)
    whole = all(Path(output).exists() for output in request.outputs)
    if record and record["key"] == action.key and whole and store.look_up(action.key):
        return Reason(request, "present", action.key, upstream=upstream)
    status = "found" if store.look_up(action.key) else "runs"
    changes = differences(record, action, request) if record else ["nothing has made it yet"]
    if record and not changes:
        changes = [
            "the result is gone from results/" if not whole else "its objects are damaged or gone"
        ]
    return Reason(request, status, action.key, changes, upstream)


def sources(pipeline: Pipeline, request: Request) -> list[Request]:
    """The requests that make a request's input files."""
    found = {}
    for paths in (*request.inputs.values(), *request.unhashed.values()):
        for path in paths:
            source = pipeline.find(path)
            if source:
                found[(source.stage, source.name)] = source
    return list(found.values())


def differences(record: Mapping[str, Any], action: Action, request: Request) -> list[str]:
    """Every setting, piece of code and input in which an old action and a new one differ."""
    lines = [f"setting {line}" for line in _compare(record["science"], _plain(action.science))]
    lines += _code_differences(record["code"], action.code)
    for role, digests in action.inputs.items():
        before = record["inputs"].get(role, [])
        old = {entry["path"]: entry["sha256"] for entry in before}
        new = dict(zip(request.inputs[role], digests, strict=True))
        for path in sorted(old.keys() | new.keys()):
            if old.get(path) != new.get(path):
                lines.append(
                    f"input {role} {path}: {_short(old.get(path))} -> {_short(new.get(path))}"
                )
    lines += [
        f"input {role} is no longer read" for role in record["inputs"] if role not in action.inputs
    ]
    return lines


def _code_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    lines = []
    if old["revision"] != new["revision"]:
        lines.append(f"code REVISION: {old['revision']} -> {new['revision']}")
    for module in sorted(old["modules"].keys() | new["modules"].keys()):
        before, after = old["modules"].get(module), new["modules"].get(module)
        if before is None or after is None:
            lines.append(f"code {module}: {'added' if before is None else 'removed'}")
            continue
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                place = f"{module}.{name}" if name else f"{module}, outside functions and classes"
                what = (
                    "changed"
                    if name in before and name in after
                    else "added"
                    if name in after
                    else "removed"
                )
                lines.append(f"code {place}: {what}")
    return lines


def _compare(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            place = f"{where}.{key}" if where else str(key)
            lines += _compare(old.get(key, _ABSENT), new.get(key, _ABSENT), place)
        return lines
    if isinstance(old, Sequence) and isinstance(new, Sequence) and not isinstance(old, str):
        if len(old) == len(new):
            return [
                line
                for index, pair in enumerate(zip(old, new, strict=True))
                for line in _compare(*pair, f"{where}[{index}]")
            ]
        return [f"{where}: {len(old)} entries -> {len(new)} entries"]
    return [] if old == new else [f"{where}: {_text(old)} -> {_text(new)}"]


_ABSENT = object()


def _text(value: Any) -> str:
    if value is _ABSENT:
        return "(not set)"
    text = repr(value) if isinstance(value, str) else "null" if value is None else str(value)
    return text if len(text) <= 72 else f"{text[:69]}..."


def _short(sha256: str | None) -> str:
    return sha256[:12] if sha256 else "(none)"


def _plain(value: Any) -> Any:
    """As it reads back from JSON, so that a tuple equals the list it was recorded as."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
