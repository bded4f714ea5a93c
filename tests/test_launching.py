"""Several nodes, played by processes of this machine: the same weights, one failure told, no Slurm no guess.

`srun` and `squeue` are stand-ins that do what Slurm's do for one task a node; tests/test_cluster.py has
the real ones.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from snakegpt import launching, nodes, outcomes
from snakegpt.errors import RETRY, Interrupted, UserError
from snakegpt.launching import advised_environment, network_environment
from snakegpt.nodes import Place, choose_ranks_per_node, on_every_node
from snakegpt.outcomes import Outcome
from snakegpt.settings import Execution
from test_meeting import free_port
from torch.distributed.elastic.multiprocessing.api import SignalException
from train_fixtures import SETTINGS, tokens

SRUN = """\
#!{python}
import os, subprocess, sys
words = sys.argv[1:]
options = [word for word in words if word.startswith("--")][:5]
nodes = int(next(o for o in options if o.startswith("--nodes=")).split("=")[1])
assert f"--ntasks={{nodes}}" in options and "--ntasks-per-node=1" in options, options
command = words[words.index("bash"):]
running = []
for node in range(nodes):
    own = dict(os.environ, SLURM_NODEID=str(node), SLURM_LAUNCH_NODE_IPADDR="127.0.0.1")
    running.append(subprocess.Popen(command, env=own))
sys.exit(max(process.wait() for process in running))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm job of two nodes, its number drawn so that its ports are free."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "srun": SRUN.format(python=sys.executable),
        "squeue": "#!/bin/sh\necho 2\n",
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", str(free_port() % 900 + 50))
    for name in (nodes.NODE, nodes.RENDEZVOUS):
        monkeypatch.delenv(name, raising=False)
    return programs


def training(manifest, out, settings=SETTINGS, **execution):
    how = {"nodes": 2, "ranks_per_node": 1, "device": "cpu", "threads": 1, **execution}
    return [sys.executable, "-m", "snakegpt.stages.train_model", "--tokens", str(manifest),
            "--settings", json.dumps(settings), "--execution", json.dumps(how),
            "--out", str(out), "--state", str(out) + "-state"]  # fmt: skip


def finish(command, environment=None):
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **(environment or {})},
    )


