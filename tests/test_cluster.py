"""The pipeline on a real Slurm of two nodes: every rule by the profile, training over both, interrupted.

`make test-cluster`; needs root and Debian's slurm-wlm and munge.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

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
# Deterministic, since nodes give their ranks other numbers of threads than a laptop does.
LOCAL = {"ranks": 2, "device": "cpu", "deterministic": True}
EXECUTION = {"nodes": 2, "ranks_per_node": 1, "device": "cpu", "deterministic": True}
# The profile's, quicker: jobs here last seconds.
QUICK = ["--slurm-init-seconds-before-status-checks", "4", "--latency-wait", "10"]


class ClusterProject(Project):
    """A project whose Snakemake runs on the login host of a Slurm."""

    def __init__(self, folder: Path, slurm: Slurm) -> None:
        super().__init__(folder)
        self.slurm = slurm
        self.set("experiments.tiny.execution", EXECUTION)
        self.set("execution.network_test_s", 1)

    def start(self, *targets: str) -> subprocess.Popen[str]:
        words = ["snakemake", "--workflow-profile", "profiles/slurm", *QUICK]
        words += ["--configfile", "config.yaml", "mine.yaml", "--", *targets]
        script = f'hostname "$0"; cd {self.folder}; exec "$@"'
        self.log = (self.folder / f"snakemake-{time.time_ns()}.log").open("w+")
        environment = {**clean_environment(), "PYTHONPATH": f"{self.folder}/workflow"}
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.slurm.name(0), "unshare", "--uts", "bash", "-c", script,
             "ctl", *self.command(*words)],
            stdout=self.log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        self.slurm.processes.append(process)
        return process

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


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(2, tmp_path_factory.mktemp("slurm") / "lab") as running:
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
    tokens = "results/tokens/generated-generated_char/manifest.json"
    done = project.call(
        "snakegpt.stages.train_model", "--settings", settings, "--tokens", tokens,
        "--execution", json.dumps({**LOCAL, "threads": 2}), "--out", folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return (project.folder / folder / "weights.safetensors").read_bytes()


def test_from_text_to_report_on_two_nodes(locked):
    process = locked.start("report_tiny")
    assert process.wait(LIMIT_S) == 0, locked.words() + locked.training_log()
    words = locked.words()
    jobs = {rule for rule in re.findall(r"rule (\w+):", words) if rule != "report_tiny"}
    assert jobs >= {"bench_network", "plan_training", "train_model", "evaluate_model"}
    assert (locked.folder / "results/reports/tiny/report.html").stat().st_size > 0
    network = json.loads((locked.folder / "results/networks/tiny/network.json").read_text())
    assert [node["host"] for node in network["nodes"]] == ["node1", "node2"]
    assert network["ranks"] == 2
    assert len(network["links"]) == 1
    start = json.loads(
        (locked.folder / "results/models/tiny/metrics.jsonl").read_text().splitlines()[0]
    )
    assert start["ranks"] == 2
    weights = (locked.folder / "results/models/tiny/weights.safetensors").read_bytes()
    assert weights == weights_of_two_local_ranks(locked, "local")
    again = locked.start("report_tiny")
    assert again.wait(LIMIT_S) == 0
    assert "Nothing to be done" in locked.words()


@pytest.mark.parametrize("way", ["cancelled", "requeued", "rank killed"])
def test_an_interrupted_training_goes_on_and_ends_alike(locked, way):
    locked.set("experiments.tiny.training.steps", 1000)  # long enough to be met on its way
    locked.set("experiments.tiny.training.seed", 1 + len(way))
    locked.set("experiments.tiny.training.validation_interval", 500)
    process = locked.start("train_tiny")
    states = locked.folder / "store/state"
    locked.wait_until(lambda: any(map(newest_step, states.glob("*"))), process)
    job = locked.job_of("train_model")
    if way == "cancelled":
        locked.slurm.command(0, ["scancel", job])
    elif way == "requeued":
        locked.slurm.command(0, ["scontrol", "requeue", job])
    else:
        listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
        ranks = [
            int(line.split()[0])
            for line in listed.splitlines()
            if "snakegpt.stages.train_model" in line
            and str(locked.folder) in line
            and _variable(int(line.split()[0]), "RANK") == "1"
        ]
        os.kill(ranks[0], 9)
    assert process.wait(LIMIT_S) == 0, locked.words() + locked.training_log()
    metrics = [
        json.loads(line)
        for line in (locked.folder / "results/models/tiny/metrics.jsonl").read_text().splitlines()
    ]
    assert any(line["event"] == "resume" for line in metrics), locked.training_log()
    weights = (locked.folder / "results/models/tiny/weights.safetensors").read_bytes()
    assert weights == weights_of_two_local_ranks(locked, f"undisturbed-{way.replace(' ', '-')}")


def _variable(process: int, name: str) -> str | None:
    try:
        text = Path(f"/proc/{process}/environ").read_bytes().decode()
    except OSError:
        return None
    return dict(pair.partition("=")[::2] for pair in text.split("\0")).get(name)


def test_more_nodes_than_the_job_has_are_refused(locked):
    command = [sys.executable, "-c",
               "import os; from pathlib import Path; from snakegpt.launching import on_every_node;"
               "on_every_node('x', [], nodes=3, threads=1, shared=Path('x'))"]  # fmt: skip
    inside = ["srun", "-N1", "bash", "-c", f'cd {locked.folder}; exec "$@"', "x", *command]
    with pytest.raises(RuntimeError, match=r"execution.nodes = 3, but Slurm job \d+ has 1"):
        locked.slurm.command(0, inside)


def test_a_partition_that_does_not_exist_is_named(locked):
    profile = locked.folder / "profiles/slurm/profile.yaml"
    before = profile.read_text()
    profile.write_text(before.replace("slurm_partition: cpu", "slurm_partition: gpux"))
    try:
        locked.set("experiments.tiny.model.channels", 32)  # so that there is something to run
        process = locked.start("plan_tiny")
        assert process.wait(LIMIT_S) != 0
        assert "gpux" in locked.words() or "invalid partition" in locked.words()
    finally:
        profile.write_text(before)
