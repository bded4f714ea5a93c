"""Documents of every kind of file, and what happens to what is no text."""

from __future__ import annotations

import gzip
import json
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from snakegpt import formats
from snakegpt.documents import document as one_document
from snakegpt.documents import files, plain_text, rows
from snakegpt.documents.choice import Counts, TextSettings
from snakegpt.documents.document import Document
from snakegpt.documents.reading import read_documents
from snakegpt.errors import UserError
from tiktoken_ext import openai_public

TEXTS = ["first\r\n", "\ufeffbom, NUL \0, NFD e\u0301", "日本語", "last"]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()

# The patterns of tiktoken's encodings, as it ships them.
with mock.patch.object(openai_public, "load_tiktoken_bpe", return_value={}):
    PATTERNS = [
        encoding()["pat_str"]
        for encoding in (
            openai_public.r50k_base,
            openai_public.cl100k_base,
            openai_public.o200k_base,
        )
    ]


def documents(path, counts=None, **settings):
    found = read_documents(path, TextSettings(**settings), counts or Counts())
    return ["".join(document.chunks()) for document in found]


def file(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


def packed(name, content):
    if name.lower().endswith(".gz"):
        return gzip.compress(content)
    return zstandard.compress(content) if name.lower().endswith(".zst") else content


@pytest.mark.parametrize(
    "name", ["a.txt", "a.text", "a.md", "a", "a.txt.gz", "a.md.zst", "a.gz", "a.b.zst", "A.TXT.GZ"]
)
def test_a_text_file_is_one_document_kept_as_it_is(tmp_path, name):
    text = "".join(TEXTS)
    path = file(tmp_path, name, packed(name, text.encode()))
    assert documents(path) == [text]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.ndjson.zst", "A.JSONL", "a.NDJSON.Zst"]
)
def test_a_line_of_json_is_a_document(tmp_path, name):
    assert documents(file(tmp_path, name, packed(name, LINES + b"\n"))) == TEXTS


@pytest.mark.parametrize(("name", "compression"), [("a.parquet", "snappy"), ("a.PARQUET", "zstd")])
def test_a_row_of_parquet_is_a_document(tmp_path, name, compression):
    path = tmp_path / name
    texts = [f"{text} {i}" for i in range(900) for text in TEXTS]
    pq.write_table(
        pa.table({"id": list(range(3600)), "body": texts}), path, compression=compression
    )
    assert documents(path, text_column="body") == texts


def test_a_separator_divides_text(tmp_path):
    path = file(tmp_path, "a.txt", b"one\n---\ntwo\n---\n\n---\n")
    counts = Counts()
    assert documents(path, counts, document_separator="\n---\n") == ["one", "two"]
    assert counts.dropped == {"empty": 2}


def test_empty_documents_are_dropped_and_counted(tmp_path):
    counts = Counts()
    path = file(tmp_path, "a.jsonl", b'{"text": ""}\n{"text": "a"}\n{"text": null}\n')
    assert documents(path, counts) == ["a"]
    assert documents(file(tmp_path, "b.txt", b""), counts) == []
    table = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": ["", None, "x"]}), table)
    assert documents(table, counts) == ["x"]
    assert counts.dropped == {"empty": 5}


def test_invalid_utf8_is_refused_with_file_and_byte(tmp_path):
    path = file(tmp_path, "a.txt", b"good \xc3\xa9" + b"x" * 2000 + b"\xff bad")
    with pytest.raises(UserError, match=r"a\.txt is not valid UTF-8 at byte 2,007 \(0xff"):
        documents(path)


def test_invalid_utf8_in_a_later_line_is_refused_with_its_byte_in_the_file(tmp_path):
    content = b'{"text": "fine"}\n{"text": "\xff"}\n'
    with pytest.raises(UserError, match=f"at byte {content.index(255)}"):
        documents(file(tmp_path, "a.jsonl", content))


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    counts = Counts()
    path = file(tmp_path, "a.txt", b"a\xffb\xef\xbf\xbdc\xfe")
    assert documents(path, counts, encoding_errors="replace") == ["a\ufffdb\ufffdc\ufffd"]
    assert counts.replaced_bytes == 2  # the one in the middle was there before


@pytest.mark.parametrize("policy", ["refuse", "replace"])
def test_half_a_surrogate_pair_in_json_becomes_one_replacement_character(tmp_path, policy):
    counts = Counts()
    path = file(tmp_path, "a.jsonl", rb'{"text": "a\ud800b \ud83d\ude00 \udc00"}' + b"\n")
    assert documents(path, counts, encoding_errors=policy) == ["a\ufffdb \U0001f600 \ufffd"]
    assert counts.replaced_bytes == 2