def test_two_nodes_train_what_two_ranks_of_one_machine_do(slurm, tmp_path):
    manifest = tokens(tmp_path / "tokens")
    local = finish(training(manifest, tmp_path / "local", nodes=1, ranks_per_node="auto", ranks=2))
    assert local.returncode == 0, local.stderr
    done = finish(training(manifest, tmp_path / "nodes"))
    assert done.returncode == 0, done.stderr
    for name in ("weights.safetensors", "best.safetensors", "config.json"):
        assert (tmp_path / "nodes" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    start = json.loads((tmp_path / "nodes/metrics.jsonl").read_text().splitlines()[0])
    assert start["ranks"] == 2
    assert list((tmp_path / "local-state/ranks/node0").rglob("1/stderr.log"))
    assert list((tmp_path / "nodes-state/ranks/node1").rglob("stderr.log"))  # what rank 1 printed


@pytest.mark.long
def test_nodes_that_people_start_by_hand_train_alike(tmp_path, monkeypatch):
    manifest = tokens(tmp_path / "tokens")
    port = free_port()
    ends = {}

    def node(number):
        place = {"SNAKEGPT_NODE": f"{number}/2", "SNAKEGPT_RENDEZVOUS": f"127.0.0.1:{port}"}
        ends[number] = finish(training(manifest, tmp_path / "hand"), place)

    threads = [threading.Thread(target=node, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [end.returncode for end in ends.values()] == [0, 0], [
        end.stderr for end in ends.values()
    ]
    assert (tmp_path / "hand/weights.safetensors").exists()


@pytest.mark.parametrize(
    ("present", "told"),
    [
        (0, "no answer from node 1 within 2 s"),
        (1, "nothing listens at 127.0.0.1:{port}: node 0 is not there yet"),
    ],
)
def test_a_node_that_never_comes_is_named_in_bounded_time(tmp_path, present, told):
    manifest = tokens(tmp_path / "tokens")
    port = free_port()
    place = {"SNAKEGPT_NODE": f"{present}/2", "SNAKEGPT_RENDEZVOUS": f"127.0.0.1:{port}"}
    started = time.monotonic()
    done = finish(training(manifest, tmp_path / "alone", hang_timeout_s=2), place)
    assert time.monotonic() - started < 60  # two of them waiting, the rest imports
    assert done.returncode == 2
    assert told.format(port=port) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("nodes", [1, 2])
def test_an_interface_that_does_not_exist_is_named_before_ranks_start(slurm, tmp_path, nodes):
    """gloo would end each rank with a traceback."""
    ranks = {"nodes": 1, "ranks_per_node": "auto", "ranks": 2} if nodes == 1 else {}
    command = training(tokens(tmp_path / "tokens"), tmp_path / "out", **ranks)
    done = finish(command, {"GLOO_SOCKET_IFNAME": "nope0"})
    assert done.returncode == 2, done.stderr
    assert "GLOO_SOCKET_IFNAME = nope0 in the environment, but" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_first_failure_of_any_node_is_told_once(slurm, tmp_path):
    """A learning rate that blows the loss up is found by all ranks in the same step."""
    manifest = tokens(tmp_path / "tokens")
    wild = {**SETTINGS, "training": {**SETTINGS["training"], "learning_rate": 1e30, "rollbacks": 0}}
    done = finish(training(manifest, tmp_path / "wild", wild))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "wild/weights.safetensors").exists()


@pytest.mark.parametrize(
    ("job", "squeue", "reason"),
    [
        (None, "echo 2", r"execution.nodes = 3, but this is no Slurm job(.|\n)*SNAKEGPT_NODE=0/3"),
        ("7", "echo 2", r"execution.nodes = 3, but Slurm job 7 has 2"),
        (
            "7",
            "exit 1",
            r"squeue does not say how many nodes Slurm job 7 has: is the controller down",
        ),
    ],
)
def test_nodes_that_are_not_there_are_refused(slurm, tmp_path, monkeypatch, job, squeue, reason):
    (slurm / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    environment = {"SLURM_JOB_ID": job} if job else {}
    with pytest.raises(UserError, match=reason):
        on_every_node("m", [], nodes=3, threads=1, shared=tmp_path, environment=environment)


def test_a_node_that_never_ended_is_named(slurm, tmp_path):
    """Its shell, which srun killed in the end, could not take its name away."""
    (slurm / "srun").write_text(f"#!/bin/sh\necho node2 > {tmp_path}/1.running\nexit 137\n")
    (tmp_path / "0.running").write_text("left over from a run before")
    with pytest.raises(SystemExit, match=r"never ended: node2, which hangs or is gone"):
        on_every_node(
            "m", [], nodes=2, threads=1, shared=tmp_path, environment={"SLURM_JOB_ID": "7"}
        )


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"status": 1, "text": "rank 0: Connection reset by peer"}, "was killed by SIGKILL"),
        ({}, "was killed by SIGKILL"),
        ({"status": 1, "text": "no progress for 600 s", "again": True}, "no progress"),
        ({"status": 2, "text": "training has diverged"}, "has diverged"),
    ],
)
def test_a_kill_is_told_and_not_what_others_suffer_from_it(tmp_path, found, told):
    outcome = tmp_path / "outcome.json"
    outcome.write_text(json.dumps(found))
    place = Place(1, 2, "127.0.0.1", 1)
    assert told in launching._ended(outcome, place, killed_by=9).text
    assert told in json.loads(outcome.read_text())["text"]


