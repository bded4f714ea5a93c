"""Text to ids and back: OpenAI's GPT-2 encoding run by tiktoken, and one id per character.

A tokenizer is a tokenizer.json, complete in itself and free of pickles, and known by its fingerprint:
the sha256 of everything that decides its ids. Encoding never makes the end-of-text id out of text
that spells it (`encode_ordinary`); documents are joined by the id itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
from numpy.typing import NDArray

from snakegpt.errors import UserError
from snakegpt.shards import MOST_IDS

END_OF_TEXT = "<|endoftext|>"

# GPT-2's pretokenizer in the form that tiktoken 0.14 runs (tiktoken_ext.openai_public.r50k_pat_str).
GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
GPT2_RANKS = 50_256  # the end-of-text id comes after them


class Tokenizer(Protocol):
    """What every tokenizer can do."""

    kind: str
    n_vocab: int
    end_of_text: int

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over all that decides its ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never the end-of-text id. UserError for text that it cannot spell."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD."""

    def token_bytes(self) -> NDArray[np.int32]:
        """(n_vocab,) UTF-8 bytes of each id's text, 0 for the end-of-text id."""

    def to_json(self) -> str:
        """The content of tokenizer.json."""


def _fitting(n_vocab: int) -> int:
    """A vocabulary size that the shards can hold."""
    if n_vocab > MOST_IDS:
        raise UserError(
            f"{n_vocab:,} ids do not fit the shards' uint16, which holds {MOST_IDS:,}.\n"
            "  use a smaller vocabulary, such as the gpt2 tokenizer's"
        )
    return n_vocab


# ---- GPT-2 -----------------------------------------------------------------------------------


class BytePairTokenizer:
    """Byte-pair encoding by merge ranks, as tiktoken computes it."""

    kind = "gpt2"

    def __init__(self, pattern: str, ranks: Sequence[bytes], kind: str = "gpt2") -> None:
        """ranks: the token of each rank; the end-of-text id is the one after the last."""
        self.kind, self.pattern, self.ranks = kind, pattern, list(ranks)
        self.end_of_text = len(self.ranks)
        self.n_vocab = _fitting(len(self.ranks) + 1)
        self._encoding = tiktoken.Encoding(
            kind,
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.ranks)},
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self._content())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in pieces(text):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        """As `encode`, without a Python integer for each id."""
        found = [
            self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(text)
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids), errors="replace")

    def token_bytes(self) -> NDArray[np.int32]:
        return np.array([*map(len, self.ranks), 0], dtype=np.int32)

    def to_json(self) -> str:
        return _to_json(self, self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "pattern": self.pattern,
            "ranks": [base64.b64encode(token).decode("ascii") for token in self.ranks],
            "special_tokens": {END_OF_TEXT: self.end_of_text},
        }


# tiktoken 0.14 panics, with an exception that `except Exception` does not catch, on 999,999 and more
# white-space characters before another one (its issue 15). The 25 characters of Unicode's White_Space;
# Python's `\s` knows four more, which Rust's does not.
_SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"
_LONG = 100_000
# Only the start of a run is tried, and no shorter part of it: linear, also where nothing follows it.
_LONG_SPACE = re.compile(f"(?<![{_SPACE}])[{_SPACE}]{{{_LONG},}}+(?=[^{_SPACE}])")


def pieces(text: str) -> Iterator[str]:
    """A text cut where cutting changes no id of GPT-2's pattern: before the last of many spaces.

    Of a run of white space before something else, the pattern takes all but the last character as one
    pretoken, and the last with or before what follows.
    """
    start = 0
    for run in _LONG_SPACE.finditer(text) if len(text) > _LONG else ():
        cut = run.end() - 1
        yield text[start:cut]
        start = cut
    yield text[start:]


def gpt2_tokenizer(ranks_file: bytes) -> BytePairTokenizer:
    """GPT-2's tokenizer from the content of OpenAI's r50k_base.tiktoken: `base64 rank` a line."""
    by_rank = {}
    for line in ranks_file.splitlines():
        token, rank = line.split()
        by_rank[int(rank)] = base64.b64decode(token)
    return BytePairTokenizer(GPT2_PATTERN, [by_rank[rank] for rank in range(GPT2_RANKS)])


# ---- characters ------------------------------------------------------------------------------


class CharTokenizer:
    """Id 0 ends a text; the characters follow in code point order."""

    kind = "char"
    end_of_text = 0

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)
        self.n_vocab = _fitting(len(self.characters) + 1)
        self._ids = {character: index + 1 for index, character in enumerate(self.characters)}

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self._content())

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise UserError(
                f"the char tokenizer has no id for {character!r} (U+{ord(character):04X}): it is not in"
                " the corpus that its vocabulary was made from."
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i - 1] if i else END_OF_TEXT for i in ids)

    def token_bytes(self) -> NDArray[np.int32]:
        return np.array([0, *(len(c.encode("utf-8")) for c in self.characters)], dtype=np.int32)

    def to_json(self) -> str:
        return _to_json(self, self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "characters": self.characters,
            "special_tokens": {END_OF_TEXT: self.end_of_text},
        }


def char_tokenizer(characters: Iterable[str]) -> CharTokenizer:
    """The tokenizer of a set of characters."""
    return CharTokenizer(sorted(set(characters)))


# ---- files -----------------------------------------------------------------------------------


def _fingerprint(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _to_json(tokenizer: Tokenizer, content: dict[str, Any]) -> str:
    facts = {
        "fingerprint": tokenizer.fingerprint,
        "n_vocab": tokenizer.n_vocab,
        "end_of_text": tokenizer.end_of_text,
    }
    return json.dumps(content | facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def load(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    raises   UserError if the file is none, or is not what its fingerprint says
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokenizer: Tokenizer
        if content["kind"] == "char":
            tokenizer = CharTokenizer(content["characters"])
        else:
            ranks = [base64.b64decode(token, validate=True) for token in content["ranks"]]
            tokenizer = BytePairTokenizer(content["pattern"], ranks, content["kind"])
        wanted = content["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is no tokenizer.json: {reason}.") from None
    if tokenizer.fingerprint != wanted:
        raise UserError(
            f"{path} was changed: its fingerprint says {wanted},\n"
            f"  its content is {tokenizer.fingerprint}.\n  make it again: remove it and run the pipeline"
        )
    return tokenizer
