"""Declare a present result valid under the settings and the code of now, without running its stage.

    python -m snakegpt.store adopt train_gpt2 --reason "renamed a function, nothing else"
    python -m snakegpt.store adopt results/tokens/shakespeare-gpt2/part_*.json --reason "..." --yes

For what cannot change a byte although its key says it might: a refactoring, a constant written in
another way. The record says who adopted what, when and why; `why`, `show` and the report repeat it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snakegpt.errors import UserError
from snakegpt.identity import code_of, file_digest
from snakegpt.progress import say
from snakegpt.store import differences, provenance
from snakegpt.store.command import add_settings, pipeline_of, print_json, requested, store_of
from snakegpt.store.explain import Explainer, Verdict
from snakegpt.store.links import digest_of, link, maker
from snakegpt.store.objects import Store
from snakegpt.store.why import adoption_line, history

Record = dict[str, Any]


def add(commands: Any) -> None:
    """The command `adopt`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "adopt", help="declare a present result valid under the settings and code of now"
    )
    parser.add_argument(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="a file below results/ or a target such as train_gpt2",
    )
    parser.add_argument("--reason", required=True, help="why its bytes would come out the same")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print the new records as JSON")
    add_settings(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    pipeline = pipeline_of(args)
    store = store_of(pipeline)
    if not args.reason.strip():
        raise UserError("--reason is empty: say why the bytes would come out the same.")
    asked = [requested(pipeline, target) for target in args.targets]
    wanted = {(request.stage, request.name) for request in asked}
    explainer = Explainer(store, pipeline, args.configfile)
    # What comes first is adopted first: then the inputs of the next are settled.
    order = [v.request for request in asked for v in explainer.of(request).chain()]
    records = []
    for request in {(r.stage, r.name): r for r in order if (r.stage, r.name) in wanted}.values():
        verdict = Explainer(store, pipeline, args.configfile).of(request)
        record = adopted(store, verdict, args.reason.strip())
        for line in proposal(verdict):
            say(line)
        if not args.yes and not _agreed():
            raise UserError("nothing is adopted without a yes.")
        publish(store, verdict, record)
        say(f"{verdict.label}  {adoption_line(record['adopted'])}")
        records.append(record)
    if args.json:
        print_json(records)


def proposal(verdict: Verdict) -> list[str]:
    """What somebody who adopts a result vouches for."""
    return [
        f"{verdict.label}: these differences change no byte of its result:",
        *(f"  {line}" for line in verdict.reasons()),
        *history(verdict),
    ]


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to ask on: say --yes if you are sure.")
    print("Adopt it? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def adopted(store: Store, verdict: Verdict, reason: str) -> Record:
    """The record that makes a present result the one that the settings ask for now.

    raises   UserError if there is no result, nothing differs, an input is not settled, or the result
             is not what its action made
    """
    request, old = verdict.request, verdict.record
    if old is None:
        raise UserError(
            f"{verdict.label} has no result to adopt: {'; '.join(verdict.notes)}.\n"
            f"  make it: snakemake --cores all {request.outputs[0]}"
        )
    if verdict.status == "up to date":
        raise UserError(
            f"{verdict.label} is up to date: nothing differs, there is nothing to adopt."
        )
    if verdict.key is None or any(not Path(path).exists() for path in _inputs(verdict)):
        waits = [f"{role}, made anew by {label}" for role, label in verdict.awaited.items()]
        waits = waits or [path for path in _inputs(verdict) if not Path(path).exists()]
        raise UserError(
            f"the inputs of {verdict.label} are not settled: {'; '.join(waits)}.\n"
            "  make them with snakemake, or adopt them first"
        )
    for path in _inputs(verdict):
        foreseen = _foreseen(verdict, path)
        if foreseen and digest_of(store, Path(path)) != foreseen:
            raise UserError(
                f"{path} is not what {verdict.label} would read: the store has another for these settings.\n"
                f"  bring it there first: snakemake --cores all {path}"
            )
    take = f"take it: snakemake --cores all {request.outputs[0]}"
    if verdict.status == "look-up":
        raise UserError(
            f"{verdict.label} needs no adoption: the store has what its settings ask for.\n  {take}"
        )
    _require_whole(store, verdict, old)
    if old["key"] == verdict.key:  # nothing differs, yet a look-up fails: `why` says what is lost
        raise UserError(f"{verdict.label} cannot be adopted: {'; '.join(verdict.notes)}.\n  {take}")
    hashed = [Path(path) for paths in request.inputs.values() for path in paths]
    return {
        **old,
        "key": verdict.key,
        "science": differences.plain(
            provenance.told(store, request.stage, request.settings, hashed)
        ),
        "code": code_of(request.stage),
        "inputs": {
            role: [_entry(path, digest_of(store, Path(path))) for path in paths]
            for role, paths in request.inputs.items()
        },
        "unhashed": {
            role: [_entry(path) for path in paths] for role, paths in request.unhashed.items()
        },
        "adopted": {"from": old["key"], **provenance.who_and_when(), "reason": reason},
    }


def publish(store: Store, verdict: Verdict, record: Record) -> None:
    """Write an adoption's record and let results/ point to it."""
    store.make()
    key = record["key"]
    with store.claim(key, lambda: say(f"{verdict.label}  waits for a run of it")) as lease:
        if store.look_up(key):
            raise UserError(f"{verdict.label} was made meanwhile: nothing is left to adopt.")
        lease.check()
        store.record(key, record)
    link(store, record, Path(verdict.request.folder))


def _inputs(verdict: Verdict) -> list[str]:
    return [path for paths in verdict.request.inputs.values() for path in paths]


def _foreseen(verdict: Verdict, path: str) -> str | None:
    return next((s.outputs[path] for s in verdict.upstream if path in s.outputs), None)


def _entry(path: str, sha256: str | None = None) -> dict[str, str]:
    made = maker(Path(path))
    found = {"path": path, "sha256": sha256, "action": made["key"] if made else None}
    return {name: value for name, value in found.items() if value}


def _require_whole(store: Store, verdict: Verdict, record: Mapping[str, Any]) -> None:
    """Every object must be what its name says, read to the last byte: somebody vouches for it.

    raises   UserError that names the first that is not
    """
    again = f"run it again: snakemake --cores all {verdict.request.outputs[0]}"
    try:
        objects = dict(store.objects_of(record["outputs"]))
    except FileNotFoundError:
        raise UserError(
            f"{verdict.label} cannot be adopted: a folder's list of files is gone or damaged.\n  {again}"
        ) from None
    for sha256, n_bytes in objects.items():
        path = store.object_path(sha256)
        if not path.exists() or path.stat().st_size != n_bytes or file_digest(path) != sha256:
            what = "damaged" if path.exists() else "gone"
            raise UserError(
                f"{verdict.label} cannot be adopted: its object {sha256[:12]} is {what}.\n  {again}"
            )
    for result, sha256 in verdict.outputs.items():
        there = Path(result).exists()
        if not there or digest_of(store, Path(result)) != sha256:
            what = "not what the action made" if there else "not there"
            raise UserError(f"{verdict.label} cannot be adopted: {result} is {what}.\n  {again}")
