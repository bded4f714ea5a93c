"""The plan_training stage: the published recipe planned on any machine in seconds."""

from __future__ import annotations

import collections
import json
import subprocess
import sys

import pytest
from snakegpt.errors import UserError
from snakegpt.settings import Execution, Model, Training
from snakegpt.stages import plan_training as stage
from train_fixtures import ENVIRONMENT

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
        "prices": {},
        "arguments": [],
    } | arguments
    chosen = {"device": "cpu", "calibration_steps": None} | (execution or {})
    execution = Execution.model_validate(chosen)
    training = Training.model_validate(training or {})
    return stage.plan_training(Model(), training, execution, tokenizer, tmp_path, **given)


def test_the_124m_recipe_is_planned_by_its_command(tokenizer, tmp_path, capsys):
    arguments = ["--tokenizer", str(tokenizer), "--out", str(tmp_path), "--settings", "{}"]
    execution = {
        "device": "cpu",
        "ranks": 2,
        "calibration_steps": None,
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
    with pytest.raises(UserError, match=r"1,500 is not a multiple(.|\n)*1,024 and 2,048"):
        make(tokenizer, tmp_path, training={"batch_tokens": 1500})


def test_ranks_that_do_not_divide_the_rows_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="does not divide"):
        make(tokenizer, tmp_path, execution={"ranks": 3})


def planned(tokenizer, tmp_path, **how):
    make(tokenizer, tmp_path, **how)
    return json.loads((tmp_path / "plan.json").read_text("utf-8"))


def test_a_missing_package_is_said_with_the_plan(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        make(tokenizer, tmp_path, execution={"wandb": "project"})


def test_the_deterministic_mode_is_planned_as_it_trains(tokenizer, tmp_path):
    """512 rows in 64 micro-batches of 8, which two ranks share, one thread each."""
    how = {"deterministic": True, "ranks": 2}
    plan = planned(tokenizer, tmp_path, execution=how, threads=8)
    names = ("ranks", "rows_per_rank", "accumulation", "threads", "strategy")
    assert [plan[name] for name in names] == [2, 8, 32, 1, "ddp"]
    with pytest.raises(UserError, match="strategy ddp alone"):
        make(tokenizer, tmp_path, execution={**how, "strategy": "fsdp"})


def test_several_nodes_share_the_step_that_is_planned(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stage, "measure_matmul", lambda *_: 1e12)
    how = {"strategy": "fsdp", "ranks_per_node": 2}
    one = planned(tokenizer, tmp_path, execution={**how, "ranks": 2})
    four = planned(tokenizer, tmp_path, execution={**how, "nodes": 4, "calibration_steps": 20})
    assert (four["ranks"], four["nodes"]) == (8, 4)
    assert four["rows_per_rank"] * four["accumulation"] * 8 == 524_288 // 1024
    assert four["time_estimate_s"] == pytest.approx(one["time_estimate_s"] / 4)
    # Slices are of a node, so the states take what they take on one.
    for part in ("weights", "gradients", "optimizer"):
        assert four["memory_bytes"][part] == one["memory_bytes"][part]
    said = capsys.readouterr().err
    assert "tries no steps: they are of 4 nodes" in said
    assert "8 ranks on 4 nodes x" in said
    with pytest.raises(UserError, match=r"set execution\.ranks_per_node"):
        make(tokenizer, tmp_path, execution={"nodes": 4, "ranks": 2})


def test_a_run_that_continues_is_planned_from_where_it_begins(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "measure_matmul", lambda *_: 1e12)
    training = {"steps": 1000, "validation_interval": 250}
    whole = planned(tokenizer, tmp_path, training=training)
    rest = planned(tokenizer, tmp_path, training=training, steps_done=750)
    assert rest["tokens"] == whole["tokens"] / 4
    for time in ("time_estimate_s", "validation_time_estimate_s"):
        assert rest[time] == pytest.approx(whole[time] / 4)
    times = [[row["time_s"] for row in plan["gpus"] if row["fits"]] for plan in (whole, rest)]
    assert times[1] == pytest.approx([time / 4 for time in times[0]])


SMALL = {
    "model": {"layers": 2, "heads": 2, "channels": 32, "context": 32},
    "training": {"batch_tokens": 256, "steps": 500, "warmup_steps": 5},
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_calibration_is_an_artefact_of_its_own_and_gives_the_time(tmp_path, ranks):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps({"kind": "char", "n_vocab": 65}), encoding="utf-8")
    how = {"device": "cpu", "threads": ranks, "ranks": ranks, "calibration_steps": 8}
    command = [
        *(sys.executable, "-m", "snakegpt.stages.plan_training", "--tokenizer", str(tokenizer)),
        *("--settings", json.dumps(SMALL | {"prices": {"H100": 2.5}})),
        *("--execution", json.dumps(how), "--out", str(tmp_path)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text("utf-8"))
    measured = json.loads((tmp_path / "calibration.json").read_text("utf-8"))
    assert measured["steps"] == 5  # without the warm-up
    assert plan["calibration"] == measured
    assert plan["time_estimate_s"] == pytest.approx(500 * measured["step_s"])
    assert plan["rate_tokens_per_s_estimate"] == pytest.approx(256 / measured["step_s"])
    assert measured["peak_memory_bytes"] > 1e8
    assert "5 steps measured" in done.stderr
    assert "cost" in done.stderr


def test_steps_that_fail_on_several_ranks_are_planned_without(
    tokenizer, tmp_path, monkeypatch, capsys
):
    """The training that follows takes a smaller micro-batch where memory ends; a plan must not stop it."""

    def failing(*_, **__):
        raise SystemExit("error: rank 1: TooLarge")

    monkeypatch.setattr(stage.launching, "launch", failing)
    monkeypatch.setattr(stage, "_why_not_tried", lambda *_: None)
    plan = planned(tokenizer, tmp_path, execution={"calibration_steps": 4, "ranks": 2})
    assert plan["calibration"] is None
    assert not (tmp_path / "calibration.json").exists()
    said = capsys.readouterr().err
    assert said.index("error: rank 1: TooLarge") < said.index("plans without the steps")


def test_without_room_nothing_is_tried(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "_available_memory", lambda device: 10**9)
    make(tokenizer, tmp_path, execution={"calibration_steps": 20, "ranks": 1})
    assert "no room to try it" in capsys.readouterr().err
    assert not (tmp_path / "calibration.json").exists()
    assert json.loads((tmp_path / "plan.json").read_text("utf-8"))["calibration"] is None