def test_without_srun_the_way_by_hand_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"srun is not installed here(.|\n)*by hand"):
        on_every_node("m", [], nodes=2, threads=1, shared=tmp_path, environment={})


# ---- starting again --------------------------------------------------------------------------


KILLED = Outcome(1, "a rank was killed by SIGKILL", again=True)
ERRED = Outcome(1, "rank 1: Traceback ...")
DONE = Outcome()


def attempts(monkeypatch, endings, *, restarts, steps=()) -> int:
    """How often ranks are started when they end so; `steps` is what is asked of after each end."""
    started = []

    def once(*_, **how):
        started.append(how)
        return endings[len(started) - 1]

    reached = iter([0, *steps, *[0] * 9])
    monkeypatch.setattr(launching, "run_ranks", once)
    with contextlib.suppress(SystemExit):
        launching.launch("module", [], restarts=restarts, progress=lambda: next(reached), ranks=2)
    assert all(how == {"ranks": 2} for how in started)
    return len(started)


def test_ranks_start_again_after_one_was_killed_as_often_as_allowed(monkeypatch, capsys):
    assert attempts(monkeypatch, [KILLED] * 9, restarts=2) == 3
    said = capsys.readouterr().err
    assert said.count("starts again from the last saved state") == 2
    assert attempts(monkeypatch, [KILLED, DONE], restarts=2) == 2
    assert attempts(monkeypatch, [KILLED] * 9, restarts=0) == 1


def test_progress_makes_room_for_new_restarts(monkeypatch):
    # Two restarts are used up when the third attempt saves step 5: then there are two more.
    assert attempts(monkeypatch, [KILLED] * 9, restarts=2, steps=[0, 0, 5, 5, 5]) == 5
    assert attempts(monkeypatch, [KILLED] * 9, restarts=2, steps=[0, 5, 5, 5, 5]) == 4


def test_an_error_of_ours_is_tried_again_only_after_progress(monkeypatch):
    assert attempts(monkeypatch, [ERRED] * 9, restarts=3) == 1
    assert attempts(monkeypatch, [ERRED] * 9, restarts=3, steps=[4, 8, 8]) == 3


def test_less_memory_is_tried_at_once_and_costs_no_restart(monkeypatch, capsys):
    again = Outcome(RETRY, "8 rows at once did not fit on rank 1", again=True)
    assert attempts(monkeypatch, [again, again, DONE], restarts=0) == 3
    assert "did not fit on rank 1; starts again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ({"status": 75, "text": "saved its state at step 7"}, "saved its state at step 7"),
        ({"status": 75, "text": "8 rows did not fit", "again": True}, "8 rows did not fit"),
        ({"status": 1, "text": "no progress for 600 s", "again": True}, "no progress for 600 s"),
        (None, "goes on from the last saved state, if there is one"),
    ],
)
def test_ranks_that_were_asked_to_stop_are_not_started_again(monkeypatch, left, told):
    """Whatever else a rank met on its way out."""

    def asked(command):
        started.append(command)
        if left:
            Path(os.environ[outcomes.OUTCOME]).write_text(json.dumps(left))
        raise SignalException("", signal.SIGTERM)

    started = []
    monkeypatch.setattr("torch.distributed.run.main", asked)
    with pytest.raises(Interrupted, match=told):
        launching.launch("module", [], restarts=3, ranks=2, threads=2)
    assert len(started) == 1
    assert outcomes.OUTCOME not in os.environ


# ---- ranks of a node -------------------------------------------------------------------------


def ranks(rows=12, device="cpu", threads=4, nodes=2, **execution):
    how = Execution(**execution)
    return choose_ranks_per_node(how, nodes=nodes, device=device, rows=rows, threads=threads)


def test_ranks_of_nodes_share_the_rows():
    assert ranks(rows=12, threads=12) == 3  # of the 6 rows of a node
    assert ranks(rows=12, ranks_per_node=2) == 2
    assert ranks(rows=12, nodes=1, ranks=4) == 4


