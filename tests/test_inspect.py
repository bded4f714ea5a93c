"""What a shard says of itself, counted by hand; and what is no shard."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
from snakegpt.errors import UserError
from snakegpt.inspect import inspect, main
from snakegpt.shards import ShardWriter
from snakegpt.tokenizers import char_tokenizer

TOKENIZER = char_tokenizer("abc \n")  # ids: 0 ends a text, then \n, space, a, b, c
TEXTS = ["abc", "a b", "", "cc\na"]


def ids(*texts):
    return [i for text in texts for i in (0, *TOKENIZER.encode(text))]


@pytest.fixture
def results(tmp_path):
    """results/ as the pipeline leaves it: a token set and its tokenizer among others."""
    for name, characters in (("letters", "abc \n"), ("other", "xyz")):
        folder = tmp_path / "results" / "tokenizers" / name
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(char_tokenizer(characters).to_json())
    tokens = tmp_path / "results" / "tokens" / "x-letters"
    tokens.mkdir(parents=True)
    splits = {}
    for split, texts in (("train", TEXTS), ("val", ["ab"])):
        with ShardWriter(tokens / f"{split}_000000.bin", TOKENIZER.fingerprint) as writer:
            writer.add(ids(*texts))
        shard = {"name": writer.path.name, "bytes": writer.shard.bytes}
        splits[split] = {"n_tokens": writer.n_tokens, "n_documents": len(texts), "shards": [shard]}
    tokenizer = {"fingerprint": TOKENIZER.fingerprint, "n_vocab": 6, "end_of_text": 0}
    manifest = {"tokenizer": tokenizer, "dtype": "uint16", "splits": splits}
    (tokens / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "results"


def shard_of(results):
    return results / "tokens/x-letters/train_000000.bin"


def foreign(path, values, magic=20240520, version=1, letter="H", n_tokens=None):
    """As llm.c and modded-nanogpt write it: three numbers, 253 zeros, ids."""
    words = (magic, version, len(values) if n_tokens is None else n_tokens)
    content = struct.pack("<256i", *words, *[0] * 253)
    path.write_bytes(content + struct.pack(f"<{len(values)}{letter}", *values))
    return path


def test_a_shard_is_described_and_its_tokenizer_found(results):
    facts = inspect(shard_of(results), n_documents=2, n_tokens=3)
    wanted = ids(*TEXTS)
    assert facts["dtype"] == "uint16"
    assert facts["n_tokens"] == len(wanted)
    assert facts["n_documents"] == 4
    assert (facts["min_id"], facts["max_id"]) == (0, 5)
    assert facts["fingerprint"] == TOKENIZER.fingerprint
    assert facts["bytes"] == facts["expected_bytes"] == 1024 + 2 * len(wanted)
    assert facts["fits"]
    assert facts["tokenizer"].endswith("tokenizers/letters/tokenizer.json")
    assert facts["first"] == [
        {"place": 0, "ids": [0, 3, 4], "text": "<|endoftext|>ab"},
        {"place": 4, "ids": [0, 3, 2], "text": "<|endoftext|>a "},
    ]


def test_every_document_can_be_shown(results):
    first = inspect(shard_of(results), n_documents=9)["first"]
    assert [begin["text"] for begin in first] == [f"<|endoftext|>{text}" for text in TEXTS]


def test_a_manifest_is_described_by_split(results):
    facts = inspect(results / "tokens/x-letters/manifest.json", n_documents=1)
    assert facts["fits"]
    assert facts["splits"]["train"]["n_documents"] == 4
    assert facts["splits"]["val"]["first"] == [
        {"place": 0, "ids": ids("ab"), "text": "<|endoftext|>ab"}
    ]


def test_the_command_prints_for_people_and_for_programs(results, capsys, monkeypatch):
    monkeypatch.chdir(results.parent)
    with pytest.raises(SystemExit) as end:
        main([str(shard_of(results))])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for words in ("shard of snakegpt", "uint16", "as the header means", "documents    4", "0 to 5"):
        assert words in text
    assert '"<|endoftext|>cc\\na"' not in text  # the fourth document; three are shown
    with pytest.raises(SystemExit):
        main(["results/tokens/x-letters/manifest.json", "--json"])
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["n_shards"] == 1


def test_a_shard_cut_short_is_read_as_far_as_it_goes(results, capsys):
    path = shard_of(results)
    path.write_bytes(path.read_bytes()[:-3])
    facts = inspect(path)
    assert not facts["fits"]
    assert facts["n_documents"] == 4
    manifest = results / "tokens/x-letters/manifest.json"
    for damaged in (path, manifest):
        with pytest.raises(SystemExit) as end:
            main([str(damaged)])
        assert end.value.code == 1
        assert "DAMAGED" in capsys.readouterr().out


def test_a_missing_shard_of_a_manifest_is_named(results):
    shard_of(results).unlink()
    facts = inspect(results / "tokens/x-letters/manifest.json")
    assert facts["splits"]["train"]["problems"] == ["train_000000.bin is missing"]


def test_foreign_shards_have_ids_and_with_a_tokenizer_text(results, tmp_path):
    path = foreign(tmp_path / "fineweb_val_000000.bin", ids("abc", "cab"))
    alone = inspect(path, n_tokens=5)
    assert alone["fingerprint"] is alone["n_documents"] is alone["tokenizer"] is None
    assert alone["first"] == [{"place": 0, "ids": ids("abc", "cab")[:5], "text": None}]
    known = inspect(path, results / "tokenizers/letters/tokenizer.json")
    assert known["n_documents"] == 2
    assert known["first"][1]["text"] == "<|endoftext|>cab"


def test_wide_ids_are_read(tmp_path):
    path = foreign(tmp_path / "llama.bin", [7, 128_000], 20240801, 7, "I")
    facts = inspect(path)
    assert facts["dtype"] == "uint32" and facts["max_id"] == 128_000 and facts["fits"]


def test_an_id_beyond_the_vocabulary_is_said(results, tmp_path, capsys):
    path = foreign(tmp_path / "x.bin", [0, 3, 500])
    with pytest.raises(SystemExit):
        main([str(path), "--tokenizer", str(results / "tokenizers/letters/tokenizer.json")])
    assert "0 to 500: BEYOND the tokenizer's 6" in capsys.readouterr().out


def test_another_tokenizer_than_the_shards_is_refused(results):
    with pytest.raises(UserError, match="was encoded by"):
        inspect(shard_of(results), results / "tokenizers/other/tokenizer.json")


def test_an_empty_shard_is_one(tmp_path):
    facts = inspect(foreign(tmp_path / "empty.bin", []))
    assert facts["fits"] and facts["max_id"] is None and facts["first"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no shard: 0 bytes"),
        (b"text", "is no shard: 4 bytes"),
        (b"PAR1" + bytes(2000), "but a parquet file"),
        (b"\x93NUMPY" + bytes(2000), "but a numpy array"),
        (b"MMIDIDX\0\0" + bytes(2000), "but an index of Megatron"),
        (b"\x1f\x8b" + bytes(2000), "but a gzip file"),
        (struct.pack("<600H", *range(600)), "says nothing of itself"),
        (struct.pack("<256i", 20240520, 1, -5, *[0] * 253), "20240520, 1, -5 instead of"),
        (b'{"a": 1}', "has no tokenizer and no splits"),
        (b"{", "is not valid JSON"),
        (b'{"tokenizer": {}, "splits": {"train": {"shard": 1}}}', "lists no shards"),
    ],
)
def test_what_is_no_shard_is_said(tmp_path, content, message):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        inspect(path)


def test_a_folder_and_nothing_are_no_shards(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        inspect(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        inspect(tmp_path / "none")


def test_it_starts_without_torch():
    code = "import sys, snakegpt.inspect, snakegpt.tokens; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
