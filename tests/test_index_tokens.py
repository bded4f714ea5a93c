"""The manifest adds its parts up and refuses parts that do not belong together."""

from __future__ import annotations

import base64
import json
import zlib

import numpy as np
import pytest
from data_fixtures import stage
from snakegpt.errors import UserError
from snakegpt.stages.index_tokens import index_tokens


def id_counts(counts):
    """As parts write them."""
    packed = zlib.compress(np.array(counts, "<i8").tobytes())
    return base64.b64encode(packed).decode("ascii")


def part(number, train=(10, 2), val=(5, 1), fingerprint="a" * 64, empty=0, replaced=0):
    """A part_*.json by hand; train and val are (tokens, documents)."""

    def split(name, n_tokens, n_documents):
        shard = {
            "name": f"{name}_{number:06d}.bin",
            "sha256": f"{number:064x}",
            "bytes": 1024 + 2 * n_tokens,
            "n_tokens": n_tokens,
        }
        n_characters = 3 * n_tokens
        return {
            "shards": [shard],
            "n_documents": n_documents,
            "n_text_bytes": 4 * n_tokens,
            "n_characters": n_characters,
            "lengths": {"4": n_documents} if n_documents else {},
            "id_counts": id_counts([0, n_documents, n_tokens - n_documents]),
        }

    return {
        "tokenizer": {"fingerprint": fingerprint, "n_vocab": 9, "end_of_text": 0, "kind": "char"},
        "splits": {"train": split("train", *train), "val": split("val", *val)},
        "dropped": {"empty": empty},
        "replaced_bytes": replaced,
    }


def write(folder, *parts):
    paths = [folder / f"part_{number:06d}.json" for number in range(len(parts))]
    for path, content in zip(paths, parts, strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_parts_are_added_up_in_order_and_empty_shards_left_out(tmp_path):
    parts = [part(0, empty=1), part(1, val=(0, 0), replaced=4), part(2, train=(7, 3), empty=2)]
    manifest = index_tokens(write(tmp_path, *parts))
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    assert [shard["name"] for shard in train["shards"]] == [f"train_{i:06d}.bin" for i in range(3)]
    assert [shard["name"] for shard in val["shards"]] == ["val_000000.bin", "val_000002.bin"]
    assert (train["n_tokens"], train["n_documents"], train["n_text_bytes"]) == (27, 7, 108)
    assert (val["n_tokens"], val["n_documents"]) == (10, 2)
    assert manifest["dropped"] == {"empty": 3}
    assert train["lengths"] == {"4": 7}
    assert train["most_common_ids"] == [[2, 20], [1, 7]]
    assert train["bytes_per_token"] == 4.0
    assert manifest["replaced_bytes"] == 4
    assert manifest["dtype"] == "uint16"
    assert manifest["tokenizer"] == parts[0]["tokenizer"]


@pytest.mark.parametrize(("n_vocab", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_vocabulary_decides_the_type_of_ids(tmp_path, n_vocab, dtype):
    one = part(0)
    one["tokenizer"]["n_vocab"] = n_vocab
    assert index_tokens(write(tmp_path, one))["dtype"] == dtype


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "wants at least one"),
        ([part(0), part(1, fingerprint="b" * 64)], r"part_000001\.json by tokenizer b{64}"),
        ([part(0, val=(0, 0))], "the validation split has no document"),
        ([part(0, train=(0, 0))], "the training split has no document"),
        ([part(0, train=(0, 0), val=(0, 0), empty=3)], "the corpus is empty"),
        ([{"splits": {}}], r"part_000000\.json is no description of a part"),
    ],
)
def test_parts_that_make_no_token_set_are_refused(tmp_path, parts, message):
    with pytest.raises(UserError, match=message):
        index_tokens(write(tmp_path, *parts))


def test_the_stage_names_the_way_out_and_ends_with_status_2(tmp_path):
    paths = write(tmp_path, part(0, val=(0, 0)))
    done = stage("index_tokens", {}, tmp_path / "out", "--parts", *paths)
    assert done.returncode == 2
    assert "raise validation.fraction" in done.stderr
    assert "validation.by: position" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
