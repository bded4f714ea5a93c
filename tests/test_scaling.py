"""Scaling: efficiencies by their definition, verdicts that change where they should, a run of real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from snakegpt import scaling
from snakegpt.stages.measure_scaling import _counts
from train_fixtures import tokens


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (6, [1, 2, 4, 6])],
)
def test_ranks_double_up_to_all(ranks, wanted):
    assert scaling.counts(ranks) == wanted


def test_nodes_double_after_the_ranks_of_one_and_shares_are_even():
    assert _counts(4, 3, rows=48) == [1, 2, 4, 8, 12]
    assert _counts(2, 1, rows=6) == [1, 2]
    assert _counts(4, 1, rows=6) == [1, 2]  # 4 does not divide 6 rows


def run(ranks, step_s, communication_s=0.0, accumulation=2):
    return {
        "ranks": ranks,
        "step_s": step_s,
        "compute_s": step_s - communication_s,
        "communication_s": communication_s,
        "data_s": 0.0,
        "idle_s": 0.0,
        "accumulation": accumulation,
    }


def test_efficiencies_follow_their_definition():
    # Weak: the same work a rank, 1 s alone and 1.25 s on four. Strong: 4 s of work on four in 1.6 s.
    found = scaling.efficiencies([run(1, 1.0), run(4, 1.25)], [run(1, 4.0), run(4, 1.6)])
    assert found[0] == {"ranks": 1, "weak": 1.0, "strong": 1.0}
    assert found[1] == {"ranks": 4, "weak": pytest.approx(0.8), "strong": pytest.approx(0.625)}


def test_ranks_that_alone_hold_the_model_are_what_more_of_them_are_compared_with():
    found = scaling.efficiencies([run(4, 1.0), run(8, 1.25)], [run(4, 2.0), run(8, 1.6)])
    assert found[0] == {"ranks": 4, "weak": 1.0, "strong": 1.0}
    assert found[1] == {"ranks": 8, "weak": pytest.approx(0.8), "strong": pytest.approx(0.625)}


def test_a_strategy_that_was_asked_for_is_not_recommended():
    """By name in the settings, whatever fits: nobody looked."""
    facts = {"gradient_bytes": 10**8, "batch_tokens": 1000, "steps": 1, "strategy": "fsdp"}
    for communication_s, kind in ((0.05, "fine"), (0.6, "wire")):
        strong = [run(1, 2.0), run(2, 1.0, communication_s)]
        found = scaling.verdict(strong, **facts, asked_for=True)
        assert found["kind"] == kind
        assert "do not fit" not in found["text"]


@pytest.mark.parametrize(
    ("communication_s", "alone_s", "strategy", "kind"),
    [
        (0.05, 2.0, "ddp", "fine"),
        (0.20, 2.0, "ddp", "accumulate"),
        (0.60, 2.0, "ddp", "wire"),
        (0.20, 0.9, "ddp", "wire"),  # slower than one rank alone
        (0.05, 2.0, "fsdp", "fsdp"),
    ],
)
def test_the_verdict_changes_where_it_should(communication_s, alone_s, strategy, kind):
    strong = [run(1, alone_s), run(2, 1.0, communication_s)]
    found = scaling.verdict(
        strong, gradient_bytes=10**8, batch_tokens=1000, steps=3600, strategy=strategy
    )
    assert found["kind"] == kind
    assert found["predicted_s"] == 3600
    assert "expect 1k tokens/s and 1:00:00 for all 3,600 steps" in found["text"]


def test_the_wire_that_is_wanted_follows_from_a_ring():
    """0.9 s of computing leaves 0.1 s, in which a ring of two sends 2 x 1/2 x 100 MB over each link."""
    found = scaling.verdict(
        [run(1, 2.0), run(2, 1.5, 0.6)],
        gradient_bytes=10**8, batch_tokens=1000, steps=1, strategy="ddp",
    )  # fmt: skip
    assert "8Gbit/s between ranks would bring it to 10%" in found["text"]


@pytest.mark.parametrize(
    ("communication_s", "strategy", "told"),
    [(0.6, "ddp", True), (0.2, "zero1", True), (0.05, "ddp", False), (0.6, "fsdp", False)],
)
def test_half_the_bytes_are_named_where_they_would_help(communication_s, strategy, told):
    strong = [run(1, 2.0), run(2, 1.0, communication_s)]
    facts = {"gradient_bytes": 10**8, "batch_tokens": 700, "steps": 1, "strategy": strategy}
    text = scaling.verdict(strong, **facts, halvable=True)["text"]
    assert ("gradient_exchange = bfloat16" in text) == told
    if communication_s == 0.6:
        assert ("at best 1k tokens/s" in text) == told  # 0.3 s less of 1 s
    assert "gradient_exchange" not in scaling.verdict(strong, **facts, halvable=False)["text"]


def measured(tmp_path, environment=None):
    settings = {
        "model": {"layers": 1, "heads": 2, "channels": 16, "context": 16, "vocabulary_multiple": 1},
        "training": {"batch_tokens": 128, "steps": 100, "warmup_steps": 1},
    }
    command = [
        sys.executable,
        "-m",
        "snakegpt.stages.measure_scaling",
        "--tokens",
        str(tokens(tmp_path / "tokens")),
    ]
    command += ["--settings", json.dumps(settings), "--out", str(tmp_path)]
    command += ["--execution", json.dumps({"ranks": 2, "device": "cpu", "threads": 2})]
    environment = {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


# For a rank of so few that they cannot hold the model.
TOO_FEW = """
import os
if int(os.environ.get("WORLD_SIZE", 9)) <= {most}:
    import snakegpt.scaling as scaling
    def measure(*arguments, **named):
        raise MemoryError("no room for the model")
    scaling.measure = measure
"""


@pytest.mark.parametrize(("most", "status"), [(1, 0), (2, 2)])
def test_fewer_ranks_than_the_model_wants_are_left_out(tmp_path, most, status):
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(TOO_FEW.format(most=most))
    paths = os.pathsep.join([str(tmp_path / "hook"), os.environ.get("PYTHONPATH", "")])
    done = measured(tmp_path, {"PYTHONPATH": paths})
    assert done.returncode == status, done.stderr
    assert "1 of 2 ranks failed: MemoryError: no room for the model" in done.stderr
    if status:
        assert "error: 2 ranks failed: " in done.stderr
        assert not (tmp_path / "scaling.json").exists()
        return
    found = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    assert [row["ranks"] for row in found["strong"]] == [2]
    assert found["failed"] == [{"ranks": 1, "reason": "MemoryError: no room for the model"}]
    assert "Not measured: 1 rank, MemoryError: no room for the model." in found["verdict"]["text"]


def test_real_ranks_are_measured_on_real_tokens(tmp_path):
    done = measured(tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    for kind in ("weak", "strong"):
        assert [row["ranks"] for row in found[kind]] == [1, 2]
        for row in found[kind]:
            assert row["steps"] == 20
            assert row["compute_s"] > 0
            assert 0 <= row["data_s"] < row["step_s"]
            assert row["communication_s"] == pytest.approx(
                max(0, row["step_s"] - row["compute_s"]) if row["ranks"] > 1 else 0
            )
    assert [row["rows"] for row in found["strong"]] == [8, 8]  # 128 / 16, shared out
    assert found["weak"][1]["rows"] % 2 == 0
    assert found["verdict"]["predicted_s"] == pytest.approx(100 * found["strong"][-1]["step_s"])
