"""Documents of every kind of file, and what happens to what is no text."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from snakegpt.documents import Counts, TextSettings, read_documents
from snakegpt.errors import UserError

TEXTS = ["first\r\n", "\ufeffbom, NUL \0, NFD e\u0301", "日本語", "last"]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def documents(path, counts=None, **settings):
    return list(read_documents(path, TextSettings(**settings), counts or Counts()))


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