def test_what_nodes_cannot_share_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"12 rows(.|\n)*cannot be shared by 5 nodes"):
        ranks(nodes=5)
    with pytest.raises(UserError, match=r"ranks_per_node = 4 does not divide the 6 rows"):
        ranks(ranks_per_node=4)
    with pytest.raises(UserError, match=r"ranks = 4 counts the ranks of one machine"):
        ranks(ranks=4)
    monkeypatch.setattr(nodes.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"ranks_per_node = 3, but node \S+ has 2 CUDA devices"):
        ranks(ranks_per_node=3, device="cuda")


# ---- advice ----------------------------------------------------------------------------------


def advice(tmp_path, capsys, nodes, measured):
    file = tmp_path / "network.json"
    file.write_text(json.dumps(measured))
    found = advised_environment(file, nodes, label="train_model x")
    return found, capsys.readouterr().err


def test_advice_is_used_and_said(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    host = launching.socket.gethostname()
    name = next(iter(psutil.net_if_addrs()))
    measured = {
        "nodes": [{}, {}],
        "environment": {"NCCL_DEBUG": "WARN"},
        "environment_by_host": {host: {"GLOO_SOCKET_IFNAME": name}, "other": {"NCCL_X": "1"}},
    }
    found, said = advice(tmp_path, capsys, 2, measured)
    assert found == {"GLOO_SOCKET_IFNAME": name}
    assert f"launches with GLOO_SOCKET_IFNAME={name}, NCCL_DEBUG=INFO of the environment" in said


def test_advice_of_an_interface_that_this_host_lacks_is_left_aside(tmp_path, capsys):
    """Slurm gave other nodes than it measured on."""
    measured = {
        "nodes": [{"host": "a"}, {"host": "b"}],
        "environment": {"NCCL_SOCKET_IFNAME": "=nope0", "NCCL_DEBUG": "WARN"},
    }
    found, said = advice(tmp_path, capsys, 2, measured)
    assert found == {}
    assert "was measured on a, b; " in said
    assert "has no interface nope0: its advice is left aside" in said


def test_advice_for_another_number_of_nodes_is_left_aside(tmp_path, capsys):
    measured = {"nodes": [{}], "environment": {"GLOO_SOCKET_IFNAME": "lo"}}
    found, said = advice(tmp_path, capsys, 2, measured)
    assert found == {}
    assert "was measured on 1 node, this is 2 nodes" in said
    assert advised_environment(None, 2, label="x") == {}


def test_only_network_variables_are_taken_from_the_measurement():
    measured = {"environment": {"GLOO_SOCKET_IFNAME": "lo", "NCCL_X": 1, "LD_PRELOAD": "evil.so"}}
    assert network_environment(measured) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_X": "1"}
    assert network_environment({}) == {}


# ---- how ranks end ---


def test_a_full_disk_is_a_message_of_a_rank_too(monkeypatch, tmp_path):
    """Not an error of ours, with a traceback and new attempts."""
    outcome = tmp_path / "outcome.json"
    monkeypatch.setenv(outcomes.OUTCOME, str(outcome))
    monkeypatch.setenv(outcomes.AGENT, str(os.getppid()))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(outcomes, "_die_with", lambda parent: None)
    ended = []
    monkeypatch.setattr(outcomes.os, "_exit", ended.append)
    with outcomes.reporting_outcome():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "store/state/x")
    assert ended == [2]
    told = json.loads(outcome.read_text())
    assert told["status"] == 2
    assert told["text"].startswith("store/state/x: No space left on device.\n  free some:")


def test_an_outcome_that_another_will_tell_only_gives_the_status():
    Outcome().raise_for_status()
    with pytest.raises(SystemExit) as told:
        Outcome(2, "why", shared=True).raise_for_status()
    assert told.value.code == 2
    with pytest.raises(UserError, match="why"):
        Outcome(2, "why").raise_for_status()
