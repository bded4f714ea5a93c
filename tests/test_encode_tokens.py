"""Tokens of a part: splits, boundaries and counts, recomputed by hand."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct

import pytest
from data_fixtures import pin, stage, write_corpus
from hypothesis import example, given
from hypothesis import strategies as st
from snakegpt.documents.document import Document
from snakegpt.settings import Validation
from snakegpt.splitting import Splitter
from snakegpt.tokenizers import char_tokenizer
from snakegpt.tokens import open_split, read_manifest

LETTERS = "abcdefghijklmnopqrstuvwxyz \n"
POSITION = {"by": "position", "fraction": 0.1}


def split_document(text, validation):
    """(split, text) of each piece."""
    for split, start, stop in Splitter(validation).divide(Document(text), "a.txt"):
        yield split, text[start:stop]


def write_tokenizer(folder, characters=LETTERS):
    path = folder / "tokenizer.json"
    path.write_text(char_tokenizer(characters).to_json(), encoding="utf-8")
    return path


def encode(folder, files, settings, characters=LETTERS, out="out"):
    done = stage(
        "encode_tokens",
        {"part": "000007", **settings},
        folder / out,
        *("--corpus", write_corpus(folder, files)),
        *("--tokenizer", write_tokenizer(folder, characters)),
    )
    return done, folder / out


def ids_of(path):
    content = path.read_bytes()
    return list(struct.unpack(f"<{(len(content) - 1024) // 2}H", content[1024:]))


def by_hand(*texts):
    """The end-of-text id before each text; ids by position in sorted order."""
    order = ["<end>", *sorted(LETTERS)]
    return [order.index(c) for text in texts for c in ("<end>", *text)]


def test_position_takes_the_tail_of_every_document(tmp_path):
    files = {"a.txt": b"abcdefghij", "b.txt": b"klmnopqrstuvwxyz\n"}
    done, out = encode(tmp_path, files, {"validation": POSITION})
    assert done.returncode == 0, done.stderr
    assert ids_of(out / "train_000007.bin") == by_hand("abcdefghi", "klmnopqrstuvwxy")
    assert ids_of(out / "val_000007.bin") == by_hand("j", "z\n")
    part = json.loads((out / "part_000007.json").read_text())
    train = part["splits"]["train"]
    assert (train["n_documents"], train["n_characters"], train["n_text_bytes"]) == (2, 24, 24)
    content = (out / "train_000007.bin").read_bytes()
    (shard,) = train["shards"]
    assert shard == {
        "name": "train_000007.bin",
        "n_tokens": 26,
        **{key: value for key, value in pin("", content).items() if key != "path"},
    }
    names = {path.name for path in out.iterdir()}
    assert names == {"train_000007.bin", "val_000007.bin", "part_000007.json"}


def test_tiny_shakespeare_s_length_is_cut_where_nanogpt_cuts_it():
    pieces = dict(split_document("x" * 1_115_394, Validation(by="position", fraction=0.1)))
    assert len(pieces["train"]) == 1_003_854  # nanoGPT's readme
    assert len(pieces["val"]) == 111_540


@given(st.integers(1, 3000), st.integers(1, 999))
@example(10, 900)  # floor(10 x (1 - 0.9)) is 0 in floats
def test_position_gives_train_exactly_its_share(n_characters, thousandths):
    validation = Validation(by="position", fraction=thousandths / 1000)
    pieces = dict(split_document("x" * n_characters, validation))
    n_train = len(pieces.get("train", ""))
    assert n_train * 1000 <= n_characters * (1000 - thousandths) < (n_train + 1) * 1000
    assert n_train + len(pieces.get("val", "")) == n_characters


def test_a_side_without_characters_is_skipped():
    halves = split_document("x", Validation(by="position", fraction=0.5))
    assert list(halves) == [("val", "x")]


@given(st.lists(st.text(min_size=1)), st.floats(0.01, 0.99))
def test_the_document_split_depends_on_text_and_fraction_alone(texts, fraction):
    for text in texts:
        ((split, piece),) = split_document(text, Validation(by="document", fraction=fraction))
        number = int(hashlib.blake2b(text.encode(), digest_size=16).hexdigest()[:16], 16)
        assert piece == text
        assert split == ("val" if number / 2**64 < fraction else "train")


def test_the_document_split_takes_about_its_fraction():
    validation = Validation(by="document", fraction=0.1)
    splits = [next(split_document(f"document {i}", validation))[0] for i in range(20_000)]
    assert abs(splits.count("val") - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5  # five sigma


def test_only_the_files_of_the_part_are_read_and_bytes_repeat(tmp_path):
    files = {"a.txt": b"one", "b.txt": b"two two", "c.txt.gz": gzip.compress(b"three three")}
    wanted = [pin(name, files[name]) for name in ("b.txt", "c.txt.gz")]
    settings = {"files": wanted, "validation": {"by": "position", "fraction": 0.5}}
    done, first = encode(tmp_path, files, settings)
    assert done.returncode == 0, done.stderr
    assert ids_of(first / "train_000007.bin") == by_hand("two", "three")
    _, second = encode(tmp_path, files, settings, out="again")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_empty_documents_and_replaced_bytes_are_counted(tmp_path):
    files = {"a.txt": b"ab\xffcd--" + b"--efgh", "b.txt": b""}
    text = {"document_separator": "--", "encoding_errors": "replace"}
    done, out = encode(
        tmp_path, files, {"text": text, "validation": POSITION}, characters=LETTERS + "\ufffd"
    )
    assert done.returncode == 0, done.stderr
    part = json.loads((out / "part_000007.json").read_text())
    assert part["dropped"] == {"empty": 2}
    assert part["replaced_bytes"] == 1
    train, val = part["splits"]["train"], part["splits"]["val"]
    assert train["n_text_bytes"] + val["n_text_bytes"] == len("ab\ufffdcdefgh".encode())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"abc\xff"}, "a.txt is not valid UTF-8 at byte 3"),
        ({"a.txt": "abc ü".encode()}, "no id for 'ü' (U+00FC)"),
        ({"a.txt.gz": gzip.compress(b"abc")[:-3]}, "a.txt.gz is damaged"),
        ({"a.jsonl": b'{"body": "abc"}\n'}, "has no key 'text'. Its keys: body"),
    ],
)
def test_a_bad_file_is_one_message_and_status_2(tmp_path, files, message):
    done, _ = encode(tmp_path, files, {"validation": POSITION})
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"colunm": "body"}, "unknown setting text.colunm"),
        ({"encoding_errors": "ignore"}, "text.encoding_errors"),
    ],
)
def test_a_mistyped_text_setting_is_refused(tmp_path, text, message):
    done, _ = encode(tmp_path, {"a.txt": b"abc"}, {"text": text, "validation": POSITION})
    assert done.returncode == 2
    assert message in done.stderr


def test_a_missing_raw_file_is_named(tmp_path):
    files = {"a.txt": b"abc"}
    settings = {"files": [pin("gone.txt", b"")], "validation": POSITION}
    done, _ = encode(tmp_path, files, settings)
    assert done.returncode == 2
    assert "gone.txt is missing" in done.stderr


def test_a_million_spaces_in_a_corpus_do_not_stop_it(tmp_path):
    done, out = encode(tmp_path, {"a.txt": b" " * 1_000_000 + b"x"}, {"validation": POSITION})
    assert done.returncode == 0, done.stderr
    n_tokens = [len(ids_of(out / name)) for name in ("train_000007.bin", "val_000007.bin")]
    assert sum(n_tokens) == 1_000_001 + 2


def test_a_raw_file_that_is_not_the_locked_one_is_refused(tmp_path):
    locked = [pin("a.txt", b"abc")]
    done, _ = encode(tmp_path, {"a.txt": b"abd"}, {"files": locked, "validation": POSITION})
    assert done.returncode == 2
    assert "a.txt is not the file that was locked" in done.stderr
    assert locked[0]["sha256"] in done.stderr
    assert hashlib.sha256(b"abd").hexdigest() in done.stderr


def test_more_characters_than_uint16_counts_are_uint32_ids_that_batches_read(tmp_path):
    letters = "".join(map(chr, range(0x10000, 0x20000)))  # 65,536, and the end-of-text id
    files = {"a.txt": letters.encode()}
    done, out = encode(tmp_path, files, {"part": "000000", "validation": POSITION}, letters)
    assert done.returncode == 0, done.stderr
    done = stage("index_tokens", {}, out, "--parts", out / "part_000000.json")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out / "manifest.json")
    assert manifest["dtype"] == "uint32"
    val = open_split(out / "manifest.json", manifest, "val")
    assert val.read(len(val) - 3, len(val)).tolist() == [65_534, 65_535, 65_536]
    assert val.read(0, 1).tolist() == [0]


def test_what_a_header_cannot_count_goes_on_in_a_further_shard(tmp_path, monkeypatch):
    """As if a header counted to 1,000: the stage in this process, read back as one stream."""
    from snakegpt import shards
    from snakegpt.stages import encode_tokens, index_tokens

    corpus = write_corpus(tmp_path, {"a.txt": b"the cat sat on the mat " * 200})
    tokenizer, settings = write_tokenizer(tmp_path), {"validation": POSITION}
    words = [
        "--corpus",
        str(corpus),
        "--tokenizer",
        str(tokenizer),
        "--settings",
        json.dumps(settings),
    ]
    encode_tokens.main([*words, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr(shards, "MOST_TOKENS", 1000)
    encode_tokens.main([*words, "--out", str(tmp_path / "cut")])
    read = {}
    for name in ("whole", "cut"):
        folder = tmp_path / name
        manifest = index_tokens.index_tokens([folder / "part_000000.json"])
        stream = open_split(folder / "manifest.json", manifest, "train")
        read[name] = stream.read(0, len(stream)).tolist()
    assert read["cut"] == read["whole"] and len(read["cut"]) > 4000
    names = [shard["name"] for shard in manifest["splits"]["train"]["shards"]]
    assert names == ["train_000000.bin", *(f"train_000000_{n}.bin" for n in range(1, 5))]
