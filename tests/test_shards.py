"""The shard format, read back by a reader written from the format's description alone."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from snakegpt.errors import UserError
from snakegpt.shards import ShardWriter, header, read_shard

FINGERPRINT = hashlib.sha256(b"some tokenizer").hexdigest()


def write(path, *groups, fingerprint=FINGERPRINT, n_vocab=65_536):
    with ShardWriter(path, fingerprint, n_vocab) as writer:
        for ids in groups:
            writer.add(ids)
    return writer.shard


def plain_read(content):
    """llm.c's dataloader in standard-library Python."""
    words = struct.unpack("<256i", content[:1024])
    assert words[0] == 20240520
    assert words[1] == 1
    assert len(content) == 1024 + 2 * words[2]
    return words, list(struct.unpack(f"<{words[2]}H", content[1024:]))


def test_a_plain_reader_finds_the_tokens_the_fingerprint_and_nothing_else(tmp_path):
    path = tmp_path / "train_000000.bin"
    shard = write(path, [0, 1, 65_535], np.array([50_256, 7]))
    content = path.read_bytes()
    words, ids = plain_read(content)
    assert ids == [0, 1, 65_535, 50_256, 7]
    assert struct.pack("<8i", *words[8:16]).hex() == FINGERPRINT
    assert words[16] == 2
    assert not any(words[3:8]) and not any(words[17:])
    assert shard.name == "train_000000.bin"
    assert shard.n_tokens == 5
    assert shard.bytes == 1034
    assert shard.sha256 == hashlib.sha256(content).hexdigest()


def test_more_ids_than_uint16_holds_make_llama_3_s_shard_of_llm_c(tmp_path):
    path = tmp_path / "train_000000.bin"
    shard = write(path, [0, 65_536], np.array([100_276]), n_vocab=100_277)
    content = path.read_bytes()
    words = struct.unpack("<256i", content[:1024])
    assert words[:3] == (20240801, 7, 3)
    assert struct.unpack("<3I", content[1024:]) == (0, 65_536, 100_276)
    assert struct.pack("<8i", *words[8:16]).hex() == FINGERPRINT
    assert words[16] == 4
    assert not any(words[3:8]) and not any(words[17:])
    assert (shard.n_tokens, shard.bytes) == (3, 1036)
    assert read_shard(path, fingerprint=FINGERPRINT).dtype == np.uint32


@pytest.mark.parametrize(("n_vocab", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_vocabulary_decides_how_wide_an_id_is(tmp_path, n_vocab, dtype):
    path = tmp_path / "x.bin"
    for ids in ([], [n_vocab - 1]):
        write(path, ids, n_vocab=n_vocab)
        found = read_shard(path)
        assert (found.dtype, found.tolist()) == (dtype, ids)


@given(st.data(), st.sampled_from([65_536, 2**32]))
def test_what_is_written_is_read(tmp_path_factory, data, n_vocab):
    groups = data.draw(st.lists(st.lists(st.integers(0, n_vocab - 1), max_size=20), max_size=5))
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    write(path, *groups, n_vocab=n_vocab)
    assert read_shard(path, fingerprint=FINGERPRINT).tolist() == [i for ids in groups for i in ids]


def test_a_shard_of_another_program_is_read(tmp_path):
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + struct.pack("<3H", 5, 6, 7))
    assert read_shard(path).tolist() == [5, 6, 7]
    wide = tmp_path / "llama3_val_000000.bin"
    wide.write_bytes(
        struct.pack("<256i", 20240801, 7, 2, *[0] * 253) + struct.pack("<2I", 5, 10**5)
    )
    assert read_shard(wide).tolist() == [5, 100_000]
    with pytest.raises(UserError, match=r"was encoded by tokenizer 0{64}"):
        read_shard(path, fingerprint=FINGERPRINT)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:500], "shorter than its header"),
        (lambda content: content[:-1], "its header of 3 tokens means 1,030"),
        (lambda content: content + b"\0\0", "has 1,032 bytes"),
        (lambda content: b"\0" + content[1:], "begins with"),
        (lambda content: content[:4] + b"\x07" + content[5:], "instead of 20240520, 1"),
        (lambda content: struct.pack("<2i", 20240801, 7) + content[8:], "means 1,036"),
    ],
)
def test_a_damaged_shard_is_refused(tmp_path, damage, message):
    path = tmp_path / "x.bin"
    write(path, [1, 2, 3])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        read_shard(path)


@pytest.mark.parametrize(
    ("ids", "error"), [([65_536], OverflowError), (np.array([65_536]), AssertionError)]
)
def test_an_id_that_does_not_fit_never_wraps(tmp_path, ids, error):
    with pytest.raises(error), ShardWriter(tmp_path / "x.bin", FINGERPRINT) as writer:
        writer.add(ids)
    assert not list(tmp_path.iterdir())  # an unfinished shard is none


def test_more_tokens_than_the_header_can_count_are_refused(tmp_path):
    with ShardWriter(tmp_path / "x.bin", FINGERPRINT) as writer:
        writer.n_tokens = 2**31 - 2
        writer.add([1])
        with pytest.raises(UserError, match="all that its header can count"):
            writer.add([1])


def test_an_empty_shard_is_a_header(tmp_path):
    path = tmp_path / "val_000000.bin"
    assert write(path).bytes == 1024
    assert path.read_bytes() == header(0, FINGERPRINT)
    assert read_shard(path).tolist() == []
