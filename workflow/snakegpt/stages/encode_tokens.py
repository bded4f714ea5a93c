"""Encode one part of a corpus: documents to token shards of both splits.

Reads: the raw files of the part, found through corpus.json, and tokenizer.json. Writes:
train_<part>.bin and val_<part>.bin (uint16, above 65,536 ids uint32, little-endian, after the 1,024-byte
header of llm.c) and part_<part>.json, which says what they hold. Every document starts with the end-of-text id. By hand:

    python -m snakegpt.stages.encode_tokens --corpus results/corpora/shakespeare/corpus.json \\
        --tokenizer results/tokenizers/gpt2/tokenizer.json --out /tmp/tokens \\
        --settings '{"part": "000000", "validation": {"by": "position", "fraction": 0.05}}'
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from snakegpt.command import block, how_to_run, only_path, stage_parser, write_json
from snakegpt.documents import Counts, TextSettings, read_documents
from snakegpt.errors import UserError, reports_errors
from snakegpt.progress import Progress, quantity
from snakegpt.settings import Validation
from snakegpt.shards import ShardWriter
from snakegpt.sources import corpora
from snakegpt.sources.transfers import fingerprint
from snakegpt.tokenizers import Tokenizer, load

REVISION = 2  # 2: position splits in exact arithmetic
SCIENCE = ("snakegpt.documents", "snakegpt.tokenizers", "snakegpt.shards")


def encode_tokens(
    files: list[Path],
    tokenizer: Tokenizer,
    text: TextSettings,
    validation: Validation,
    part: str,
    out: Path,
    progress: Progress,
) -> None:
    """Write the shards of a part and its description to `out`.

    files     raw files, in the order of the lock
    progress  counts raw bytes
    """
    counts = Counts()
    totals = {
        split: {"n_documents": 0, "n_text_bytes": 0, "n_characters": 0}
        for split in ("train", "val")
    }
    started, done = time.monotonic(), 0
    kind = tokenizer.fingerprint, tokenizer.n_vocab
    with (
        ShardWriter(out / f"train_{part}.bin", *kind) as train,
        ShardWriter(out / f"val_{part}.bin", *kind) as val,
    ):
        writers = {"train": train, "val": val}

        def report(done: int) -> None:
            seconds = time.monotonic() - started + 1e-9
            n_tokens = train.n_tokens + val.n_tokens
            progress.update(
                done, quantity(done / seconds, "B/s"), quantity(n_tokens / seconds, " tokens/s")
            )

        for path in files:
            size = path.stat().st_size
            text_before = sum(total["n_text_bytes"] for total in totals.values())
            for document in read_documents(path, text, counts):
                for split, piece in split_document(document, validation):
                    writers[split].add([tokenizer.end_of_text, *tokenizer.encode(piece)])
                    totals[split]["n_documents"] += 1
                    totals[split]["n_text_bytes"] += len(piece.encode("utf-8"))
                    totals[split]["n_characters"] += len(piece)
                # Text read so far stands for the place in the file, which is compressed perhaps.
                here = sum(total["n_text_bytes"] for total in totals.values()) - text_before
                report(done + min(here, size - 1))
            done += size
            report(done)
    description = {
        "tokenizer": describe(tokenizer),
        "splits": {
            split: {"shard": asdict(writer.shard), **totals[split]}
            for split, writer in writers.items()
        },
        "dropped": dict(counts.dropped),
        "replaced_bytes": counts.replaced_bytes,
    }
    write_json(out / f"part_{part}.json", description)


def split_document(document: str, validation: Validation) -> Iterator[tuple[str, str]]:
    """The pieces of a document and the split each belongs to; no piece is empty.

    document   the whole text goes by its own hash: independent of order and parts, and exact
               duplicates stay on one side
    position   the first characters to train, the rest to val; to train as many as fit its share
    """
    if validation.by == "document":
        digest = hashlib.blake2b(document.encode("utf-8"), digest_size=8).digest()
        is_val = int.from_bytes(digest, "big") < validation.fraction * 2**64
        yield ("val" if is_val else "train"), document
        return
    # As nanoGPT cuts, int(n x 0.9), but in integers: for Python's floats 10 x (1 - 0.9) is below 1.
    share = Fraction(str(validation.fraction))  # the decimal that the settings say
    n_train = len(document) * (share.denominator - share.numerator) // share.denominator
    for split, piece in (("train", document[:n_train]), ("val", document[n_train:])):
        if piece:
            yield split, piece


def check_raw(path: Path, file: Mapping[str, Any]) -> None:
    """Stop unless a raw file still is the locked one; hashing costs 1 % of encoding."""
    sha256, n_bytes = fingerprint(path)
    if (sha256, n_bytes) != (file["sha256"], file["bytes"]):
        raise UserError(
            f"{path} is not the file that was locked.\n"
            f"  expected: sha256 {file['sha256']}, {file['bytes']:,} bytes\n"
            f"  found:    sha256 {sha256}, {n_bytes:,} bytes\n"
            "  it was damaged or changed: fetch the corpus again: snakemake --forcerun fetch_corpus"
        )


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What parts and manifests say of the tokenizer."""
    names = ("fingerprint", "n_vocab", "end_of_text", "kind")
    return {name: getattr(tokenizer, name) for name in names}


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {"corpus": "corpus.json, its files beside it", "tokenizer": "tokenizer.json"}
    args = stage_parser(__doc__, roles).parse_args(argv)
    how = how_to_run(args, "encode_tokens")
    corpus = only_path(args.corpus, "corpus")
    wanted = args.settings.get("files")
    paths = [file["path"] for file in wanted] if wanted is not None else None
    files = corpora.raw_files(corpus, paths)
    for path, file in zip(files, wanted or (), strict=wanted is not None):
        check_raw(path, file)
    n_bytes = sum(path.stat().st_size for path in files)
    args.out.mkdir(parents=True, exist_ok=True)
    encode_tokens(
        files,
        load(only_path(args.tokenizer, "tokenizer")),
        block(TextSettings, args.settings.get("text"), "text"),
        block(Validation, args.settings.get("validation"), "validation"),
        args.settings.get("part", "000000"),
        args.out,
        Progress(how.label, n_bytes, "bytes", interval_s=how.settings.log_interval_s),
    )


if __name__ == "__main__":
    main()
