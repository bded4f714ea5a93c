"""The remote store by hand: give results to it, or take what the settings ask for from it.

python -m snakegpt.store push train_gpt2
python -m snakegpt.store pull train_gpt2 --without fetch_corpus,encode_tokens
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snakegpt.errors import UserError
from snakegpt.identity import Action, code_of
from snakegpt.pipeline import Pipeline, Request
from snakegpt.progress import quantity, say
from snakegpt.store.arrivals import Unfit
from snakegpt.store.command import (
    add_settings,
    add_without,
    chain_behind,
    pipeline_of,
    requested,
    store_of,
)
from snakegpt.store.links import digest_of, link
from snakegpt.store.provenance import sources_of
from snakegpt.store.remote import Remote, RemoteError


def add(commands: Any) -> None:
    """The commands `push` and `pull`."""
    for name, run, text in (
        ("push", _push, "give results, and what they follow from, to the remote store"),
        ("pull", _pull, "take results, and what they follow from, from the remote store"),
    ):
        parser: argparse.ArgumentParser = commands.add_parser(name, help=text)
        parser.add_argument("target", nargs="+", help="files below results/ or train_gpt2, ...")
        add_without(parser)
        add_settings(parser)
        parser.set_defaults(run=run)


def _remote_of(pipeline: Pipeline) -> Remote:
    url = pipeline.settings.store.remote
    if url is None:
        raise UserError(
            "there is no remote store.\n  set store.remote in config.yaml, such as s3://bucket/team"
        )
    store = store_of(pipeline)
    store.make()
    remote = Remote(store, url)
    remote.turn_on()
    return remote


@contextlib.contextmanager
def _told_by_hand(remote: Remote) -> Iterator[None]:
    try:
        yield
    except (RemoteError, Unfit) as error:
        raise UserError(f"remote store {remote.url}: {error}.") from None


def _push(args: argparse.Namespace) -> None:
    pipeline = pipeline_of(args)
    remote = _remote_of(pipeline)
    for record in chain_behind(remote.store, pipeline, args.target):
        label = f"{record['stage']} {record['name']}"
        if record["stage"] in args.without:
            say(f"{label}  left out")
            continue
        with _told_by_hand(remote):
            fresh = remote.push(record, label)
        say(f"{label}  {'pushed' if fresh else 'is there'}  ({record['key'][:12]})")


def _pull(args: argparse.Namespace) -> None:
    pipeline = pipeline_of(args)
    remote = _remote_of(pipeline)
    with _told_by_hand(remote):
        wanted = _Wanted(remote, pipeline)
        for target in args.target:
            wanted.resolve(requested(pipeline, target))
        whole = {
            record["key"]
            for record in wanted.chain()
            if record["stage"] not in args.without and _bring(remote, record)
        }
    for request, record in wanted.found:
        if record["key"] in whole:
            link(remote.store, record, Path(request.folder))


def _bring(remote: Remote, record: dict[str, Any]) -> bool:
    label, key = f"{record['stage']} {record['name']}", record["key"]
    if remote.store.look_up(key):
        say(f"{label}  is here  ({key[:12]})")
        return True
    found = remote.pull(key, label)
    if found is None:
        say(f"{label}  is not in the remote store  ({key[:12]})")
        return False
    n_bytes = sum(o.get("folder", o)["bytes"] for o in found["outputs"].values())
    say(f"{label}  pulled, {quantity(n_bytes, 'B')}  ({key[:12]})")
    return True


class _Wanted:
    """The records that settings ask for, found by their keys from the sources down: no bytes needed."""

    def __init__(self, remote: Remote, pipeline: Pipeline) -> None:
        self.remote, self.pipeline = remote, pipeline
        self.found: list[tuple[Request, dict[str, Any]]] = []

    def resolve(self, request: Request) -> dict[str, Any]:
        """The record of a request, local or remote.

        raises   UserError if there is none
        """
        for known, record in self.found:
            if known == request:
                return record
        inputs = {
            role: [self._digest(path) for path in paths] for role, paths in request.inputs.items()
        }
        action = Action(request.stage, request.settings, code_of(request.stage), inputs)
        found = self._record(action.key)
        if found is None:
            raise UserError(
                f"{request.stage} {request.name} ({action.key[:12]}) is not in the remote store"
                f" {self.remote.url} under these settings.\n"
                f"  make it here: snakemake {request.outputs[0]}"
            )
        self.found.append((request, found))
        return found

    def chain(self) -> list[dict[str, Any]]:
        """The records found and those of everything they follow from, sources first."""
        ordered: dict[str, dict[str, Any]] = {}

        def visit(record: dict[str, Any] | None) -> None:
            if record and record["key"] not in ordered:
                for entry in sources_of(record):
                    visit(self._record(entry["action"]) if "action" in entry else None)
                ordered[record["key"]] = record

        for _, record in self.found:
            visit(record)
        return list(ordered.values())

    def _record(self, key: str) -> dict[str, Any] | None:
        return self.remote.store.record_of(key) or self.remote.record_of(key)

    def _digest(self, path: str) -> str:
        source = self.pipeline.find(path)
        if source is None:
            return digest_of(self.remote.store, Path(path))
        outputs = self.resolve(source)["outputs"]
        return str(outputs[os.path.relpath(path, source.folder)]["sha256"])
