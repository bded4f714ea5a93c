"""Repeated documents and what evaluation texts hold too are found, counted and left out."""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import pytest
from data_fixtures import pin, stage, write_corpus
from snakegpt.shards import read_shard
from snakegpt.stages.screen_documents import _repeated
from snakegpt.tokenizers import char_tokenizer

LINES = ["alpha beta gamma", "delta", "alpha beta gamma", "eps zeta", "delta", "delta", "eta"]
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def screen(folder, content, against=(), **settings):
    corpus = write_corpus(folder / "corpus", content)
    roles = ["--corpus", corpus, *(["--against", *against] if against else [])]
    done = stage("screen_documents", settings, folder / "out", *roles)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out/drops.json").read_text())


def test_later_copies_are_duplicates_wherever_they_stand(tmp_path):
    files = {"a.jsonl": jsonl(LINES[:3]), "b.jsonl": jsonl(LINES[3:])}
    drops = screen(tmp_path, files, deduplicate=True)
    assert drops["dropped"] == {"a.jsonl": {"duplicate": [2]}, "b.jsonl": {"duplicate": [1, 2]}}
    assert (drops["n_documents"], drops["n_duplicates"], drops["n_overlapping"]) == (7, 3, None)


def test_byte_ranges_of_a_file_are_screened_as_the_file_is(tmp_path):
    content = jsonl(LINES)
    middle = len(jsonl(LINES[:4])) - 3
    entry = pin("a.jsonl", content)
    files = [{**entry, "from": 0, "to": middle}, {**entry, "from": middle, "to": len(content)}]
    drops = screen(tmp_path, {"a.jsonl": content}, deduplicate=True, files=files)
    assert drops["dropped"] == {
        "a.jsonl": {"duplicate": [2]},
        f"a.jsonl@{middle}": {"duplicate": [0, 1]},
    }


def test_against_a_set_of_python():
    draw = random.Random(3)
    texts = [draw.randbytes(1) for _ in range(2000)]
    digests = bytearray(b"".join(hashlib.blake2b(t, digest_size=16).digest() for t in texts))
    seen, expected = set(), []
    for number, text in enumerate(texts):
        if text in seen:
            expected.append(number)
        seen.add(text)
    assert _repeated(digests).tolist() == expected
    assert not len(_repeated(bytearray()))


@pytest.mark.parametrize("drop", [True, False])
def test_overlaps_with_an_evaluation_text_are_counted_and_dropped(tmp_path, drop):
    evaluation = write_corpus(tmp_path / "exam", {"e.txt": b"The quick brown Fox, jumps over!"})
    texts = ["a quick, brown FOX jumps", "the quick brown dog", "quick brown fox"]
    drops = screen(
        tmp_path,
        {"a.jsonl": jsonl(texts)},
        against=[evaluation],
        words=4,
        drop=drop,
    )
    assert drops["n_overlapping"] == 1
    assert drops["overlaps"] == [{"file": "a.jsonl", "sequence": "quick brown fox jumps"}]
    assert drops["dropped"] == ({"a.jsonl": {"overlap": [0]}} if drop else {})


def test_encoding_leaves_out_what_was_found(tmp_path):
    files = {"a.jsonl": jsonl(LINES)}
    screen(tmp_path, files, deduplicate=True)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(char_tokenizer(LETTERS).to_json())
    done = stage(
        "encode_tokens",
        {"validation": {"by": "position", "fraction": 0.001}},
        tmp_path / "tokens",
        "--corpus",
        tmp_path / "corpus/corpus.json",
        "--tokenizer",
        tokenizer,
        "--drops",
        tmp_path / "out/drops.json",
    )
    assert done.returncode == 0, done.stderr
    part = json.loads((tmp_path / "tokens/part_000000.json").read_text())
    assert part["dropped"] == {"empty": 0, "duplicate": 3}
    ids = np.concatenate(
        [read_shard(tmp_path / f"tokens/{split}_000000.bin") for split in ("train", "val")]
    )
    assert (ids == 0).sum() >= 4
    assert part["splits"]["train"]["n_documents"] == 4
