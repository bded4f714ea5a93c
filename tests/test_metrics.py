"""What a run writes: rates against arithmetic, a window that changes nothing, the optional writers."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from snakegpt import metrics
from snakegpt.errors import UserError
from snakegpt.metrics import Audience, Recorder, Work
from test_trainer import trainer
from train_fixtures import metrics as lines_of
from train_fixtures import tokens, train


def work(**changes):
    facts = {
        "label": "train_model gpt2", "steps": 100, "batch_tokens": 1000, "flops_per_token": 10**6,
        "device": "cpu", "device_name": "NVIDIA A100-SXM4-40GB", "precision": "bfloat16",
        "ranks": 2, "micro_batches": 1, "matmul_flops_per_s": 4e9,
    } | changes  # fmt: skip
    return Work(**facts)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def update(recorder, step, busy_s, gradient_norm=1.0):
    rates = {"learning_rate": 1e-3, "muon_learning_rate": 2e-2}
    recorder.trained(
        step, loss=2.5, gradient_norm=gradient_norm, learning_rates=rates, busy_s=busy_s
    )


def test_rates_are_those_since_the_line_before(tmp_path, capsys):
    recorder = Recorder(tmp_path / "m.jsonl", None, work(), Audience(log_interval_s=1e-9))
    update(recorder, 4, busy_s=2.0)
    update(recorder, 10, busy_s=5.0)
    recorder.validated(10, 2.25)
    update(recorder, 20, busy_s=6.0, gradient_norm=float("inf"))
    recorder.close()
    first, second, validation, third = read(tmp_path / "m.jsonl")
    assert first["rate_tokens_per_s"] == 4 * 1000 / 2.0
    assert second["rate_tokens_per_s"] == 6 * 1000 / 3.0
    assert second["mfu"] == round(2000 * 1e6 / (2 * 312e12), 4)
    assert second["matmul_share"] == 2000 * 1e6 / 4e9
    assert second["tokens"] == 10_000
    assert second["muon_learning_rate"] == 2e-2
    assert validation == {"event": "validation", "step": 10, "loss": 2.25}
    assert third["gradient_norm"] is None  # JSON has no infinity
    assert third["matmul_share"] is None  # faster than the product that was measured
    told = capsys.readouterr().err
    assert "loss 2.500" in told
    assert "MFU 0.0%" in told
    assert "val 2.250" in told.splitlines()[-1]


def test_people_see_the_mean_rate_of_the_last_seconds(tmp_path, capsys):
    """And not that of one update, which on a busy machine is anything."""
    recorder = Recorder(tmp_path / "m.jsonl", None, work(), Audience(log_interval_s=1e-9))
    for step, busy_s in enumerate([1.0, 2.0, 6.0, 6.1, 6.2], 1):
        update(recorder, step, busy_s=busy_s)
    update(recorder, 12, busy_s=12.0)
    recorder.close()
    shown = [
        re.search(r"([\d.]+k?) tokens/s", line)[1] for line in capsys.readouterr().err.splitlines()
    ]
    # From the start; then from second 1.0 on, the last mark five seconds ago or more; then from 6.2.
    assert shown == ["1k", "1k", "400", "588", "769", "1.21k"]


def test_a_device_of_no_datasheet_has_no_mfu_and_says_so(tmp_path, capsys):
    recorder = Recorder(tmp_path / "m.jsonl", None, work(device_name="cpu"), Audience(1e-9))
    update(recorder, 4, busy_s=2.0)
    assert recorder.describe()["peak_flops_per_s"] is None
    assert recorder.describe()["datasheet"] is None
    assert read(tmp_path / "m.jsonl")[0]["mfu"] is None
    assert "50% of matmul" in capsys.readouterr().err


def test_a_resumed_run_goes_on_with_its_rates(tmp_path):
    path = tmp_path / "m.jsonl"
    before = Recorder(path, None, work(), Audience())
    for step in (10, 20):
        update(before, step, busy_s=step / 2)
    before.close()
    resumed = Recorder(path, 10, work(), Audience(), done=10, busy_s=5.0)
    update(resumed, 12, busy_s=6.0)
    resumed.close()
    found = read(path)
    assert [line["step"] for line in found] == [10, 12]
    assert found[1]["rate_tokens_per_s"] == 2000


@pytest.fixture
def manifest(tmp_path):
    return tokens(tmp_path / "tokens")


def test_a_window_is_written_at_its_step_and_changes_no_bit(manifest, tmp_path):
    bytes_of = {}
    for name, profile_step in (("with", 4), ("without", None)):
        torch.set_num_threads(1)
        ours = trainer(tmp_path / f"{name}.state", manifest)
        ours.launch = dataclasses.replace(ours.launch, profile_step=profile_step)
        (tmp_path / name).mkdir()
        ours.run(tmp_path / name)
        bytes_of[name] = (tmp_path / name / "weights.safetensors").read_bytes()
    assert bytes_of["with"] == bytes_of["without"]
    assert not lines_of(tmp_path / "without", "parts")
    [found] = lines_of(tmp_path / "with", "parts")
    assert (found["step"], found["steps"]) == (7, 3)  # the updates after 4, 5 and 6
    assert found["forward_s"] > 0
    assert found["backward_s"] > 0
    assert found["optimizer_s"] > 0
    [last] = lines_of(tmp_path / "with", "counters")
    assert last["peak_memory_bytes"] >= last["rss_bytes"] * 0.99
    [start] = lines_of(tmp_path / "with", "start")
    assert start["matmul_flops_per_s"] > 1e8


def test_every_field_is_documented(manifest, tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    ours = trainer(tmp_path / "state", manifest)
    ours.launch = dataclasses.replace(ours.launch, profile_step=2)
    (tmp_path / "out").mkdir()
    ours.run(tmp_path / "out")
    found = read(tmp_path / "out" / "metrics.jsonl")
    assert {line["event"] for line in found} == {
        "start", "train", "validation", "parts", "counters", "end",
    }  # fmt: skip
    for name in {name for line in found for name in line} - {"event"}:
        assert re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize("setting", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_command(monkeypatch, setting):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"python -m pip install {setting}"):
        metrics.require_writers(**{"tensorboard": None, "wandb": None, setting: "runs"})
    metrics.require_writers(None, None)


def test_tensorboard_gets_the_numbers_of_every_line(monkeypatch, tmp_path):
    calls = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            calls.append(("open", log_dir, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    audience = Audience(tensorboard=str(tmp_path / "boards"))
    recorder = Recorder(tmp_path / "m.jsonl", 3, work(device_name="cpu"), audience)
    recorder.write("resume", step=3, ranks=2)
    recorder.write("rolled_back", step=3, reason="a word")
    recorder.write("counters", step=4, gpus=[{"power_w": 410.0, "throttled": []}])
    recorder.validated(5, 1.5)
    recorder.close()
    assert calls == [
        ("open", str(tmp_path / "boards" / "gpt2"), 4),
        ("counters/gpu0_power_w", 410.0, 4),
        ("validation/loss", 1.5, 5),
        "closed",
    ]


def test_a_wandb_run_is_gone_on_with(monkeypatch, tmp_path):
    inits, logged = [], []

    class Run:
        def log(self, numbers):
            logged.append(numbers)

        def finish(self):
            logged.append("finished")

    def init(**how):
        inits.append(how)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resumed in (None, 3):
        recorder = Recorder(tmp_path / "m.jsonl", resumed, work(), Audience(wandb="team"))
        recorder.validated(5, 1.5)
        recorder.close()
    assert inits[0] == inits[1]
    assert inits[0]["project"] == "team"
    assert (inits[0]["name"], inits[0]["resume"]) == ("gpt2", "allow")
    assert logged == 2 * [{"validation/loss": 1.5, "step": 5}, "finished"]


def test_wandb_that_cannot_begin_is_explained(monkeypatch, tmp_path):
    def init(**how):
        raise RuntimeError("no API key configured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(UserError, match=r"no API key(.|\n)*WANDB_MODE=offline"):
        Recorder(tmp_path / "m.jsonl", None, work(), Audience(wandb="team"))


@pytest.mark.parametrize("profile_step", [9, 10, 11])
def test_a_training_that_ends_near_its_window_ends_well(manifest, tmp_path, profile_step):
    """Of twelve steps, with a window of three. A process that exits with an open profile crashes."""
    done = train(manifest, tmp_path / "out", profile_step=profile_step)
    assert done.returncode == 0, done.stderr
    assert len(lines_of(tmp_path / "out", "parts")) == (profile_step == 9)


def test_a_recorder_closed_within_its_window_leaves_no_profile_open(tmp_path):
    recorder = Recorder(tmp_path / "m.jsonl", None, work(), Audience(profile_step=1))
    with recorder.around(1):
        assert torch.autograd._profiler_enabled()
    recorder.close()
    assert not torch.autograd._profiler_enabled()
