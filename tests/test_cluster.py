"""The pipeline on a real Slurm: every rule by the profile, training over two nodes, interrupted.

`make test-cluster`; needs root and Debian's slurm-wlm and munge.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from cluster_project import EXECUTION, ClusterProject
from slurm_lab import Slurm, missing
from snakegpt.training_state import newest_step

pytestmark = [
    pytest.mark.long,
    pytest.mark.cluster,
    pytest.mark.skipif(missing() is not None, reason=f"no Slurm for tests: {missing()}"),
]
LIMIT_S = 900
TOKENS = "results/tokens/generated-generated_char/manifest.json"
LOCAL = {"ranks": 2, "device": "cpu", "deterministic": True}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(3, tmp_path_factory.mktemp("slurm") / "lab") as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory, slurm):
    """A project with its corpus locked; the path is plain, as Slurm's own scripts want it."""
    project = ClusterProject(tmp_path_factory.mktemp("cluster"), slurm)
    done = project.call("snakegpt.stages.lock_corpora", "--configfile", "config.yaml", "mine.yaml")
    assert done.returncode == 0, done.stderr
    return project


def weights_of_two_local_ranks(project: ClusterProject, folder: str) -> bytes:
    """The last weights of the same training on this machine, undisturbed and without Snakemake."""
    code = (
        "import json; from snakegpt.settings import load_files, science;"
        "e = load_files(['config.yaml', 'mine.yaml']).experiment('tiny');"
        "print(json.dumps({'model': science(e.model), 'training': science(e.training)}))"
    )
    settings = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project.folder, env=project.environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    done = project.call(
        "snakegpt.stages.train_model", "--settings", settings, "--tokens", TOKENS,
        "--execution", json.dumps({**LOCAL, "threads": 2}), "--out", folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return project.weights(folder)


def losses_of(folder: Path) -> list[tuple[str, int, float]]:
    """The last losses of a training, on its own batch and on the validation split."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(line["event"], line["step"], line["loss"]) for line in lines if "loss" in line]
    return [
        next(each for each in reversed(found) if each[0] == kind)
        for kind in ("train", "validation")
    ]


def test_from_text_to_report_on_two_nodes(locked):
    process = locked.start("report_tiny")
    assert process.wait(LIMIT_S) == 0, locked.words() + locked.training_log()
    words = locked.words()
    jobs = {rule for rule in re.findall(r"rule (\w+):", words) if rule != "report_tiny"}
    assert jobs >= {
        "bench_network",
        "plan_training",
        "train_model",
        "evaluate_model",
        "encode_parts",
    }
    assert "localrule encode_tokens:" in words  # what that job encoded is looked up
    assert (locked.folder / "results/reports/tiny/report.html").stat().st_size > 0
    network = json.loads((locked.folder / "results/networks/tiny/network.json").read_text())
    assert len({node["host"] for node in network["nodes"]} & {"node1", "node2", "node3"}) == 2
    assert network["ranks"] == 2
    assert len(network["links"]) == 1
    assert locked.metrics()[0]["ranks"] == 2
    assert locked.weights() == weights_of_two_local_ranks(locked, "local")
    assert losses_of(locked.folder / "results/models/tiny") == losses_of(locked.folder / "local")
    again = locked.start("report_tiny")
    assert again.wait(LIMIT_S) == 0
    assert "Nothing to be done" in locked.words()


# ---- what ends a job -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(locked):
    """The last weights of a training long enough to be met on its way; all before it is done."""
    training = "experiments.tiny.training"
    locked.set(f"{training}.steps", 300)
    locked.set(f"{training}.validation_interval", 150)
    process = locked.start("plan_tiny", "results/networks/tiny/network.json", TOKENS)
    assert process.wait(LIMIT_S) == 0, locked.words()
    return weights_of_two_local_ranks(locked, "undisturbed")


def cancelled(project, job):
    project.slurm.command(0, ["scancel", job])


def requeued(project, job):
    project.slurm.command(0, ["scontrol", "requeue", job])


def preempted_and_requeued(project, job):
    preempt(project, "REQUEUE", 0)
    ends(project, job, 60)
    assert re.search("JobState=PENDING .* Restarts=1", shown(project, job), re.DOTALL)
    assert "saved its state at step" in project.said_by(job)


def preempted_and_cancelled(project, job):
    preempt(project, "CANCEL", 0)
    ends(project, job, 60)
    assert "JobState=PREEMPTED" in shown(project, job)
    assert "saved its state at step" in project.said_by(job)


def preempted_with_grace(project, job):
    """Asked to leave, the job does, and so ends by itself."""
    preempt(project, "CANCEL", 60)
    ends(project, job, 60)
    assert "JobState=FAILED" in shown(project, job)
    assert "saved its state at step" in project.said_by(job)


def preempt(project, mode, grace_s):
    """A job of a better partition wants one of the training's nodes for some seconds."""
    how = [f"PreemptMode={mode}", f"GraceTime={grace_s}"]
    project.slurm.command(0, ["scontrol", "update", "PartitionName=cpu", *how])
    urgent = ["sbatch", "--partition=urgent", "--exclusive", "--nodelist=node2"]
    project.slurm.command(0, [*urgent, "--output=/dev/null", "--wrap=sleep 10"])


def short_of_time(project, job):
    """Less is left than the profile's --signal wants: Slurm sends it, within the 30 s that it looks in."""
    project.slurm.command(0, ["scontrol", "update", f"job={job}", "TimeLimit=3"])
    ends(project, job, 90)
    assert "JobState=FAILED" in shown(project, job)
    assert "saved its state at step" in project.said_by(job)


def rank_killed(project, job):
    rank = min(pid for pid in project.slurm.pids(2) if variable(pid, "RANK") == "1")
    os.kill(rank, signal.SIGKILL)
    ends(project, job, 120)
    assert "a rank on node 1 (node2) was killed by SIGKILL" in project.said_by(job)


def node_hangs(project, job):
    """All that the job has on one of its nodes stands still; Slurm's own daemons there do not."""
    for pid in project.slurm.pids(2):
        if not Path(f"/proc/{pid}/comm").read_text().startswith("slurm"):
            os.kill(pid, signal.SIGSTOP)
    ends(project, job, HANG["hang_timeout_s"] + HANG["stop_timeout_s"] + 120)
    said = project.said_by(job)
    assert "no progress for" in said
    assert "never ended: node2, which hangs or is gone" in said


def node_lost(project, job):
    project.slurm.lose_node(2)


def first_node_lost(project, job):
    """The one that the rule's own command, rank 0 and the rendezvous are on."""
    project.slurm.lose_node(1)


def node_frozen(project, job):
    """All of a node stands still, Slurm's daemons too; Slurm gives it up after its SlurmdTimeout, 30 s here."""
    project.slurm.freeze(2)
    ends(project, job, 120)
    assert "node2" in project.said_by(job)
    assert "node2" in project.slurm.command(0, ["sinfo", "-h", "-t", "down", "-o", "%N"])


HANG = {"hang_timeout_s": 30, "stop_timeout_s": 5}


def shown(project, job):
    return project.slurm.command(0, ["scontrol", "show", "job", job])


def ends(project, job, limit_s):
    deadline = time.monotonic() + limit_s
    while project.slurm.command(0, ["squeue", "-h", "-j", job, "-t", "R,CG,SI"]):
        assert time.monotonic() < deadline, project.said_by(job)
        time.sleep(0.5)


def variable(process: int, name: str) -> str | None:
    """Of the environment of a process."""
    try:
        text = Path(f"/proc/{process}/environ").read_bytes().decode()
    except OSError:
        return None
    return dict(pair.partition("=")[::2] for pair in text.split("\0")).get(name)


@contextlib.contextmanager
def on_its_way(project, *, hooks="", bit_per_s=1e6):
    """A training that has saved a state, whose steps wait for the wire meanwhile; yields its job.

    After that Snakemake brings it to its end, or fails.
    """
    project.forget_training()
    project.slurm.shape(2, "eth0", bit_per_s)
    process = project.start("train_tiny", hooks=hooks)
    states = project.folder / "store/state"
    try:
        project.wait_until(lambda: any(map(newest_step, states.glob("*"))), process)
        yield project.jobs_of("train_model")[0]
    finally:
        project.slurm.unshape(2, "eth0")
    assert process.wait(LIMIT_S) == 0, project.words() + project.training_log()


WAYS = {
    cancelled: None,
    requeued: None,
    preempted_and_requeued: None,
    preempted_and_cancelled: None,
    preempted_with_grace: None,
    short_of_time: None,
    rank_killed: None,
    node_hangs: None,
    node_frozen: lambda slurm: slurm.thaw(2),
    node_lost: lambda slurm: slurm.bring_back(2),
    first_node_lost: lambda slurm: slurm.bring_back(1),
}


@pytest.mark.parametrize(("way", "mended"), WAYS.items(), ids=[way.__name__ for way in WAYS])
def test_an_interrupted_training_goes_on_and_ends_alike(locked, undisturbed, way, mended):
    locked.set("experiments.tiny.execution", EXECUTION | (HANG if way is node_hangs else {}))
    with on_its_way(locked) as job:
        way(locked, job)
    assert any(line["event"] == "resume" for line in locked.metrics()), locked.training_log()
    assert locked.weights() == undisturbed
    if mended:
        mended(locked.slurm)


# For a rank: as one that is busy elsewhere, in a driver or a filesystem that does not answer.
DEAF = """
import os, signal
if "RANK" in os.environ:
    handle = signal.signal
    deaf = (signal.SIGTERM, signal.SIGUSR1)
    signal.signal = lambda n, what: handle(n, signal.SIG_IGN if n in deaf else what)
"""


def test_what_does_not_leave_at_its_limit_is_killed_and_loses_what_it_did_since_it_saved(
    locked, undisturbed
):
    """Slurm asks, again at the limit, and kills KillWait (30 s) later."""
    locked.set("experiments.tiny.execution", EXECUTION)
    with on_its_way(locked, hooks=DEAF, bit_per_s=2e5) as job:
        locked.slurm.command(0, ["scontrol", "update", f"job={job}", "TimeLimit=1"])
        ends(locked, job, 180)
        assert "JobState=TIMEOUT" in shown(locked, job)
        assert "saved its state at step" not in locked.said_by(job)
        reached = [line for line in locked.state_metrics() if line["event"] == "train"]
    (resume,) = (line for line in locked.metrics() if line["event"] == "resume")
    elapsed_s = {line["step"]: line["elapsed_s"] for line in reached}
    longest_s = max(b - a for a, b in pairwise(elapsed_s.values()))
    lost_s = elapsed_s[reached[-1]["step"]] - elapsed_s[resume["step"]]
    # A save is due with the step that ends after save_interval_s (1), and takes its time beside the next.
    assert lost_s <= 1 + 3 * longest_s
    assert locked.weights() == undisturbed


def test_a_second_snakemake_puts_no_second_trainer_on_a_state(locked, undisturbed):
    """The first one is killed, its job goes on, and the second one submits another."""
    locked.set("experiments.tiny.execution", EXECUTION)
    locked.forget_training()
    locked.slurm.shape(2, "eth0", 1e6)
    process = locked.start("train_tiny")
    states = locked.folder / "store/state"
    try:
        locked.wait_until(lambda: any(map(newest_step, states.glob("*"))), process)
        os.killpg(process.pid, signal.SIGKILL)
        second = locked.start("train_tiny")
        locked.wait_until(lambda: len(locked.jobs_of("train_model")) == 2, second)
        job = locked.jobs_of("train_model")[1]
        locked.wait_until(lambda: "waits for another run of it" in locked.said_by(job), second)
    finally:
        locked.slurm.unshape(2, "eth0")
    assert second.wait(LIMIT_S) == 0, locked.words() + locked.training_log()
    assert not any(line["event"] == "resume" for line in locked.metrics())
    assert "found in the store" in locked.training_log()
    assert locked.weights() == undisturbed


# ---- what is refused -------------------------------------------------------------------------


def test_more_nodes_than_the_job_has_are_refused(locked):
    command = [sys.executable, "-c",
               "import os; from pathlib import Path; from snakegpt.nodes import on_every_node;"
               "on_every_node('x', [], nodes=3, threads=1, shared=Path('x'))"]  # fmt: skip
    inside = ["srun", "-N1", "bash", "-c", f'cd {locked.folder}; exec "$@"', "x", *command]
    with pytest.raises(RuntimeError, match=r"execution.nodes = 3, but Slurm job \d+ has 1"):
        locked.slurm.command(0, inside)


def test_more_gpus_than_a_node_has_are_refused_before_anything_runs(locked):
    said = refusal(
        locked,
        "train_model:\n    gpu: 0",
        'train_model:\n    gpu: 0\n    gres: "gpu:8"\n    tasks_per_gpu: 0',
    )
    assert "Slurm refuses jobs of rule train_model: allocation failure" in said
    assert "--gres=gpu:8" in said
    assert "cpu* 3 x 16 CPUs, 64000 MB, gpu:1" in said


def test_a_partition_that_does_not_exist_is_named_before_anything_runs(locked):
    said = refusal(locked, "slurm_partition: cpu", "slurm_partition: gpux")
    assert "invalid partition specified: gpux" in said


def test_a_controller_that_is_down_is_told_before_anything_runs_and_waited_for_after(
    locked, undisturbed
):
    locked.forget_training()
    process = locked.start("train_tiny")
    log = Path(locked.log.name)  # of this call, not of the one that is refused
    states = locked.folder / "store/state"
    locked.wait_until(lambda: any(map(newest_step, states.glob("*"))), process)
    locked.slurm.command(0, ["scontrol", "shutdown", "slurmctld"])
    try:
        said = refusal(locked)
        assert "the Slurm controller does not answer: " in said
        assert "Unable to contact slurm controller" in said
        assert process.poll() is None
    finally:
        locked.slurm.command(0, ["slurmctld"])
    assert process.wait(LIMIT_S) == 0, log.read_text() + locked.training_log()
    assert "Slurm does not say how 1 jobs are" in log.read_text()
    locked.slurm.wait_for_nodes()
    assert locked.weights() == undisturbed


def refusal(project: ClusterProject, line: str = "", instead: str = "") -> str:
    """What Snakemake says when it ends without having run anything, with a line of the profile changed."""
    profile = project.folder / "profiles/slurm/profile.yaml"
    before = profile.read_text()
    assert line in before
    profile.write_text(before.replace(line, instead))
    try:
        project.set("experiments.tiny.model.channels", 32)  # so that there is something to run
        assert project.start("train_tiny").wait(120) == 1
    finally:
        profile.write_text(before)
        project.set("experiments.tiny.model.channels", 16)
    said = project.words()
    assert "Traceback" not in said
    assert not re.search(r"has been submitted|^localrule |^rule ", said, re.MULTILINE), said
    return said
