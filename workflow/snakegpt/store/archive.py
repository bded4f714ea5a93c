"""One file with results and all they follow from, which another machine's store takes in.

    python -m snakegpt.store export train_gpt2 gpt2.tar --without fetch_corpus,encode_tokens
    python -m snakegpt.store import gpt2.tar

A tar file: manifest.json, then action records, then objects, each in order and without times or
owners, so that equal stores export equal bytes. Afterwards `snakemake` finds there what it found here.

    manifest.json            {"format": 1, "actions": [[key, sha256 of the record's text], ...],
                              "objects": {sha256: bytes}}
    actions/cd/cd34....json  sources first
    objects/ab/ab12...       but for those of stages that were left out
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from snakegpt.artefacts import HashedFile
from snakegpt.durable import write_atomically
from snakegpt.errors import UserError
from snakegpt.progress import Progress, quantity, say
from snakegpt.store.arrivals import SHA256, Unfit, check_listings, listings, record_from
from snakegpt.store.command import (
    add_settings,
    add_without,
    chain_behind,
    pipeline_of,
    store_of,
)
from snakegpt.store.objects import Store

FORMAT = 1
CHUNK_BYTES = 1 << 20
TEXT_BYTES = 1 << 28  # a manifest or a record, which are read whole, is never larger


# ---- writing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Contents:
    """What an archive says of itself first.

    actions  key -> sha256 of its record's text, sources first
    objects  sha256 -> bytes
    """

    actions: dict[str, str]
    objects: dict[str, int]

    @property
    def n_bytes(self) -> int:
        return sum(self.objects.values())

    def as_json(self) -> bytes:
        actions = list(self.actions.items())
        value = {"format": FORMAT, "actions": actions, "objects": self.objects}
        return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def export(
    store: Store, records: Iterable[dict[str, Any]], without: Iterable[str], file: Path
) -> _Contents:
    """Write records and the objects they name to a new archive.

    without  stages whose objects are left out
    raises   UserError if an object is damaged or gone, or the file cannot be written
    """
    records = list(records)
    objects: dict[str, int] = {}
    for record in records:
        if record["stage"] not in without:
            try:
                objects.update(store.objects_of(record["outputs"]))
            except FileNotFoundError as error:
                raise _not_whole(record, str(error)) from None
        diff = record["provenance"].get("diff")
        if diff and store.holds(diff["sha256"], diff["bytes"]):
            objects[diff["sha256"]] = diff["bytes"]
    texts = {r["key"]: store.action_path(r["key"]).read_bytes() for r in records}
    actions = {key: hashlib.sha256(text).hexdigest() for key, text in texts.items()}
    contents = _Contents(actions, dict(sorted(objects.items())))
    progress = Progress(f"export {file.name}", contents.n_bytes, "bytes")

    def write(aside: Path) -> None:
        with tarfile.open(aside, "w", format=tarfile.PAX_FORMAT) as tar:
            _add_text(tar, "manifest.json", contents.as_json())
            for key, text in texts.items():
                _add_text(tar, _action_name(key), text)
            done = 0
            for sha256, n_bytes in contents.objects.items():
                _add_object(tar, store, records, sha256, n_bytes)
                done += n_bytes
                progress.update(done)

    try:
        write_atomically(file, write)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}.") from None
    return contents


def _add_object(
    tar: tarfile.TarFile, store: Store, records: list[dict[str, Any]], sha256: str, n_bytes: int
) -> None:
    found = None
    try:
        with store.object_path(sha256).open("rb") as stream:
            source = _Hashing(stream)
            _add(tar, _object_name(sha256), source, n_bytes)
            found = source.sha256
    except OSError as error:
        # Gone, or shorter than it was: of that tarfile makes an error without a number.
        if error.errno and not isinstance(error, FileNotFoundError):
            raise
    if found != sha256:
        maker = next(r for r in records if _names(store, r, sha256))
        raise _not_whole(maker, f"object {sha256} is damaged or gone")


def _add(tar: tarfile.TarFile, name: str, stream: IO[bytes] | _Hashing, n_bytes: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = n_bytes, 0o444
    tar.addfile(member, stream)


def _add_text(tar: tarfile.TarFile, name: str, text: bytes) -> None:
    _add(tar, name, io.BytesIO(text), len(text))


class _Hashing:
    """A stream that knows the sha256 of what was read of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._digest = stream, hashlib.sha256()

    def read(self, n_bytes: int = -1) -> bytes:
        chunk = self._stream.read(n_bytes)
        self._digest.update(chunk)
        return chunk

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _names(store: Store, record: dict[str, Any], sha256: str) -> bool:
    diff = record["provenance"].get("diff", {})
    named = {found for found, _ in store.objects_of(record["outputs"])} | {diff.get("sha256")}
    return sha256 in named


def _not_whole(record: dict[str, Any], reason: str) -> UserError:
    return UserError(
        f"{record['stage']} {record['name']} cannot be exported: {reason}.\n"
        f"  leave its objects out with --without {record['stage']}, or run snakemake, which"
        " rebuilds what is damaged"
    )


# ---- reading -----------------------------------------------------------------------------------


