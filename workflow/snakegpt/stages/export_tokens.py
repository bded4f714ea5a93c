"""Write a token set in the layout that another trainer reads; no rule needs it, so it is run by hand.

Reads: manifest.json and the shards beside it. Writes, little-endian, one stream a split:

shards      train_000000.bin, ..., val_000000.bin, ...: the same layout as here and llm.c's, packed to
            --shard-tokens each but the last, and a manifest.json of them
nanogpt     train.bin, val.bin: uint16 ids and nothing else
megatron    train.bin, train.idx, val.bin, val.idx: Megatron-core's IndexedDataset, prefixes `train` and `val`
            .bin  uint16 ids, int32 where an id takes more
            .idx  "MMIDIDX\\0\\0", uint64 1, uint8 type of an id (8 uint16, 4 int32), uint64 n,
                  uint64 n + 1, int32 lengths[n] in tokens, int64 starts[n] in bytes, int64 0, 1, ... n
datatrove   train.ds, train.ds.index, train.ds.metadata, the same of val
            .ds        uint16 ids, uint32 where an id takes more
            .index     uint64 end of each document, in tokens
            .metadata  three lines: tokenizer|bytes a token, number of tokens, the same for people

and export.json: of what tokenizer, which files with sha256 and bytes, tokens and documents by split.
The stream stays as it is: each document starts with the end-of-text id, also where the other project's
own tools put it last. A file appears under its name when it is whole. By hand:

    python -m snakegpt.stages.export_tokens --format nanogpt \\
        --tokens results/tokens/shakespeare-gpt2/manifest.json --out /tmp/nanogpt
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from snakegpt.artefacts import HashedFile
from snakegpt.batches import TokenStream
from snakegpt.command import how_to_run, only_path, stage_parser, write_json
from snakegpt.durable import sync, write_atomically
from snakegpt.errors import UserError, reports_errors
from snakegpt.progress import Progress, quantity
from snakegpt.shards import HEADER_BYTES, MOST_TOKENS, header
from snakegpt.tokens import open_split, read_manifest

CHUNK_TOKENS = 1 << 20  # in memory at once
SHARD_TOKENS = 100_000_000  # as llm.c and modded-nanogpt make them
LONGEST_DOCUMENT = 2**31 - 1  # tokens; Megatron counts them in int32


class Split(NamedTuple):
    """One split on its way out.

    stem          of its files, `train` or `val`
    add           to call after each chunk, with the tokens done
    shard_tokens  of each packed shard
    """

    stem: str
    stream: TokenStream
    tokenizer: dict[str, Any]
    add: Callable[[int], None]
    shard_tokens: int

    @property
    def id_bytes(self) -> int:
        return max(shard.itemsize for shard in self.stream.shards)

    def chunks(self) -> Iterator[tuple[NDArray[np.integer], NDArray[np.int64]]]:
        """Ids in order, and where in the stream documents start among them.

        raises  UserError if the stream starts inside a document
        """
        done = 0
        for shard in self.stream.shards:
            for first in range(0, len(shard), CHUNK_TOKENS):
                ids = shard[first : first + CHUNK_TOKENS]
                starts = np.flatnonzero(ids == self.tokenizer["end_of_text"]) + done
                if done == 0 and not (len(starts) and starts[0] == 0):
                    raise UserError(
                        f"the {self.stem} split does not start with the end-of-text id"
                        f" {self.tokenizer['end_of_text']}, as every document does: it is of another"
                        " convention, or starts inside a document."
                    )
                yield ids, starts
                done += len(ids)
                self.add(len(ids))


def export_tokens(
    manifest_path: Path, form: str, out: Path, progress: Progress, shard_tokens: int = SHARD_TOKENS
) -> dict[str, Any]:
    """Write both splits in a layout to `out`; returns the content of export.json.

    progress      counts tokens
    shard_tokens  of each packed shard
    raises        UserError for ids that the layout cannot hold, and what `open_split` raises
    """
    manifest = read_manifest(manifest_path)
    done = 0

    def add(n_tokens: int) -> None:
        nonlocal done
        done += n_tokens
        progress.update(done)

    splits = []
    for name in ("train", "val"):
        stream = open_split(manifest_path, manifest, name)
        if not len(stream):
            raise UserError(f"the {name} split of {manifest_path} holds no token.")
        splits.append(Split(name, stream, manifest["tokenizer"], add, shard_tokens))
    for split in splits:
        _check(split, form, manifest_path)
    out.mkdir(parents=True, exist_ok=True)
    with _folder_aside(out) as aside:
        files: list[dict[str, Any]] = []
        described = {}
        for split in splits:
            written, n_documents = _WRITERS[form](split, aside)
            files += (
                {"name": f.path.name, "sha256": f.sha256, "bytes": f.n_bytes} for f in written
            )
            described[split.stem] = {"n_tokens": len(split.stream), "n_documents": n_documents}
        if form == "shards":
            with HashedFile(aside / "manifest.json") as listing:
                listing.write(_packed(manifest, files, splits))
            told = {"sha256": listing.sha256, "bytes": listing.n_bytes}
            files.append({"name": "manifest.json", **told})
        export = {
            "format": form,
            "tokenizer": manifest["tokenizer"],
            "splits": described,
            "files": files,
        }
        # It lists what stands beside it, so the old one goes before the first file and the new one comes last.
        (out / "export.json").unlink(missing_ok=True)
        for file in files:
            sync(aside / file["name"])
            (aside / file["name"]).replace(out / file["name"])
    write_atomically(out / "export.json", lambda path: write_json(path, export))
    return export


def _packed(manifest: dict[str, Any], files: list[dict[str, Any]], splits: list[Split]) -> bytes:
    """The manifest of packed shards: that of the token set, with other shards."""
    changed = {}
    for split in splits:
        shards = [
            {**file, "n_tokens": (file["bytes"] - HEADER_BYTES) // split.id_bytes}
            for file in files
            if file["name"].startswith(split.stem)
        ]
        changed[split.stem] = {**manifest["splits"][split.stem], "shards": shards}
    packed = {k: v for k, v in manifest.items() if k != "sets"} | {"splits": changed}
    return json.dumps(packed, indent=2).encode("utf-8")


def _check(split: Split, form: str, manifest_path: Path) -> None:
    if not 0 < split.shard_tokens <= MOST_TOKENS:
        raise UserError(
            f"--shard-tokens = {split.shard_tokens:,} is not between 1 and {MOST_TOKENS:,}."
        )
    if form == "nanogpt" and split.id_bytes > 2:
        raise UserError(
            f"{manifest_path} has ids of {8 * split.id_bytes} bits (vocabulary"
            f" {split.tokenizer['n_vocab']:,}); nanoGPT reads uint16 alone.\n"
            "  use --format megatron or datatrove, or a tokenizer of at most 65,536 ids"
        )


@contextlib.contextmanager
def _folder_aside(out: Path) -> Iterator[Path]:
    """A folder in `out` for files that are not whole yet; gone in the end, however it comes."""
    aside = out / f".export.{os.getpid()}"
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ---- layouts ----
# Each writes the files of a split to a folder, and returns them with the number of documents.

Written = tuple[list[HashedFile], int]


def _shards(split: Split, folder: Path) -> Written:
    n_documents, n_tokens = 0, len(split.stream)
    fingerprint, dtype = split.tokenizer["fingerprint"], f"<u{split.id_bytes}"
    written: list[HashedFile] = []
    with contextlib.ExitStack() as opened:
        room = 0
        for ids, starts in split.chunks():
            n_documents += len(starts)
            while len(ids):
                if not room:
                    opened.close()
                    room = min(split.shard_tokens, n_tokens)
                    n_tokens -= room
                    path = folder / f"{split.stem}_{len(written):06d}.bin"
                    written.append(opened.enter_context(HashedFile(path)))
                    written[-1].write(header(room, fingerprint, split.id_bytes))
                taken, ids = ids[:room], ids[room:]
                written[-1].write(np.ascontiguousarray(taken, dtype=dtype).data)
                room -= len(taken)
    return written, n_documents


def _nanogpt(split: Split, folder: Path) -> Written:
    n_documents = 0
    with HashedFile(folder / f"{split.stem}.bin") as file:
        for ids, starts in split.chunks():
            file.write(np.ascontiguousarray(ids, dtype="<u2").data)
            n_documents += len(starts)
    return [file], n_documents


def _datatrove(split: Split, folder: Path) -> Written:
    n_documents = 0
    id_type = f"<u{split.id_bytes}"
    n_tokens = len(split.stream)
    with (
        HashedFile(folder / f"{split.stem}.ds") as tokens,
        HashedFile(folder / f"{split.stem}.ds.index") as index,
        HashedFile(folder / f"{split.stem}.ds.metadata") as metadata,
    ):
        for ids, starts in split.chunks():
            tokens.write(np.ascontiguousarray(ids, dtype=id_type).data)
            ends = starts if n_documents else starts[1:]  # a document ends where the next starts
            index.write(ends.astype("<u8").data)
            n_documents += len(starts)
        index.write(struct.pack("<Q", n_tokens))
        name = f"{split.tokenizer['kind']}-{split.tokenizer['fingerprint'][:12]}|{split.id_bytes}"
        lines = [name, str(n_tokens), f"{quantity(n_tokens)}T"]
        metadata.write("\n".join(lines).encode("utf-8"))
    return [tokens, index, metadata], n_documents


def _megatron(split: Split, folder: Path) -> Written:
    id_type, code = ("<u2", 8) if split.id_bytes == 2 else ("<i4", 4)
    n_documents = 0
    with (
        tempfile.TemporaryFile(
            dir=folder
        ) as kept,  # documents' starts, which the index wants thrice
        HashedFile(folder / f"{split.stem}.bin") as tokens,
        HashedFile(folder / f"{split.stem}.idx") as index,
    ):
        for ids, starts in split.chunks():
            tokens.write(np.ascontiguousarray(ids, dtype=id_type).data)
            kept.write(starts.astype("<i8").tobytes())
            n_documents += len(starts)
        kept.write(struct.pack("<q", len(split.stream)))
        index.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, n_documents, n_documents + 1))
        for bounds in _bounds(kept, n_documents):
            lengths = np.diff(bounds)
            if lengths.max() > LONGEST_DOCUMENT:
                raise UserError(
                    f"a document of the {split.stem} split has {lengths.max():,} tokens;"
                    f" Megatron's index counts at most {LONGEST_DOCUMENT:,}.\n  use another --format"
                )
            index.write(lengths.astype("<i4").data)
        for bounds in _bounds(kept, n_documents):
            index.write((bounds[:-1] * np.dtype(id_type).itemsize).astype("<i8").data)
        for first in range(0, n_documents + 1, CHUNK_TOKENS):
            last = min(first + CHUNK_TOKENS, n_documents + 1)
            index.write(np.arange(first, last, dtype="<i8").data)
    return [tokens, index], n_documents


def _bounds(kept: BinaryIO, n_documents: int) -> Iterator[NDArray[np.int64]]:
    """Documents' starts in order, each time with the next one's, which is where the last ends."""
    for first in range(0, n_documents, CHUNK_TOKENS):
        kept.seek(8 * first)
        n = min(CHUNK_TOKENS, n_documents - first)
        yield np.frombuffer(kept.read(8 * (n + 1)), dtype="<i8")


_WRITERS: dict[str, Callable[[Split, Path], Written]] = {
    "shards": _shards,
    "nanogpt": _nanogpt,
    "megatron": _megatron,
    "datatrove": _datatrove,
}


@reports_errors
def main(argv: list[str] | None = None) -> None:
    parser = stage_parser(__doc__, {"tokens": "manifest.json, its shards beside it"})
    parser.add_argument("--format", required=True, choices=_WRITERS, help="layout to write")
    add = parser.add_argument
    add(
        "--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="shards: tokens of each"
    )
    args = parser.parse_args(argv)
    how = how_to_run(args, "export_tokens")
    manifest_path = only_path(args.tokens, "tokens")
    splits = read_manifest(manifest_path)["splits"]
    total = sum(split["n_tokens"] for split in splits.values())
    label, interval_s = f"{how.label} {args.format}", how.settings.log_interval_s
    progress = Progress(label, total, "tokens", interval_s=interval_s)
    export_tokens(manifest_path, args.format, args.out, progress, args.shard_tokens)


if __name__ == "__main__":
    main()
