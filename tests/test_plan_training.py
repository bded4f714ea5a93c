"""The plan_training stage: the published recipe planned on any machine in seconds."""

from __future__ import annotations

import collections
import json

import pytest
from snakegpt.errors import UserError
from snakegpt.settings import Execution, Model, Training
from snakegpt.stages import plan_training as stage

Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"kind": "gpt2", "n_vocab": 50_257}), encoding="utf-8")
    return path


def make(tokenizer, tmp_path, *, execution=None, training=None, **arguments):
    given = {
        "label": "plan",
        "threads": 2,
        "corpus_bytes": None,
        "validation_fraction": 0.01,
    } | arguments
    execution = Execution.model_validate({"device": "cpu"} | (execution or {}))
    training = Training.model_validate(training or {})
    return stage.plan_training(Model(), training, execution, tokenizer, tmp_path, **given)


def test_the_124m_recipe_is_planned_by_its_command(tokenizer, tmp_path, capsys):
    arguments = ["--tokenizer", str(tokenizer), "--out", str(tmp_path), "--settings", "{}"]
    execution = {
        "device": "cpu",
        "ranks": 2,
        "label": "plan_training gpt2",
        "corpus_bytes": 28_000_000,
    }
    stage.main([*arguments, "--execution", json.dumps(execution)])
    plan = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    assert plan["n_parameters"] == 124_475_904
    assert plan["ranks"] * plan["rows_per_rank"] * plan["accumulation"] == 524_288 // 1024
    assert plan["corpus_tokens_estimate"] == 7_000_000
    told = capsys.readouterr()
    assert "124M" in told.err
    assert "plan_training gpt2" in told.err
    assert not told.out


def test_a_full_disk_stops_before_anything_is_spent(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: Usage(10**10, 10**10, 1000))
    with pytest.raises(UserError, match="disk is too small"):
        make(tokenizer, tmp_path)
    assert not (tmp_path / "plan.json").exists()


def test_too_little_memory_is_said_and_planned_all_the_same(
    tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(stage, "_available_memory", lambda device: 10**9)
    make(tokenizer, tmp_path)
    assert "rows_per_rank lower" in capsys.readouterr().err


def test_a_batch_that_is_no_whole_number_of_rows_names_its_neighbours(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"1,500 is not a multiple.*1,024.*and 2,048"):
        make(tokenizer, tmp_path, training={"batch_tokens": 1500})


def test_ranks_that_do_not_divide_the_rows_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="does not divide"):
        make(tokenizer, tmp_path, execution={"ranks": 3})