def take_in(store: Store, file: Path) -> list[dict[str, Any]]:
    """Take an archive's objects and records into a store; the records once all else is verified.

    returns  the records, sources first
    raises   UserError if the archive is damaged, truncated or no archive of ours; the store then has
             no record of it, and of its objects those that were read whole
    """
    aside = store.root / "tmp" / f"import-{uuid.uuid4().hex}"
    aside.mkdir(parents=True)
    try:
        with file.open("rb") as stream:
            records = _take_objects(store, file, stream, aside)
        for record in records:
            outputs = record["outputs"]
            if all(store.holds(*listing) for listing in listings(outputs)):  # were not left out
                check_listings(store, outputs)
    except FileNotFoundError:
        raise UserError(f"there is no file {file}.") from None
    except (Unfit, tarfile.TarError) as error:
        raise UserError(
            f"{file} is damaged or no archive of this project: {error}.\n"
            "  copy it again, or export it again; nothing of it is in use"
        ) from None
    except OSError as error:
        raise UserError(
            f"{file} cannot be taken into the store {store.root}: {error.strerror or error}."
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for record in records:
        if store.look_up(record["key"]) is None:  # what is whole here stays
            store.record(record["key"], record)
    return records


def _take_objects(store: Store, file: Path, stream: IO[bytes], aside: Path) -> list[dict[str, Any]]:
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        members = _members(tar)
        first = next(members, None)
        if first is None or first.name != "manifest.json":
            raise Unfit("it does not begin with manifest.json")
        contents = _contents(_text(tar, first))
        free = shutil.disk_usage(store.root).free
        if contents.n_bytes > free:
            raise UserError(
                f"{file} holds {quantity(contents.n_bytes, 'B')} of objects; {quantity(free, 'B')}"
                f" are free in {store.root}.\n  make room there, or move the store: store.path"
            )
        progress, done = Progress(f"import {file.name}", contents.n_bytes, "bytes"), 0
        records, waiting = {}, dict(contents.objects)
        for member in members:
            folder, name = member.name.split("/", 1)[0], member.name.rsplit("/", 1)[-1]
            key = name.removesuffix(".json")
            if folder == "actions" and member.name == _action_name(key):
                if key in records or key not in contents.actions:
                    raise Unfit(f"its manifest does not name {member.name}, or names it once")
                text = _text(tar, member)
                if hashlib.sha256(text).hexdigest() != contents.actions[key]:
                    raise Unfit(f"{member.name} is not the one of its manifest")
                records[key] = record_from(text, key)
            elif folder == "objects" and member.name == _object_name(name):
                if waiting.pop(name, None) != member.size:
                    raise Unfit(f"its manifest does not name {member.name}, or with other bytes")
                _take_object(store, tar, member, aside / name)
                done += member.size
                progress.update(done)
            else:
                raise Unfit(f"{member.name!r} has no place in it")
    missing = [key for key in contents.actions if key not in records] + list(waiting)
    if missing:
        raise Unfit(f"it ends early: {len(missing):,} records and objects are missing")
    return [records[key] for key in contents.actions]


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Plain files with the names of a store; nothing else is even looked at."""
    for member in tar:
        is_plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
        if not is_plain:
            raise Unfit(f"{member.name!r} is no plain file")
        yield member


def _contents(text: bytes) -> _Contents:
    try:
        value = json.loads(text)
        if value["format"] != FORMAT:
            raise Unfit(f"its format is {value['format']!r}, this version reads {FORMAT}")
        actions, objects = dict(value["actions"]), dict(value["objects"])
        names = (*actions, *actions.values(), *objects)
        is_sound = all(SHA256.fullmatch(name) for name in names) and all(
            isinstance(n_bytes, int) and n_bytes >= 0 for n_bytes in objects.values()
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        is_sound = False
    if not is_sound:
        raise Unfit("its manifest.json is damaged")
    return _Contents(actions, objects)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > TEXT_BYTES:
        raise Unfit(f"{member.name} has {member.size:,} bytes")
    stream = tar.extractfile(member)
    assert stream
    return stream.read()


def _take_object(store: Store, tar: tarfile.TarFile, member: tarfile.TarInfo, aside: Path) -> None:
    sha256 = aside.name
    stream = tar.extractfile(member)
    assert stream
    with HashedFile(aside) as file:
        while chunk := stream.read(CHUNK_BYTES):
            file.write(chunk)
    if (file.sha256, file.n_bytes) != (sha256, member.size):
        raise Unfit(f"object {sha256} has other bytes, of sha256 {file.sha256}")
    store.take_in(aside, sha256, member.size)


def _object_name(sha256: str) -> str:
    return f"objects/{sha256[:2]}/{sha256}"


def _action_name(key: str) -> str:
    return f"actions/{key[:2]}/{key}.json"


# ---- by hand -----------------------------------------------------------------------------------


def add(commands: Any) -> None:
    """The commands `export` and `import`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export", help="write results, and what they follow from, to one file"
    )
    parser.add_argument("target", nargs="+", help="files below results/ or train_gpt2, ...")
    parser.add_argument("file", type=Path, help="the archive, .tar")
    add_without(parser)
    add_settings(parser)
    parser.set_defaults(run=_export)
    parser = commands.add_parser("import", help="take in what another store has exported")
    parser.add_argument("file", type=Path, help="the archive, .tar")
    add_settings(parser)
    parser.set_defaults(run=_import)


def _export(args: argparse.Namespace) -> None:
    pipeline = pipeline_of(args)
    store = store_of(pipeline)
    records = chain_behind(store, pipeline, args.target)
    contents = export(store, records, args.without, args.file)
    say(
        f"{args.file}: {len(contents.actions):,} actions, {len(contents.objects):,} objects,"
        f" {quantity(contents.n_bytes, 'B')}"
    )


def _import(args: argparse.Namespace) -> None:
    store = store_of(pipeline_of(args))
    store.make()
    for record in take_in(store, args.file):
        whole = "is here" if store.look_up(record["key"]) else "is known, without its objects"
        say(f"{record['stage']} {record['name']}  {whole}  ({record['key'][:12]})")
