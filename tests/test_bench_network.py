"""The bench_network stage as the runner calls it: real ranks over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import psutil
import pytest
from snakegpt.network.collectives import message_sizes
from test_meeting import free_port

MODEL = {"layers": 1, "heads": 2, "channels": 64, "context": 32, "vocabulary_multiple": 4}
N_VOCAB = 1001
# 1,004 x 64 + 32 x 64 embeddings, 12 C^2 + 13 C of the block, 2 C of the last norm
GRADIENT_BYTES = 4 * (1004 * 64 + 32 * 64 + 12 * 64**2 + 13 * 64 + 2 * 64)


@pytest.fixture
def bench(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps({"kind": "char", "n_vocab": N_VOCAB}), encoding="utf-8")
    settings = json.dumps({"model": MODEL, "machine": {"host": "here"}})

    def run(**execution):
        out = tmp_path / "out"
        command = [sys.executable, "-m", "snakegpt.stages.bench_network", "--settings", settings]
        command += ["--execution", json.dumps({"device": "cpu", "label": "bench", **execution})]
        command += ["--tokenizer", str(tokenizer), "--out", str(out)]
        # Without iperf3, so that the test says the same everywhere.
        environment = {**os.environ, "PATH": os.path.dirname(sys.executable)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        found = out / "network.json"
        return done, json.loads(found.read_text("utf-8")) if found.exists() else None

    return run


def test_two_ranks_are_measured_up_to_the_gradients(bench):
    done, found = bench(ranks=2, threads=2, batch_tokens=256)
    assert done.returncode == 0, done.stderr
    assert found["gradient_bytes"] == GRADIENT_BYTES
    assert found["ranks"] == 2
    assert found["backend"] == "gloo"
    assert found["machine"] == {"host": "here"}
    assert [row["bytes"] for row in found["all_reduce"]] == message_sizes(GRADIENT_BYTES)
    for row in found["all_reduce"]:
        assert row["n_wrong"] == 0
        assert row["algbw_gb_per_s"] == pytest.approx(row["bytes"] / row["time_s"] / 1e9)
        assert row["busbw_gb_per_s"] == pytest.approx(row["algbw_gb_per_s"])  # 2 (n - 1) / n = 1
    assert 0 < found["latency_s"] < 1
    assert found["environment"] == {}  # the defaults work on one machine
    assert [trial["name"] for trial in found["trials"]] == ["defaults"]
    for name in ("reduce_scatter", "all_gather"):
        for row in found[name]:
            assert row["bytes"] % 8 == 0  # whole elements for each rank
            assert row["busbw_gb_per_s"] == pytest.approx(row["algbw_gb_per_s"] / 2)  # (n - 1) / n
    assert found["interface"]["loopback"]
    assert found["iperf3"] is None
    assert found["reason"] == {"iperf3": "iperf3 is not installed"}


def test_one_rank_has_nothing_to_sum_and_says_so(bench):
    done, found = bench(ranks=1)
    assert done.returncode == 0, done.stderr
    assert found["ranks"] == 1
    assert found["all_reduce"] == []
    assert found["latency_s"] is None
    assert "one process" in found["reason"]["all_reduce"]
    assert found["environment"] == {}


def test_ranks_that_training_could_not_use_are_refused(bench):
    done, found = bench(ranks=3, batch_tokens=256)
    assert done.returncode == 2
    assert "does not divide" in done.stderr
    assert "Traceback" not in done.stderr
    assert found is None


HAS_IPV6 = any(a.address == "::1" for of in psutil.net_if_addrs().values() for a in of)


@pytest.mark.parametrize("host", ["localhost", "[::1]"] if HAS_IPV6 else ["localhost"])
def test_two_nodes_measure_their_link_and_each_other(tmp_path, host):
    """Both on this machine, as people start them by hand; tests/test_network_lab.py has wires between them."""
    how = {"device": "cpu", "ranks_per_node": 1, "network_test_s": 1, "threads": 1}
    command = [sys.executable, "-m", "snakegpt.stages.bench_network", "--out", str(tmp_path)]
    command += ["--settings", json.dumps({"model": {**MODEL, "vocabulary_multiple": 1}})]
    command += ["--execution", json.dumps(how)]
    plain = {**os.environ, "PATH": os.path.dirname(sys.executable), "OMP_NUM_THREADS": "1"}
    rendezvous = f"{host}:{free_port()}"
    nodes = []
    for node in range(2):
        place = {"SNAKEGPT_NODE": f"{node}/2", "SNAKEGPT_RENDEZVOUS": rendezvous}
        nodes.append(
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=plain | place)
        )
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in nodes]
    assert [status for _, status in ends] == [0, 0], ends
    found = json.loads((tmp_path / "network.json").read_text(encoding="utf-8"))
    (link,) = found["links"]
    assert "plain TCP" in link["method"]
    assert min(link[way]["bits_per_second"] for way in ("up", "down")) > 1e7
    assert [node["speed"]["matmul_flops_per_s"] > 0 for node in found["nodes"]] == [True, True]
    assert found["ranks"] == 2
    assert all(row["n_wrong"] == 0 for row in found["all_reduce"])
