"""Find the documents of a corpus that are left out: repeated ones, and what evaluation texts hold too.

Reads: the raw files of the corpus and of the corpora it is compared with, through their corpus.json.
Writes: drops.json: for each file (or byte range of one) the numbers of the documents to leave out, by
reason, and how many there are. By hand, duplicates alone:

    python -m snakegpt.stages.screen_documents --corpus results/corpora/shakespeare/corpus.json \\
        --out /tmp/drops --settings '{"deduplicate": true}'
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from snakegpt.command import block, how_to_run, only_path, stage_parser, write_json
from snakegpt.documents.choice import Counts, TextSettings
from snakegpt.documents.document import Document
from snakegpt.documents.reading import read_documents
from snakegpt.errors import reports_errors
from snakegpt.progress import Progress, quantity
from snakegpt.sources.corpora import Source, sources_of

REVISION = 1
SCIENCE = ("snakegpt.documents.reading",)

EXAMPLES = 20  # overlaps that are told in words

_WORD = re.compile(r"\w+")


def screen_documents(
    sources: list[Source],
    text: TextSettings,
    progress: Progress,
    *,
    deduplicate: bool,
    evaluation: set[bytes] | None,
    words: int = 13,
    drop: bool = True,
) -> dict[str, Any]:
    """The content of drops.json.

    evaluation  digests of the word sequences of the evaluation texts, see `sequences`; None: no comparison
    drop        whether documents that overlap are left out, or only counted
    """
    digests = bytearray()
    places: list[tuple[str, int]] = []  # (source, documents before it)
    overlapping: list[int] = []
    examples: list[dict[str, str]] = []
    n_documents = done = 0
    for source in sources:
        places.append((source.name, n_documents))
        read = 0
        for document in read_documents(source.path, text, Counts(), span=source.span):
            digests += document.digest
            if evaluation:
                found = next(
                    (s for s in _sequences(document, words) if _hash(s) in evaluation), None
                )
                if found is not None:
                    overlapping.append(n_documents)
                    if len(examples) < EXAMPLES:
                        examples.append({"file": source.name, "sequence": " ".join(found)})
            n_documents += 1
            read += document.n_bytes
            progress.update(done + min(read, source.n_bytes), f"{n_documents:,} documents")
        done += source.n_bytes
    duplicates = _repeated(digests) if deduplicate else np.empty(0, np.int64)
    left_out = {"duplicate": duplicates}
    if drop:
        left_out["overlap"] = np.setdiff1d(np.array(overlapping, np.int64), duplicates)
    return {
        "dropped": _by_source(left_out, places),
        "n_documents": n_documents,
        "n_duplicates": len(duplicates),
        "n_overlapping": len(overlapping) if evaluation is not None else None,
        "overlaps": examples,
    }


def sequences(documents: Iterable[Document], words: int) -> set[bytes]:
    """Digests of every sequence of so many words."""
    return {_hash(found) for document in documents for found in _sequences(document, words)}


def _sequences(document: Document, words: int) -> Iterator[list[str]]:
    """Every run of `words` lower-case words; of a shorter text all its words."""
    window: list[str] = []
    complete = False
    for piece in document.pieces():
        for match in _WORD.finditer(piece.lower()):
            window.append(match[0])
            if len(window) > words:
                del window[0]
            if len(window) == words:
                complete = True
                yield window
    if window and not complete:
        yield window


def _hash(sequence: list[str]) -> bytes:
    return hashlib.blake2b(" ".join(sequence).encode("utf-8", "replace"), digest_size=8).digest()


def _repeated(digests: bytearray) -> NDArray[np.int64]:
    """Numbers of the documents whose digest an earlier one has, ascending."""
    halves = np.frombuffer(bytes(digests), "<u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: the first of equals stays first
    ordered = halves[order]
    repeats = (ordered[1:] == ordered[:-1]).all(axis=1)
    return np.sort(order[1:][repeats])


def _by_source(
    left_out: dict[str, NDArray[np.int64]], places: list[tuple[str, int]]
) -> dict[str, dict[str, list[int]]]:
    """Source -> reason -> numbers within the source; sources that lose nothing are not named."""
    begins = np.array([begin for _, begin in places], np.int64)
    found: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for reason, numbers in left_out.items():
        indices = np.searchsorted(begins, numbers, side="right") - 1
        for index in np.unique(indices):
            name, begin = places[index]
            found[name][reason] = (numbers[indices == index] - begin).tolist()
    return dict(found)


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {
        "corpus": "corpus.json, its files beside it",
        "against": "corpus.json of each corpus of evaluation texts",
    }
    args = stage_parser(__doc__, roles).parse_args(argv)
    how = how_to_run(args, "screen_documents")
    settings = args.settings
    sources = sources_of(only_path(args.corpus, "corpus"), settings.get("files"))
    evaluation = None
    words = settings.get("words", 13)
    if args.against:
        texts = settings.get("against") or [{}] * len(args.against)
        evaluation = set()
        for corpus, text in zip(args.against, texts, strict=True):
            for source in sources_of(corpus, None):
                documents = read_documents(source.path, block(TextSettings, text, "text"), Counts())
                evaluation |= sequences(documents, words)
    progress = Progress(
        how.label,
        sum(source.n_bytes for source in sources),
        "bytes",
        interval_s=how.settings.log_interval_s,
    )
    drops = screen_documents(
        sources,
        block(TextSettings, settings.get("text"), "text"),
        progress,
        deduplicate=settings.get("deduplicate", False),
        evaluation=evaluation,
        words=words,
        drop=settings.get("drop", True),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "drops.json", drops)
    n_dropped = quantity(drops["n_duplicates"])
    progress.update(
        progress.total, f"{n_dropped} duplicates, {drops['n_overlapping'] or 0:,} overlaps"
    )


if __name__ == "__main__":
    main()
