"""What turns text into ids: tiktoken, the reference, or gigatoken, which is many times faster.

An engine is no part of identity: ids are the same or it is an error. Of what gigatoken encodes, a
sample that the text itself decides is encoded by tiktoken as well and compared.
"""

from __future__ import annotations

import base64
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from snakegpt.errors import UserError
from snakegpt.tokenizers import PATTERNS, Tokenizer

Engine = Literal["auto", "tiktoken", "gigatoken"]
Ids = NDArray[np.unsignedinteger[Any]]

# gigatoken's name of the pretokenizer that computes what tiktoken's pattern says.
PRETOKENIZERS = {pattern: name for name, pattern in PATTERNS.items()}

# Its cache of pretokens only grows (7 times the text where no word occurs twice): begin a new one.
RENEW_BYTES = 32_000_000
SAMPLED = 128  # one piece of so many is compared


def encoder(tokenizer: Tokenizer, engine: Engine = "auto") -> Callable[[str], Ids]:
    """A function from text to ids, never the end-of-text id.

    raises   UserError if gigatoken is asked for and is not installed, or cannot run this tokenizer;
             the function raises it for text that the tokenizer cannot spell
    """
    if engine != "tiktoken":
        problem = _problem(tokenizer)
        if problem is None:
            return _Gigatoken(tokenizer)
        if engine == "gigatoken":
            raise UserError(f"execution.engine: gigatoken {problem}.\n  set it to auto or tiktoken")
    return reference(tokenizer)


def reference(tokenizer: Tokenizer) -> Callable[[str], Ids]:
    """The tokenizer's own encoder."""
    to_numpy: Callable[[str], Ids] | None = getattr(tokenizer, "encode_to_numpy", None)
    return to_numpy or (lambda text: np.asarray(tokenizer.encode(text), dtype=np.uint32))


def _problem(tokenizer: Tokenizer) -> str | None:
    if getattr(tokenizer, "pattern", None) not in PRETOKENIZERS:
        return f"cannot run a tokenizer of kind {tokenizer.kind}"
    if importlib.util.find_spec("gigatoken") is None:
        return "is not installed (pip install gigatoken)"
    return None


class _Gigatoken:
    """gigatoken, held to tiktoken by a sample."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._reference = tokenizer, reference(tokenizer)
        self._pretokenizer = PRETOKENIZERS[tokenizer.pattern]
        self._n_pieces = 0
        self._renew()

    def _renew(self) -> None:
        import gigatoken

        self._left = RENEW_BYTES
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "ranks.tiktoken"
            lines = (
                f"{base64.b64encode(token).decode('ascii')} {rank}\n"
                for rank, token in enumerate(self._tokenizer.ranks)
                if token is not None
            )
            file.write_text("".join(lines), encoding="ascii")
            self._backend = gigatoken.Tokenizer.from_tiktoken(
                str(file), pretokenizer=self._pretokenizer, special_tokens={}
            )

    def __call__(self, text: str) -> Ids:
        if self._left < 0:
            self._renew()
        self._left -= len(text)
        ids: Ids = np.asarray(self._backend.encode(text), dtype=np.uint32)
        # The first, and then by a number that only the ids and their order decide.
        if self._n_pieces == 0 or (int(ids[:8].sum()) + len(ids)) % SAMPLED == 0:
            expected = self._reference(text)
            if not np.array_equal(ids, expected):
                raise UserError(
                    "gigatoken encodes a text differently from tiktoken:\n"
                    f"  {_difference(text, ids, expected)}\n"
                    "  nothing was written; set execution.engine: tiktoken, and report this text"
                )
        self._n_pieces += 1
        return ids


def _difference(text: str, ids: Ids, expected: Ids) -> str:
    n = min(len(ids), len(expected))
    unequal = np.flatnonzero(ids[:n] != expected[:n])
    place = int(unequal[0]) if len(unequal) else n
    return (
        f"id {place:,} is {ids[place : place + 3].tolist()} instead of"
        f" {expected[place : place + 3].tolist()}, in a text that begins {text[:60]!r}"
    )
