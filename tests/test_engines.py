"""Both engines give the same ids; where one would not, that is an error and nothing is written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from snakegpt import engines
from snakegpt.engines import encoder
from snakegpt.errors import UserError
from snakegpt.tokenizers import PATTERNS, BytePairTokenizer, char_tokenizer

# Bytes, and some merges of them, as GPT-2's ranks are built.
MERGES = [b"th", b"the", b" t", b" the", b"in", b"ing", b"  ", b"\n\n", b"ea", b"er"]
RANKS = [bytes([byte]) for byte in range(256)] + MERGES
TOKENIZERS = {
    name: BytePairTokenizer(pattern, RANKS, kind="bpe") for name, pattern in PATTERNS.items()
}
TOKENIZER = TOKENIZERS["gpt2"]

pytest.importorskip("gigatoken")


ENCODERS = {
    (name, engine): encoder(tokenizer, engine)
    for name, tokenizer in TOKENIZERS.items()
    for engine in ("tiktoken", "gigatoken")
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]))
    | st.text("the in\n g's1\u3000<|endoftext|>")
)
def test_gigatoken_and_tiktoken_agree(name, text):
    expected = TOKENIZERS[name].encode(text)
    assert ENCODERS[name, "tiktoken"](text).tolist() == expected
    assert ENCODERS[name, "gigatoken"](text).tolist() == expected


def test_a_new_cache_is_begun_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(engines, "LOOK_CHARACTERS", 100)
    monkeypatch.setattr(engines, "MOST_GROWTH_BYTES", -1_000_000)
    made = []
    renew = engines._Gigatoken._renew
    monkeypatch.setattr(
        engines._Gigatoken, "_renew", lambda self: (made.append(True), renew(self))[1]
    )
    encode = encoder(TOKENIZER, "gigatoken")
    for number in range(50):
        text = f"the thing {number} in the sea"
        assert encode(text).tolist() == TOKENIZER.encode(text)
    assert len(made) > 5


def test_a_difference_is_an_error_that_shows_it(monkeypatch):
    encode = encoder(TOKENIZER, "gigatoken")
    monkeypatch.setattr(engines, "SAMPLED", 3)

    class Wrong:
        def encode(self, text: str) -> list[int]:
            return [1, *TOKENIZER.encode(text)[1:]]

    encode._backend = Wrong()
    with pytest.raises(UserError, match=r"id 0 is \[1, .* in a text that begins 'the sea'"):
        encode("the sea")
    encode._n_pieces = 1  # no longer the first: found by the sample

    def many() -> None:
        for number in range(100):
            encode(f"the sea {number}")

    with pytest.raises(UserError, match="differently from tiktoken"):
        many()


def test_other_tokenizers_have_their_own_encoder():
    tokenizer = char_tokenizer("abc")
    assert encoder(tokenizer)("cab").tolist() == [3, 1, 2]
    with pytest.raises(UserError, match="cannot run a tokenizer of kind char"):
        encoder(tokenizer, "gigatoken")


def test_without_gigatoken_tiktoken_does_it(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    encode = encoder(TOKENIZER, "auto")
    assert not isinstance(encode, engines._Gigatoken)
    assert np.array_equal(encode("the sea"), TOKENIZER.encode("the sea"))
    with pytest.raises(UserError, match="is not installed"):
        encoder(TOKENIZER, "gigatoken")