def test_a_missing_column_names_those_there_are(tmp_path):
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), table)
    with pytest.raises(UserError, match=r"no column 'text'\. Its columns: id, body"):
        documents(table)
    with pytest.raises(UserError, match=r"line 1 has no key 'text'. Its keys: id, body"):
        documents(file(tmp_path, "a.jsonl", b'{"id": 1, "body": "x"}\n'))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.gz", gzip.compress(b"x" * 1000)[:-4], "is damaged"),
        ("a.txt.gz", gzip.compress(b"x")[:-8] + b"\0" * 8, "is damaged"),
        ("a.txt.gz", b"no gzip", "is damaged"),
        (
            "a.txt.zst",
            zstandard.compress(bytes(range(256)) * 9)[:-5],
            "middle of a zstandard frame",
        ),
        ("a.txt.zst", b"no zstandard", "is damaged"),
        ("a.txt.gz", gzip.compress(b"text") + b"trailing garbage", "is damaged"),
        ("a.txt.zst", zstandard.compress(b"text") + b"trailing garbage", "is damaged"),
        ("a.parquet", b"PAR1 no parquet PAR1", "is damaged or no parquet"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}\n", "line 1 is no JSON"),
        ("a.jsonl", b'{"n": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "line 1 is no JSON"),
        ("a.jsonl", b"[1]\n", "it is a list"),
        ("a.jsonl", b'{"text": 3}\n', "'text' is a int, text is wanted"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as caught:
        documents(file(tmp_path, name, content))
    assert name in str(caught.value)


@pytest.mark.parametrize(("kind", "width"), [(pa.string(), "<i4"), (pa.large_string(), "<i8")])
def test_invalid_utf8_in_a_parquet_string_follows_the_policy(tmp_path, kind, width):
    offsets, content = np.array([0, 2, 5], width).tobytes(), b"okz\xff\xfe"
    values = pa.Array.from_buffers(kind, 2, [None, pa.py_buffer(offsets), pa.py_buffer(content)])
    table, counts = tmp_path / "a.parquet", Counts()
    pq.write_table(pa.table({"text": values}), table)
    with pytest.raises(UserError, match=r"a\.parquet, row 2 is not valid UTF-8 at byte 1 \(0xff"):
        documents(table)
    assert documents(table, counts, encoding_errors="replace") == ["ok", "z\ufffd\ufffd"]
    assert counts.replaced_bytes == 2


def test_all_frames_of_a_zstandard_file_are_read(tmp_path):
    frames = [f"frame {i} ".encode() * 50_000 for i in range(3)]
    content = b"".join(map(zstandard.compress, frames))
    assert documents(file(tmp_path, "a.txt.zst", content)) == [b"".join(frames).decode()]


# ---- large documents, byte ranges and filters ----


@pytest.fixture
def small(monkeypatch):
    """The same code with limits that small texts reach."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 7)
    monkeypatch.setattr(plain_text, "CHUNK_BYTES", 7)
    monkeypatch.setattr(one_document, "LARGE", 50)
    monkeypatch.setattr(one_document, "PIECE", 20)


@pytest.mark.parametrize("separator", [None, "\n\n", "<|end|>", "aba"])
def test_a_text_read_in_small_chunks_is_the_same_text(tmp_path, small, separator):
    text = "één twö <|end|>\n\n\nthree\U0001f600<|end|><|end|>aababa\n\n" * 9
    path = file(tmp_path, "a.txt", text.encode())
    expected = [text] if separator is None else [t for t in text.split(separator) if t]
    found = list(
        read_documents(path, TextSettings(document_separator=separator), Counts(), scratch=tmp_path)
    )
    assert len(found) == len(expected)
    for document, wanted in zip(
        read_documents(path, TextSettings(document_separator=separator), Counts()),
        expected,
        strict=True,
    ):
        assert "".join(document.chunks()) == wanted
        assert "".join(document.pieces()) == wanted
        assert "".join(document.pieces(3, len(wanted) - 2)) == wanted[3:-2]
        assert (document.n_characters, document.n_bytes) == (len(wanted), len(wanted.encode()))
        assert document.digest == Document(wanted).digest


def test_the_place_of_an_invalid_byte_is_right_across_chunks(tmp_path, small):
    content = "ä".encode() * 30 + b"\xff" + b"rest" * 10
    with pytest.raises(UserError, match=r"at byte 60 \(0xff"):
        documents(file(tmp_path, "a.txt", content))
    counts = Counts()
    spelt = "\ufffd".encode()
    replaced = file(tmp_path, "b.txt", spelt + content + spelt * 5 + b"\xc3")
    assert documents(replaced, counts, encoding_errors="replace") == [
        "\ufffd" + "ä" * 30 + "\ufffd" + "rest" * 10 + "\ufffd" * 6
    ]
    assert counts.replaced_bytes == 2


@given(st.text(st.sampled_from("ab1é中 \n\t!'.s\u3000"), max_size=300), st.sampled_from(PATTERNS))
def test_cutting_changes_no_id_of_any_pattern(text, pattern):
    """What the patterns of tiktoken's encodings make of the pieces is what they make of the whole."""
    whole = regex.findall(pattern, text)
    pieces, rest = [], text
    while cut := one_document._last_cut(rest[: len(rest) // 2]):
        pieces += regex.findall(pattern, rest[:cut])
        rest = rest[cut:]
    assert pieces + regex.findall(pattern, rest) == whole


def test_text_without_a_place_to_cut_is_refused_before_memory_ends(tmp_path, small, monkeypatch):
    monkeypatch.setattr(one_document, "MOST_UNCUT", 100)
    (document,) = read_documents(file(tmp_path, "a.txt", b"a" * 500), TextSettings(), Counts())
    with pytest.raises(UserError, match="without white space"):
        list(document.pieces())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 1000])
@pytest.mark.parametrize(
    ("name", "content", "separator"),
    [
        (
            "a.jsonl",
            b'{"text": "one"}\n\n{"text": "two"}\r\n{"text": "\\u00e9"}\n{"text":"x"}',
            None,
        ),
        ("a.txt", b"one<|end|>two<|end|>three<|end|>four", "<|end|>"),
        ("b.txt", "é|ü|aaa|b|".encode(), "|"),
    ],
)
def test_byte_ranges_hold_every_document_once(tmp_path, small, size, name, content, separator):
    path = file(tmp_path, name, content)
    settings = TextSettings(document_separator=separator)
    whole = ["".join(d.chunks()) for d in read_documents(path, settings, Counts())]
    found = []
    for start in range(0, len(content), size):
        span = (start, min(start + size, len(content)))
        found += ["".join(d.chunks()) for d in read_documents(path, settings, Counts(), span=span)]
    assert found == whole
    assert formats.can_be_divided(name, separator)


@pytest.mark.parametrize(
    ("name", "separator"),
    [
        ("a.txt", None),
        ("a.txt", "\n\n"),
        ("a.txt", "aba"),
        ("a.jsonl.gz", None),
        ("a.parquet", None),
    ],
)
def test_other_files_are_not_divided(name, separator):
    assert not formats.can_be_divided(name, separator)


def test_a_json_line_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_LINE_BYTES", 100)
    path = file(tmp_path, "a.jsonl", b'{"text": "short"}\n{"text": "' + b"x" * 100 + b'"}\n')
    with pytest.raises(UserError, match="line 2 is longer than 100 bytes"):
        documents(path)


ROWS = b"""{"text": "a long text", "lang": "en", "score": 3}
{"text": "another one", "lang": "de", "score": 5}
{"text": "short", "lang": "en", "score": 9}
{"text": "", "lang": "en", "score": 9}
"""


def test_filters_and_lengths_drop_and_count(tmp_path):
    path = file(tmp_path, "a.jsonl", ROWS)
    counts = Counts()
    kept = documents(path, counts, filter="lang == 'en' and score > 2", minimum_characters=6)
    assert kept == ["a long text"]
    assert counts.dropped == {"empty": 1, "short": 1, "filter": 1}
    assert documents(path, filter="characters > 10 and 'one' in text") == ["another one"]


def test_filters_read_columns_of_parquet(tmp_path):
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", "y", "z"], "n": [1, 2, 3], "other": [0, 0, 0]}), table)
    assert documents(table, filter="n >= 2") == ["y", "z"]
    with pytest.raises(UserError, match="no column 'm'"):
        documents(table, filter="m >= 2")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("score >", "is no expression"),
        ("scare > 2", r"no column 'scare'.*lang, score"),
        ("score + 'x'", "line 1: the corpus's filter fails"),
        ("__import__('os').system('true')", "no column '__import__'"),
        ("text.__class__", "filter fails"),
        ("9 ** 9 ** 9", "filter fails"),
    ],
)
def test_a_filter_that_fails_is_named(tmp_path, expression, message):
    with pytest.raises(UserError, match=message):
        documents(file(tmp_path, "a.jsonl", ROWS), filter=expression)
