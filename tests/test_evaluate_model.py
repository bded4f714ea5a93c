"""The stage: evaluation.json of a model, and what does not belong together."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from snakegpt.huggingface_format import save_weights, to_config
from snakegpt.model import GPT, Shape, initialise
from snakegpt.stages import evaluate_model
from train_fixtures import shard, tokenizer, tokens

SHAPE = Shape(vocabulary=12, layers=1, heads=1, channels=8, context=8)


@pytest.fixture
def inputs(tmp_path):
    """A model that knows nothing, tokens and tokenizer that belong together."""
    spelling = tokenizer(tmp_path)
    fingerprint = json.loads(spelling.read_text())["fingerprint"]
    manifest = tokens(tmp_path / "tokens", fingerprint=fingerprint)
    config = to_config(
        SHAPE, n_vocab=11, end_of_text=0, tokenizer_fingerprint=fingerprint, model={}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = initialise(GPT(SHAPE), 0)
    save_weights(tmp_path / "last.safetensors", model, fingerprint)
    with torch.no_grad():
        model.token_embedding.weight.zero_()  # every id alike
    save_weights(tmp_path / "best.safetensors", model, fingerprint)
    return {
        "weights": tmp_path / "last.safetensors",
        "best": tmp_path / "best.safetensors",
        "config": tmp_path / "config.json",
        "tokens": manifest,
        "tokenizer": spelling,
    }


def run(inputs, out, settings=None) -> dict:
    roles = [part for role, path in inputs.items() for part in (f"--{role}", str(path))]
    evaluate_model.main(
        [
            *("--settings", json.dumps(settings or {})),
            *("--execution", '{"device": "cpu", "threads": 1}'),
            *roles,
            *("--out", str(out)),
        ]
    )
    return json.loads((out / "evaluation.json").read_text())


def test_both_weights_are_scored_on_the_whole_split(inputs, tmp_path):
    found = run(inputs, tmp_path / "out")
    assert found["split"] == "val"
    assert found["n_tokens"] == 299
    ends = sum(1 for i in range(2001, 2300) if i % 100 == 0)  # the fixture's end-of-text ids
    assert found["n_bytes"] == 299 - ends
    assert found["best"]["loss_nats"] == pytest.approx(math.log(12), rel=1e-6)
    assert found["best"]["perplexity"] == pytest.approx(12, rel=1e-5)
    assert found["best"]["bits_per_byte"] == pytest.approx(math.log2(12), rel=1e-6)
    assert found["weights"] != found["best"]
    again = run(inputs, tmp_path / "again")
    assert again == found
    names = {"evaluation.json"}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names


def test_equal_weights_are_scored_once(inputs, tmp_path, capsys):
    shutil.copy(inputs["best"], inputs["weights"])
    found = run(inputs, tmp_path / "out")
    assert found["weights"] == found["best"]
    assert "best weights" not in capsys.readouterr().err


def test_a_limit_of_tokens_is_kept(inputs, tmp_path):
    found = run(inputs, tmp_path / "out", {"evaluation": {"tokens": 50}})
    assert found["n_tokens"] == 50


def test_a_split_without_a_byte_of_text_is_refused(inputs, tmp_path, capsys):
    entry = json.loads(inputs["tokens"].read_text())
    fingerprint = entry["tokenizer"]["fingerprint"]
    val = shard(tmp_path / "tokens" / "val_000000.bin", np.zeros(9, "<u2"), fingerprint)
    entry["splits"]["val"]["shards"] = [val]
    inputs["tokens"].write_text(json.dumps(entry))
    with pytest.raises(SystemExit, match="2"):
        run(inputs, tmp_path / "out")
    assert "cannot be scored: no target token decodes to a byte" in capsys.readouterr().err


@pytest.mark.parametrize("stranger", ["tokens", "tokenizer"])
def test_what_another_tokenizer_made_is_refused_naming_both(inputs, tmp_path, capsys, stranger):
    theirs = "cd" * 32
    if stranger == "tokens":
        inputs["tokens"] = tokens(tmp_path / "other", fingerprint=theirs)
    else:
        (tmp_path / "other").mkdir()
        inputs["tokenizer"] = tokenizer(tmp_path / "other", "abc")
        theirs = json.loads(inputs["tokenizer"].read_text())["fingerprint"]
    ours = json.loads(inputs["config"].read_text())["snakegpt"]["tokenizer_fingerprint"]
    with pytest.raises(SystemExit, match="2"):
        run(inputs, tmp_path / "out")
    said = capsys.readouterr().err
    assert ours in said and theirs in said
    assert str(inputs["config"]) in said and str(inputs[stranger]) in said


def test_weights_of_another_tokenizer_or_shape_are_refused(inputs, tmp_path, capsys):
    save_weights(inputs["weights"], initialise(GPT(SHAPE), 0), "cd" * 32)
    with pytest.raises(SystemExit, match="2"):
        run(inputs, tmp_path / "out")
    assert "trained with tokenizer " + "cd" * 32 in capsys.readouterr().err
    inputs["weights"].write_bytes(b"no weights at all")
    with pytest.raises(SystemExit, match="2"):
        run(inputs, tmp_path / "out")
    assert "last.safetensors is no model that its config.json describes" in capsys.readouterr().err
