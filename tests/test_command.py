"""The stages' common command line: every mistake is one message, status 2 and no traceback."""

from __future__ import annotations

import json

import pytest
from snakegpt.command import read_json, stage_parser
from snakegpt.errors import UserError
from snakegpt.stages import bench_network, evaluate_model, plan_training, sample_text
from train_fixtures import tokenizer, tokens


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (b"{", (), "x.json is not valid JSON"),
        (b'"\xff"', (), "x.json is not valid JSON"),
        (b"[1]", ("kind",), "x.json has no kind"),
        (b'{"kind": 1}', ("kind", "n_vocab", "size"), "x.json has no n_vocab and no size"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path, content, keys, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(path, *keys)


def test_a_file_that_is_what_it_should_be_is_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"kind": "char", "more": [1]}', encoding="utf-8")
    assert read_json(path, "kind") == {"kind": "char", "more": [1]}


@pytest.mark.parametrize(
    ("value", "message"),
    [("@nowhere.json", "cannot read nowhere.json"), ("{", "not valid JSON"), ("[1]", "object")],
)
def test_settings_that_are_no_json_object_are_refused(
    capsys, tmp_path, monkeypatch, value, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        stage_parser("A stage.").parse_args(["--settings", value, "--out", "out"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "{}"])
@pytest.mark.parametrize(
    ("stage", "damaged"),
    [
        (evaluate_model, "config"),
        (sample_text, "config"),
        (plan_training, "tokenizer"),
        (bench_network, "tokenizer"),
    ],
)
def test_a_damaged_input_of_a_stage_is_one_message(tmp_path, capsys, stage, damaged, content):
    """The configuration of a model, or the tokenizer where only its size is read."""
    broken = tmp_path / "broken.json"
    broken.write_text(content, encoding="utf-8")
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    files = {
        "weights": weights,
        "best": weights,
        "config": broken,
        "tokens": tokens(tmp_path / "tokens"),
        "tokenizer": broken if damaged == "tokenizer" else tokenizer(tmp_path),
    }
    roles = {
        evaluate_model: ("weights", "best", "config", "tokens", "tokenizer"),
        sample_text: ("weights", "config", "tokenizer"),
    }.get(stage, ("tokenizer",))
    words = [word for role in roles for word in (f"--{role}", str(files[role]))]
    words += ["--execution", json.dumps({"device": "cpu"}), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        stage.main(words)
    assert "broken.json" in capsys.readouterr().err
