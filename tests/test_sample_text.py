"""The stage: samples.jsonl, the same for the same seed, whatever else is asked for."""

from __future__ import annotations

import json

import pytest
from snakegpt.huggingface_format import save_weights, to_config
from snakegpt.model import GPT, Shape, initialise
from snakegpt.stages import sample_text
from train_fixtures import CHARACTERS, tokenizer

SHAPE = Shape(vocabulary=12, layers=1, heads=1, channels=8, context=8)


@pytest.fixture
def inputs(tmp_path):
    spelling = tokenizer(tmp_path)
    fingerprint = json.loads(spelling.read_text())["fingerprint"]
    config = to_config(
        SHAPE, n_vocab=11, end_of_text=0, tokenizer_fingerprint=fingerprint, model={}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_weights(tmp_path / "best.safetensors", initialise(GPT(SHAPE), 0), fingerprint)
    return {
        "weights": tmp_path / "best.safetensors",
        "config": tmp_path / "config.json",
        "tokenizer": spelling,
    }


def run(inputs, out, **sampling) -> list[dict]:
    roles = [part for role, path in inputs.items() for part in (f"--{role}", str(path))]
    sample_text.main(
        [
            *("--settings", json.dumps({"sampling": sampling})),
            *("--execution", '{"device": "cpu", "threads": 1}'),
            *roles,
            *("--out", str(out)),
        ]
    )
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_every_prompt_is_continued_as_often_as_asked(inputs, tmp_path):
    samples = run(inputs, tmp_path / "out", prompts=["abc", ""], max_tokens=20)
    assert [(s["prompt"], s["sample"]) for s in samples] == [
        ("abc", 0),
        ("abc", 1),
        ("", 0),
        ("", 1),
    ]
    alphabet = sorted(set(CHARACTERS))
    for s in samples:
        assert s["text"] == "".join(alphabet[i - 1] for i in s["ids"])
        assert s["finish_reason"] == ("length" if len(s["ids"]) == 20 else "end_of_text")
    assert len({s["text"] for s in samples}) == 4


def test_a_sample_does_not_depend_on_the_others(inputs, tmp_path):
    few = run(inputs, tmp_path / "few", prompts=["abc"], samples_per_prompt=1, max_tokens=15)
    many = run(inputs, tmp_path / "many", prompts=["abc", "b"], samples_per_prompt=3, max_tokens=15)
    assert many[0] == few[0]
    again = run(inputs, tmp_path / "again", prompts=["abc"], samples_per_prompt=1, max_tokens=15)
    assert again == few
    other = run(inputs, tmp_path / "other", prompts=["abc"], seed=2, max_tokens=15)
    assert other[0]["ids"] != few[0]["ids"]


def test_a_prompt_that_cannot_be_spelt_is_refused(inputs, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(inputs, tmp_path / "out", prompts=["xyz"])
    assert "no id for 'x'" in capsys.readouterr().err


def test_another_tokenizer_is_refused_naming_both(inputs, tmp_path, capsys):
    ours = json.loads(inputs["tokenizer"].read_text())["fingerprint"]
    (tmp_path / "other").mkdir()
    inputs["tokenizer"] = tokenizer(tmp_path / "other", "abc")
    theirs = json.loads(inputs["tokenizer"].read_text())["fingerprint"]
    with pytest.raises(SystemExit, match="2"):
        run(inputs, tmp_path / "out")
    said = capsys.readouterr().err
    assert ours in said and theirs in said
