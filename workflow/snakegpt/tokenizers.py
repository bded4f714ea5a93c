"""Text to ids and back: byte-pair encodings run by tiktoken, one id per character, one id per byte.

A tokenizer is a tokenizer.json, complete in itself and free of pickles, and known by its fingerprint:
the sha256 of everything that decides its ids. Encoding never makes the end-of-text id out of text
that spells it (`encode_ordinary`); documents are joined by the id itself.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
from numpy.typing import NDArray

from snakegpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What every tokenizer can do."""

    kind: str
    n_vocab: int
    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never the end-of-text id. UserError for text that it cannot spell."""

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        """As `encode`, as an array."""
        return np.asarray(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; bytes that are no UTF-8 become U+FFFD."""

    def token_bytes(self) -> NDArray[np.int32]:
        """(n_vocab,) UTF-8 bytes of each id's text, 0 for ids that no text encodes to."""

    def content(self) -> dict[str, Any]:
        """All that decides its ids, as plain JSON values."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over all that decides its ids."""
        text = json.dumps(self.content(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def described(self) -> dict[str, Any]:
        """What tokenizer.json says: the content, and what follows from it."""
        return self.content() | {
            "fingerprint": self.fingerprint,
            "n_vocab": self.n_vocab,
            "end_of_text": self.end_of_text,
        }

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return json.dumps(self.described(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


# ---- pretokens -------------------------------------------------------------------------------

# How text is cut before bytes are merged; a merge never crosses a cut. tiktoken 0.14's patterns of
# r50k_base and p50k_base, cl100k_base, o200k_base (tiktoken_ext.openai_public).
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
        r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
    ),
    # `\s++$` is ours: it takes what `\s+(?!\S)` would, without its panic on a million spaces at the end.
    "o200k": (
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
        r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s++$|\s+(?!\S)|\s+"""
    ),
}

# The 25 characters of Unicode's White_Space, line ends first; Python's `\s` knows four more, which
# Rust's does not.
_LINE_ENDS = "\\r\\n"
_OTHER_SPACE = "\\t\\x0b\\x0c \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"
_SPACE = _LINE_ENDS + _OTHER_SPACE

# tiktoken 0.14 panics, with an exception that `except Exception` does not catch, where `\s+(?!\S)` runs
# over 999,999 and more characters (its issue 15).
LONG = 100_000


def _long_runs(space: str, length: int) -> re.Pattern[str]:
    # Only the start of a run is tried, and no shorter part of it: linear, also where nothing follows it.
    return re.compile(f"(?<![{space}])[{space}]{{{length},}}+(?=[^{_SPACE}])")


def long_runs(pattern: str, length: int = LONG) -> re.Pattern[str]:
    """Finds the long white space that `pieces` cuts for a pattern, one of the values of PATTERNS.

    cl100k's and o200k's patterns take white space up to its last line end as one pretoken of its own.
    """
    return _long_runs(_SPACE if pattern == PATTERNS["gpt2"] else _OTHER_SPACE, length)


def pieces(text: str, runs: re.Pattern[str]) -> Iterator[str]:
    """A text cut where cutting changes no id: around all but the last character of long white space.

    Of such a run before something else, the patterns take all but the last character as one pretoken,
    and the last with or before what follows.
    """
    start = 0
    for run in runs.finditer(text) if len(text) > LONG else ():
        for cut in (run.start(), run.end() - 1):
            if cut > start:
                yield text[start:cut]
                start = cut
    yield text[start:]


_CUT = re.compile(f"[^{_SPACE}](?=[{_OTHER_SPACE}])")


def chunks(text: str, pattern: str, n_characters: int = 1 << 16) -> Iterator[str]:
    """A text in chunks of about `n_characters`, cut where cutting changes no pretoken of a pattern.

    That is before any white space but a line end, after anything but white space: all patterns begin
    a pretoken there, and none looks back.
    """
    for piece in pieces(text, long_runs(pattern)):
        start = 0
        while found := _CUT.search(piece, start + n_characters - 1):
            yield piece[start : found.end()]
            start = found.end()
        yield piece[start:]


# ---- byte pairs ------------------------------------------------------------------------------

# OpenAI's encodings: pattern and special tokens (tiktoken_ext.openai_public); the ranks are downloaded.
ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    "r50k_base": ("gpt2", {END_OF_TEXT: 50_256}),
    "p50k_base": ("gpt2", {END_OF_TEXT: 50_256}),
    "cl100k_base": (
        "cl100k",
        {
            END_OF_TEXT: 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
    ),
    "o200k_base": ("o200k", {END_OF_TEXT: 199_999, "<|endofprompt|>": 200_018}),
}


class BytePairTokenizer(Tokenizer):
    """Byte-pair encoding by merge ranks, as tiktoken computes it."""

    def __init__(
        self,
        pattern: str,
        ranks: Sequence[bytes | None],
        *,
        kind: str,
        special_tokens: Mapping[str, int] | None = None,
        encoding: str | None = None,
    ) -> None:
        """
        pattern         one of the values of PATTERNS
        ranks           the token of each rank; None where no token has that rank
        special_tokens  ids that no text encodes to; None: end-of-text alone, after the last rank
        encoding        OpenAI's name for it, if it has one
        """
        self.kind, self.pattern, self.encoding = kind, pattern, encoding
        self.ranks = list(ranks)
        self.special_tokens = dict(special_tokens or {END_OF_TEXT: len(self.ranks)})
        self.end_of_text = self.special_tokens[END_OF_TEXT]
        self.n_vocab = max(len(self.ranks), *(i + 1 for i in self.special_tokens.values()))
        if pattern not in PATTERNS.values():
            raise ValueError(f"its pattern is none of {', '.join(PATTERNS)}")
        self._runs = long_runs(pattern)
        mergeable = {token: rank for rank, token in enumerate(self.ranks) if token is not None}
        if len(mergeable) != len(self.ranks) - self.ranks.count(None):
            raise ValueError("a token has two ranks")
        self._encoding = tiktoken.Encoding(
            kind, pat_str=pattern, mergeable_ranks=mergeable, special_tokens=self.special_tokens
        )
        # tiktoken decodes no id that is neither token nor special; a model may well draw one.
        self._tokens = [token or b"" for token in self.ranks]
        self._tokens += [b""] * (self.n_vocab - len(self._tokens))
        for text, i in self.special_tokens.items():
            self._tokens[i] = text.encode("utf-8")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in pieces(text, self._runs):
            ids += self._encoding.encode_ordinary(piece)
        return ids

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        """As `encode`, without a Python integer for each id."""
        found = [
            self._encoding.encode_to_numpy(piece, disallowed_special=())
            for piece in pieces(text, self._runs)
        ]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._tokens[i] for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> NDArray[np.int32]:
        lengths = np.array([len(token) for token in self._tokens], dtype=np.int32)
        lengths[list(self.special_tokens.values())] = 0
        return lengths

    @functools.cached_property
    def spelt_ranks(self) -> list[str | None]:
        """`ranks` in base64."""
        encode = binascii.b2a_base64
        return [
            None if token is None else encode(token, newline=False).decode("ascii")
            for token in self.ranks
        ]

    def content(self) -> dict[str, Any]:
        found = {
            "kind": self.kind,
            "pattern": self.pattern,
            "ranks": self.spelt_ranks,
            "special_tokens": self.special_tokens,
        }
        return found if self.encoding is None else found | {"encoding": self.encoding}


def read_ranks(ranks_file: bytes) -> list[bytes | None]:
    """The token of each rank from a .tiktoken file: `base64 rank` a line."""
    by_rank = {}
    for line in ranks_file.splitlines():
        token, rank = line.split()
        by_rank[int(rank)] = base64.b64decode(token)
    return [by_rank.get(rank) for rank in range(max(by_rank) + 1)]


def gpt2_tokenizer(ranks_file: bytes) -> BytePairTokenizer:
    """GPT-2's tokenizer from the content of OpenAI's r50k_base.tiktoken."""
    return BytePairTokenizer(PATTERNS["gpt2"], read_ranks(ranks_file), kind="gpt2")


def openai_tokenizer(encoding: str, ranks_file: bytes) -> BytePairTokenizer:
    """An encoding of ENCODINGS from the content of OpenAI's .tiktoken file."""
    pattern, special_tokens = ENCODINGS[encoding]
    return BytePairTokenizer(
        PATTERNS[pattern],
        read_ranks(ranks_file),
        kind="tiktoken",
        special_tokens=special_tokens,
        encoding=encoding,
    )


# ---- characters ------------------------------------------------------------------------------


class CharTokenizer(Tokenizer):
    """Id 0 ends a text; the characters follow in code point order."""

    kind = "char"
    end_of_text = 0

    def __init__(self, characters: Sequence[str]) -> None:
        self.characters = list(characters)
        self.n_vocab = len(self.characters) + 1
        self._ids = {character: index + 1 for index, character in enumerate(self.characters)}

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

    def content(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "characters": self.characters,
            "special_tokens": {END_OF_TEXT: self.end_of_text},
        }


def char_tokenizer(characters: Iterable[str]) -> CharTokenizer:
    """The tokenizer of a set of characters."""
    return CharTokenizer(sorted(set(characters)))


# ---- bytes -----------------------------------------------------------------------------------


class ByteTokenizer(Tokenizer):
    """Each byte of the UTF-8 text is its id; 256 ends a text."""

    kind = "byte"
    end_of_text = 256
    n_vocab = 257

    def encode(self, text: str) -> list[int]:
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError:  # lone surrogates: tiktoken's own rule, one U+FFFD each
            return list(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())

    def decode(self, ids: Sequence[int]) -> str:
        end = END_OF_TEXT.encode("ascii")
        spelled = b"".join(end if i == self.end_of_text else bytes([i]) for i in ids)
        return spelled.decode("utf-8", errors="replace")

    def token_bytes(self) -> NDArray[np.int32]:
        return np.array([1] * 256 + [0], dtype=np.int32)

    def content(self) -> dict[str, Any]:
        return {"kind": self.kind, "special_tokens": {END_OF_TEXT: self.end_of_text}}


# ---- files -----------------------------------------------------------------------------------


def load(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    raises   UserError if the file is none, or is not what its fingerprint says
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = _from_json(content)
        wanted = content["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is no tokenizer.json: {reason}.") from None
    again = "\n  make it again: remove it and run the pipeline"
    if tokenizer.fingerprint != wanted:
        raise UserError(
            f"{path} was changed: its fingerprint says {wanted},\n"
            f"  its content is {tokenizer.fingerprint}.{again}"
        )
    described = tokenizer.described()
    changed = sorted(k for k in described.keys() | content if described.get(k) != content.get(k))
    if changed:  # what follows from the rest, or means nothing
        raise UserError(f"{path} was changed: {', '.join(changed)} is not what it was.{again}")
    return tokenizer


def _from_json(content: dict[str, Any]) -> Tokenizer:
    kind = content["kind"]
    if kind == "char":
        return CharTokenizer(content["characters"])
    if kind == "byte":
        return ByteTokenizer()
    if kind not in ("gpt2", "tiktoken", "bpe"):
        raise ValueError(f"{kind!r} is no kind of tokenizer")
    return BytePairTokenizer(
        content["pattern"],
        [None if t is None else binascii.a2b_base64(t, strict_mode=True) for t in content["ranks"]],
        kind=kind,
        special_tokens=content["special_tokens"],
        encoding=content.get("encoding"),
    )
