"""Opening a split: what the manifest means is what is read."""

from __future__ import annotations

import json

import pytest
from snakegpt.errors import UserError
from snakegpt.tokens import open_split, read_manifest, require_same_tokenizer
from train_fixtures import tokens


def test_shards_follow_one_another(tmp_path):
    path = tokens(tmp_path / "tokens")
    stream = open_split(path, read_manifest(path), "train")
    raw = b"".join(
        (tmp_path / "tokens" / f"train_00000{i}.bin").read_bytes()[1024:] for i in range(2)
    )
    assert stream.read(0, len(stream)).astype("<u2").tobytes() == raw


@pytest.mark.parametrize("content", ["", "[]", '{"tokenizer": {}}', "\x00"])
def test_what_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is no"):
        read_manifest(tmp_path / "manifest.json")


def test_another_number_of_tokens_than_listed_is_refused(tmp_path):
    path = tokens(tmp_path / "tokens")
    manifest = json.loads(path.read_text())
    manifest["splits"]["val"]["shards"][0]["n_tokens"] = 299
    with pytest.raises(UserError, match=r"holds 300 tokens, .* expects 299"):
        open_split(path, manifest, "val")


def test_tokenizers_that_differ_are_both_named():
    require_same_tokenizer("a", "x", "a", "y")
    with pytest.raises(UserError, match=r"x belongs to tokenizer a(.|\n)*y to tokenizer b"):
        require_same_tokenizer("a", "x", "b", "y")
