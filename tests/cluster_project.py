"""A project whose Snakemake runs on the login host of a Slurm of the test's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from slurm_lab import Slurm, clean_environment
from test_workflow import Project

# Deterministic, since nodes give their ranks other numbers of threads than a laptop does.
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

    def start(self, *targets: str, hooks: str = "") -> subprocess.Popen[str]:
        """Snakemake, in a session of its own; hooks: a sitecustomize.py for it and all of its jobs."""
        words = [sys.executable, "-c", SNAKEMAKE, "--workflow-profile", "profiles/slurm", *QUICK]
        words += ["--configfile", "config.yaml", "mine.yaml", "--", *targets]
        script = f'hostname "$0"; cd {self.folder}; exec "$@"'
        self.log = (self.folder / f"snakemake-{time.time_ns()}.log").open("w+")
        (self.folder / "hooks").mkdir(exist_ok=True)
        (self.folder / "hooks/sitecustomize.py").write_text(hooks)
        paths = f"{self.folder}/hooks:{self.folder}/workflow"
        environment = {**clean_environment(), "PYTHONPATH": paths}
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

    def state_metrics(self) -> list[dict[str, Any]]:
        """Those of the one training that is under way."""
        (file,) = (self.folder / "store/state").glob("*/metrics.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]

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

    def jobs_of(self, rule: str) -> list[str]:
        """Those that run, oldest first."""
        lines = self.slurm.command(0, ["squeue", "-h", "-t", "R", "-o", "%i %k"]).splitlines()
        return sorted((line.split()[0] for line in lines if rule in line), key=int)

    def said_by(self, job: str) -> str:
        """All that a job printed; the rule's own log is wiped when it is tried again."""
        return next((self.folder / ".snakemake/slurm_logs").rglob(f"{job}.log")).read_text()
