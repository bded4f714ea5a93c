"""The pipeline on a real Slurm: every rule by the profile, training over two nodes, interrupted.

`make test-cluster`; needs root and Debian's slurm-wlm and munge.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from slurm_lab import Slurm, clean_environment, missing
from snakegpt.training_state import newest_step
from test_workflow import Project

pytestmark = [
    pytest.mark.long,
    pytest.mark.cluster,
    pytest.mark.skipif(missing() is not None, reason=f"no Slurm for tests: {missing()}"),
]
LIMIT_S = 900
TOKENS = "results/tokens/generated-generated_char/manifest.json"
# Deterministic, since nodes give their ranks other numbers of threads than a laptop does.
LOCAL = {"ranks": 2, "device": "cpu", "deterministic": True}
EXECUTION = {"nodes": 2, "ranks_per_node": 1, "device": "cpu", "deterministic": True}
# Jobs here last seconds, and the plugin looks 10 s later at them each time: here it does not.
SNAKEMAKE = """
from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor
Executor.next_seconds_between_status_checks = property(lambda self: 4, lambda self, value: None)
main()
"""
QUICK = ["--latency-wait", "10"]


class ClusterProject(Project):
    """A project whose Snakemake runs on the login host of a Slurm."""

    def __init__(self, folder: Path, slurm: Slurm) -> None:
        super().__init__(folder)
        self.slurm = slurm
        self.set("experiments.tiny.execution", EXECUTION)
        self.set("execution.network_test_s", 1)

    def start(self, *targets: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", SNAKEMAKE, "--workflow-profile", "profiles/slurm", *QUICK]
        words += ["--configfile", "config.yaml", "mine.yaml", "--", *targets]
        script = f'hostname "$0"; cd {self.folder}; exec "$@"'
        self.log = (self.folder / f"snakemake-{time.time_ns()}.log").open("w+")
        environment = {**clean_environment(), "PYTHONPATH": f"{self.folder}/workflow"}
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.slurm.name(0), "unshare", "--uts", "bash", "-c", script,
             "ctl", *words],
            stdout=self.log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        self.slurm.processes.append(process)
        return process

    def forget_training(self) -> None:
        """As if nobody had trained: the next call trains, and does nothing else."""
        for record in (self.folder / "store/actions").rglob("*.json"):
            if json.loads(record.read_text())["stage"] == "train_model":
                record.unlink()
        for folder in ("store/state", "results/models"):
            shutil.rmtree(self.folder / folder, ignore_errors=True)

    def metrics(self) -> list[dict[str, Any]]:
        file = self.folder / "results/models/tiny/metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def weights(self, folder: str = "results/models/tiny") -> bytes:
        return (self.folder / folder / "weights.safetensors").read_bytes()

    def words(self) -> str:
        return Path(self.log.name).read_text()

    def training_log(self) -> str:
        file = self.folder / "logs/train_model/tiny.log"
        return file.read_text() if file.exists() else ""

    def wait_until(self, done, process, limit_s: float = 300) -> None:
        deadline = time.monotonic() + limit_s
        while not done():
            assert process.poll() is None, self.words()
            assert time.monotonic() < deadline, self.words() + self.training_log()
            time.sleep(0.2)

    def job_of(self, rule: str) -> str:
        lines = self.slurm.command(0, ["squeue", "-h", "-t", "R", "-o", "%i %k"]).splitlines()
        return next(line.split()[0] for line in lines if rule in line)

    def said_by(self, job: str) -> str:
        """All that a job printed; the rule's own log is wiped when it is tried again."""
        return next((self.folder / ".snakemake/slurm_logs").rglob(f"{job}.log")).read_text()


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
    assert jobs >= {"bench_network", "plan_training", "train_model", "evaluate_model"}
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


def short_of_time(project, job):
    """Less is left than the profile's --signal wants: Slurm sends it, within the 30 s that it looks in."""
    project.slurm.command(0, ["scontrol", "update", f"job={job}", "TimeLimit=3"])
    ends(project, job, 90)
    assert "JobState=FAILED" in project.slurm.command(0, ["scontrol", "show", "job", job])
    assert "stopped with its state saved" in project.said_by(job)


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


HANG = {"hang_timeout_s": 30, "stop_timeout_s": 5}


def ends(project, job, limit_s):
    deadline = time.monotonic() + limit_s
    while project.slurm.command(0, ["squeue", "-h", "-j", job, "-t", "R,CG"]):
        assert time.monotonic() < deadline, project.said_by(job)
        time.sleep(0.5)


def variable(process: int, name: str) -> str | None:
    """Of the environment of a process."""
    try:
        text = Path(f"/proc/{process}/environ").read_bytes().decode()
    except OSError:
        return None
    return dict(pair.partition("=")[::2] for pair in text.split("\0")).get(name)


@pytest.mark.parametrize(
    ("way", "lost"),
    [
        (cancelled, None),
        (requeued, None),
        (short_of_time, None),
        (rank_killed, None),
        (node_hangs, None),
        (node_lost, 2),
        (first_node_lost, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_interrupted_training_goes_on_and_ends_alike(locked, undisturbed, way, lost):
    slurm = locked.slurm
    locked.forget_training()
    locked.set("experiments.tiny.execution", EXECUTION | (HANG if way is node_hangs else {}))
    slurm.shape(2, "eth0", 1e6)  # steps wait for the wire, until the training has been met
    process = locked.start("train_tiny")
    states = locked.folder / "store/state"
    try:
        locked.wait_until(lambda: any(map(newest_step, states.glob("*"))), process)
        way(locked, locked.job_of("train_model"))
    finally:
        slurm.unshape(2, "eth0")
    assert process.wait(LIMIT_S) == 0, locked.words() + locked.training_log()
    assert any(line["event"] == "resume" for line in locked.metrics()), locked.training_log()
    assert locked.weights() == undisturbed
    if lost:
        slurm.bring_back(lost)


# ---- what is refused -------------------------------------------------------------------------


def test_more_nodes_than_the_job_has_are_refused(locked):
    command = [sys.executable, "-c",
               "import os; from pathlib import Path; from snakegpt.launching import on_every_node;"
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
    assert "cpu* 3 x 8 CPUs, 64000 MB, gpu:1" in said


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
