"""Encode one part of a corpus: documents to token shards of both splits.

Reads: the raw files of the part, found through corpus.json, and tokenizer.json. Writes:
train_<part>.bin and val_<part>.bin (uint16, above 65,536 ids uint32, little-endian, after the 1,024-byte
header of llm.c; what no header can count goes on in train_<part>_1.bin) and part_<part>.json, which says what they hold. Every document starts with the end-of-text id. By hand:

    python -m snakegpt.stages.encode_tokens --corpus results/corpora/shakespeare/corpus.json \\
        --tokenizer results/tokenizers/gpt2/tokenizer.json --out /tmp/tokens \\
        --settings '{"part": "000000", "validation": {"by": "position", "fraction": 0.05}}'
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snakegpt.command import block, how_to_run, only_path, stage_parser, write_json
from snakegpt.documents.choice import Counts, TextSettings
from snakegpt.documents.document import Document
from snakegpt.documents.reading import read_documents
from snakegpt.engines import Engine, encoder
from snakegpt.errors import reports_errors
from snakegpt.progress import Progress, quantity
from snakegpt.settings import Validation
from snakegpt.shards import ShardSeries
from snakegpt.sources.corpora import Source, sources_of
from snakegpt.splitting import Splitter
from snakegpt.tokenizers import Tokenizer, load

WRITE_TOKENS = 1 << 17  # that wait in memory: few enough for the processor's cache
REPORT_S = 0.2  # between looks at the clock of the progress line

REVISION = 4  # 4: several shards a part
SCIENCE = (
    "snakegpt.documents.reading",
    "snakegpt.tokenizers",
    "snakegpt.shards",
    "snakegpt.splitting",
)


def encode_tokens(
    sources: list[Source],
    tokenizer: Tokenizer,
    text: TextSettings,
    splitter: Splitter,
    part: str,
    out: Path,
    progress: Progress,
    *,
    engine: Engine = "auto",
    dropped: Mapping[str, Mapping[str, list[int]]] | None = None,
) -> None:
    """Write the shards of a part and its description to `out`.

    sources   raw files, or byte ranges of them, in the order of the lock
    dropped   name of a source -> reason -> numbers of its documents that are left out
    progress  counts raw bytes
    """
    counts = Counts()
    encode = encoder(tokenizer, engine)
    started, done = time.monotonic(), 0
    reported = started
    kind = tokenizer.fingerprint, tokenizer.n_vocab
    with (
        ShardSeries(out / f"train_{part}.bin", *kind) as train,
        ShardSeries(out / f"val_{part}.bin", *kind) as val,
    ):
        splits = {
            "train": _Split(train, tokenizer.n_vocab, tokenizer.end_of_text),
            "val": _Split(val, tokenizer.n_vocab, tokenizer.end_of_text),
        }

        def report(done: int) -> None:
            nonlocal reported
            now = time.monotonic()
            if now - reported < REPORT_S and done < progress.total:
                return
            reported = now
            seconds = now - started + 1e-9
            n_tokens = train.n_tokens + val.n_tokens
            progress.update(
                done, quantity(done / seconds, "B/s"), quantity(n_tokens / seconds, " tokens/s")
            )

        for source in sources:
            reasons = _reasons((dropped or {}).get(source.name, {}))
            read = 0
            documents = read_documents(source.path, text, counts, span=source.span, scratch=out)
            for number, document in enumerate(documents):
                # Text read so far stands for the place in the file, which is compressed perhaps.
                read += document.n_bytes
                if number in reasons:
                    counts.dropped[reasons[number]] += 1
                    continue
                for split, start, stop in splitter.divide(document, source.file):
                    splits[split].add(document, start, stop, encode)
                report(done + min(read, source.n_bytes - 1))
            done += source.n_bytes
            report(done)
        for filled in splits.values():
            filled.flush()
    description = {
        "tokenizer": describe(tokenizer),
        "splits": {name: split.description() for name, split in splits.items()},
        "dropped": dict(counts.dropped),
        "replaced_bytes": counts.replaced_bytes,
    }
    write_json(out / f"part_{part}.json", description)


def _reasons(dropped: Mapping[str, list[int]]) -> dict[int, str]:
    return {number: reason for reason, numbers in dropped.items() for number in numbers}


class _Split:
    """The shard of a split and what is counted of it."""

    def __init__(self, writer: ShardSeries, n_vocab: int, end_of_text: int) -> None:
        self._writer = writer
        self._end_of_text = np.array([end_of_text], np.uint32)
        self._counts = np.zeros(n_vocab, np.int64)
        self._waiting = np.empty(WRITE_TOKENS, np.uint32)
        self._n_waiting = 0
        self._lengths: Counter[int] = Counter()
        self._n_documents = self._n_text_bytes = self._n_characters = 0

    def add(self, document: Document, start: int, stop: int, encode: Callable[[str], Any]) -> None:
        """The characters from `start` to `stop` of a document, as one document of this split."""
        n_tokens, whole = 1, stop - start == document.n_characters
        self._n_text_bytes += document.n_bytes if whole else 0
        self._write(self._end_of_text)
        for piece in document.pieces(start, stop):
            ids = encode(piece)
            self._write(ids)
            n_tokens += len(ids)
            if not whole:
                self._n_text_bytes += len(piece.encode("utf-8"))
        self._n_characters += stop - start
        self._n_documents += 1
        self._lengths[n_tokens.bit_length()] += 1

    def _write(self, ids: NDArray[Any]) -> None:
        if self._n_waiting + len(ids) > WRITE_TOKENS:
            self.flush()
        if len(ids) > WRITE_TOKENS:
            self._pass_on(ids)
        else:
            self._waiting[self._n_waiting : self._n_waiting + len(ids)] = ids
            self._n_waiting += len(ids)

    def flush(self) -> None:
        """Give the shard what waits."""
        self._pass_on(self._waiting[: self._n_waiting])
        self._n_waiting = 0

    def _pass_on(self, ids: NDArray[Any]) -> None:
        self._writer.add(ids)
        self._counts += np.bincount(ids, minlength=len(self._counts))

    def description(self) -> dict[str, Any]:
        """Shard, totals, lengths by power of two, and how often each id occurs."""
        counts = zlib.compress(self._counts.astype("<i8").tobytes())
        return {
            "shards": [asdict(shard) for shard in self._writer.shards],
            "n_documents": self._n_documents,
            "n_text_bytes": self._n_text_bytes,
            "n_characters": self._n_characters,
            "lengths": {str(1 << (bits - 1)): n for bits, n in sorted(self._lengths.items())},
            "id_counts": base64.b64encode(counts).decode("ascii"),
        }


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What parts and manifests say of the tokenizer."""
    names = ("fingerprint", "n_vocab", "end_of_text", "kind")
    return {name: getattr(tokenizer, name) for name in names}


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {
        "corpus": "corpus.json, its files beside it",
        "tokenizer": "tokenizer.json",
        "drops": "drops.json of screen_documents; none: nothing is left out",
    }
    args = stage_parser(__doc__, roles).parse_args(argv)
    how = how_to_run(args, "encode_tokens")
    sources = sources_of(only_path(args.corpus, "corpus"), args.settings.get("files"))
    n_bytes = sum(source.n_bytes for source in sources)
    drops = only_path(args.drops, "drops") if args.drops else None
    args.out.mkdir(parents=True, exist_ok=True)
    encode_tokens(
        sources,
        load(only_path(args.tokenizer, "tokenizer")),
        block(TextSettings, args.settings.get("text"), "text"),
        Splitter(block(Validation, args.settings.get("validation"), "validation")),
        args.settings.get("part", "000000"),
        args.out,
        Progress(how.label, n_bytes, "bytes", interval_s=how.settings.log_interval_s),
        engine=how.settings.engine,
        dropped=json.loads(drops.read_text(encoding="utf-8"))["dropped"] if drops else None,
    )


if __name__ == "__main__":
    main()
