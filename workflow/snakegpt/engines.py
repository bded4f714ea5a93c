"""What turns text into ids: tiktoken, the reference, or gigatoken, which is many times faster.

An engine is no part of identity: ids are the same or it is an error. Of what gigatoken encodes, a
sample that the text itself decides is encoded by tiktoken as well and compared.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from snakegpt.errors import UserError
from snakegpt.tokenizers import PATTERNS, Tokenizer

Engine = Literal["auto", "tiktoken", "gigatoken"]
Ids = NDArray[np.unsignedinteger[Any]]

# gigatoken's name of the pretokenizer that computes what tiktoken's pattern says.
PRETOKENIZERS = {pattern: name for name, pattern in PATTERNS.items()}

# Its cache of pretokens only grows, to 7 times the text where no word occurs twice: begin a new one when
# the process has grown by so much.
MOST_GROWTH_BYTES = 150_000_000
LOOK_CHARACTERS = 8_000_000  # between looks at the process's memory
SAMPLED = 256  # one piece of so many is compared


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
    return tokenizer.encode_to_numpy


def _problem(tokenizer: Tokenizer) -> str | None:
    if getattr(tokenizer, "pattern", None) not in PRETOKENIZERS:
        return f"cannot run a tokenizer of kind {tokenizer.kind}"
    if importlib.util.find_spec("gigatoken") is None:
        return "is not installed (pip install gigatoken)"
    return None


class _Gigatoken:
    """gigatoken, held to tiktoken by a sample."""

    def __init__(self, tokenizer: Any) -> None:
        self._reference = tokenizer.encode_to_numpy
        self._pretokenizer = PRETOKENIZERS[tokenizer.pattern]
        self._ranks = tempfile.NamedTemporaryFile("w", suffix=".tiktoken")  # noqa: SIM115
        self._ranks.writelines(
            f"{token} {rank}\n"
            for rank, token in enumerate(tokenizer.spelt_ranks)
            if token is not None
        )
        self._ranks.flush()
        self._n_pieces = 0
        self._renew()
        self._most_bytes = memory_bytes() + MOST_GROWTH_BYTES

    def _renew(self) -> None:
        import gigatoken

        self._left = LOOK_CHARACTERS
        self._backend = gigatoken.Tokenizer.from_tiktoken(
            self._ranks.name, pretokenizer=self._pretokenizer, special_tokens={}
        )

    def __call__(self, text: str) -> Ids:
        self._left -= len(text)
        if self._left < 0:
            self._left = LOOK_CHARACTERS
            if memory_bytes() > self._most_bytes:
                self._renew()
        ids: Ids = np.asarray(self._backend.encode(text), dtype=np.uint32)
        # The first, and then by what the text alone decides: its length, mixed.
        if self._n_pieces == 0 or (len(text) * 2_654_435_761 >> 8) % SAMPLED == 0:
            expected = self._reference(text)
            if not np.array_equal(ids, expected):
                raise UserError(
                    "gigatoken encodes a text differently from tiktoken:\n"
                    f"  {_difference(text, ids, expected)}\n"
                    "  nothing was written; set execution.engine: tiktoken, and report this text"
                )
        self._n_pieces += 1
        return ids


def memory_bytes() -> int:
    """What this process holds in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _difference(text: str, ids: Ids, expected: Ids) -> str:
    n = min(len(ids), len(expected))
    unequal = np.flatnonzero(ids[:n] != expected[:n])
    place = int(unequal[0]) if len(unequal) else n
    return (
        f"id {place:,} is {ids[place : place + 3].tolist()} instead of"
        f" {expected[place : place + 3].tolist()}, in a text that begins {text[:60]!r}"
    )
