"""profiles/kubernetes through Snakemake's own executor, against a stand-in API server and an S3 server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from kubernetes_stand_in import Cluster
from store_fixtures import S3, packages, s3_server
from test_workflow import Project

HERE = Path(__file__).parent
PINS = (HERE / "kubernetes.txt", HERE / "s3_server.txt")
PROFILE = yaml.safe_load((HERE.parent / "profiles/kubernetes/profile.yaml").read_text("utf-8"))
GPU = "nvidia.com/gpu"
LOCAL = {"index_tokens", "build_report"}


class Deployment(Project):
    """A checkout whose jobs run in the pods of a cluster."""

    def __init__(self, folder: Path) -> None:
        checkout, pods, image = (folder / name for name in ("checkout", "pods", "image"))
        for each in (checkout, pods, image):
            each.mkdir()
        super().__init__(checkout)
        # A volume that all pods see.
        self.set("corpora.generated.source.paths", [str(checkout / "texts/*.txt")])
        locked = self.call(
            "snakegpt.stages.lock_corpora", "--configfile", "config.yaml", "mine.yaml"
        )
        assert locked.returncode == 0, locked.stderr
        for words in (["init"], ["add", "--all"]):  # what git knows travels to the pods
            subprocess.run(["git", *words], cwd=checkout, check=True, capture_output=True)
        # What docs/cluster.md says to do once.
        prefix = PROFILE["default-storage-prefix"].removeprefix("s3://")
        brought = checkout / ".snakemake/storage/s3" / prefix / "results"
        brought.mkdir(parents=True)
        (checkout / "results").symlink_to(brought.relative_to(checkout))
        # The image has the storage plugin, which every pod wants to install first.
        pip = image / "pip"
        pip.write_text("#!/bin/sh\n")
        pip.chmod(0o755)
        libraries = [*map(str, map(packages, PINS)), self.environment["PYTHONPATH"]]
        self.environment["PYTHONPATH"] = os.pathsep.join(libraries)
        path = f"{image}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        within = {"PATH": path, "HOME": str(image), "OMP_NUM_THREADS": "1"}
        self.cluster = Cluster(pods, {**within, "PYTHONPATH": self.environment["PYTHONPATH"]})
        kubeconfig = folder / "kubeconfig"
        kubeconfig.write_text(self.cluster.kubeconfig(), encoding="utf-8")
        self.environment["KUBECONFIG"] = str(kubeconfig)

    def start(self, s3: S3, target: str) -> subprocess.Popen[str]:
        command = self.command(
            "snakemake", "--workflow-profile", "profiles/kubernetes",
            "--configfile", "config.yaml", "mine.yaml",
            "--storage-s3-endpoint-url", s3.endpoint, "--seconds-between-status-checks", "1",
            "--", target,
        )  # fmt: skip
        names = ("SNAKEMAKE_STORAGE_S3_ACCESS_KEY", "SNAKEMAKE_STORAGE_S3_SECRET_KEY")
        secrets = dict(zip(names, s3.writer, strict=True))
        with (self.folder.parent / "snakemake.log").open("w") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env={**self.environment, **secrets},
                stdout=log, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

    def in_the_bucket(self, s3: S3, path: str) -> str:
        url = f"{PROFILE['default-storage-prefix']}/{path}"
        bucket, _, key = url.removeprefix("s3://").partition("/")
        code = (
            "import boto3, sys; endpoint, user, secret, bucket, key = sys.argv[1:];"
            "found = boto3.client('s3', endpoint_url=endpoint, aws_access_key_id=user,"
            " aws_secret_access_key=secret).get_object(Bucket=bucket, Key=key);"
            "sys.stdout.buffer.write(found['Body'].read())"
        )
        command = [sys.executable, "-c", code, s3.endpoint, *s3.writer, bucket, key]
        return subprocess.run(
            command, env=self.environment, check=True, capture_output=True, text=True
        ).stdout

    @property
    def said(self) -> str:
        return (self.folder.parent / "snakemake.log").read_text(encoding="utf-8")


@pytest.fixture
def deployment(tmp_path):
    made = Deployment(tmp_path)
    with made.cluster.serving():
        yield made


@pytest.fixture
def s3():
    with s3_server() as server:
        yield server


def rule_of(job: dict) -> str:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return re.search(r"--allowed-rules '?(\w+)", container["args"][1])[1]


def ended(process: subprocess.Popen[str], deadline_s: float) -> int:
    try:
        return process.wait(deadline_s)
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_a_report_from_nothing_through_pods_one_of_which_is_taken_back(deployment, s3):
    cluster = deployment.cluster
    deployment.set("experiments.tiny.training.steps", 3000)
    deployment.set("experiments.tiny.training.validation_interval", 200)  # a state each time
    # Its file is made in a pod, and stays there and in the bucket.
    assert ended(deployment.start(s3, "plan_tiny"), 200) == 0, deployment.said
    running = deployment.start(s3, "report_tiny")
    state = cluster.claim("snakegpt") / "store/state"
    deadline = time.monotonic() + 300
    while not list(state.glob("*/state_*")):
        assert running.poll() is None and time.monotonic() < deadline, deployment.said
        time.sleep(0.05)
    (training,) = [name for name, job in cluster.jobs.items() if rule_of(job) == "train_model"]
    cluster.evict(training)
    assert ended(running, 300) == 0, deployment.said

    names = [rule_of(job) for job in cluster.jobs.values()]
    assert sorted(names) == sorted([
        "fetch_corpus", "build_tokenizer", "encode_tokens", "bench_network", "plan_training",
        *["train_model"] * 2, "evaluate_model", "sample_text",
    ])  # fmt: skip
    assert not LOCAL & set(names)
    (again,) = [n for n, job in cluster.jobs.items() if rule_of(job) == "train_model" and n != training]  # fmt: skip
    assert "tiny  resumes at step" in cluster.log(again)
    assert "How it learned" in deployment.in_the_bucket(s3, "results/reports/tiny/report.html")
    assert cluster.secrets == {}  # no credentials are left behind
    assert cluster.jobs.keys() - cluster.deleted == {training}
    for job in cluster.jobs.values():
        check_manifest(job)
        assert s3.writer[1] not in json.dumps(job)  # it reaches the pod as a Secret


def check_manifest(job: dict) -> None:
    """What Kubernetes would refuse, or a job would miss, on a real cluster."""
    assert job["spec"]["backoffLimit"] == 0  # Snakemake tries again, not the cluster
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == PROFILE["container-image"]
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    wanted, limits = (container["resources"][kind] for kind in ("requests", "limits"))
    # Extended resources cannot be overcommitted: a pod whose limits are others is refused.
    assert wanted.get(GPU) == limits.get(GPU)
    assert (GPU in wanted) == (rule_of(job) in gpu_rules())
    for name in ("memory", "ephemeral-storage"):
        assert wanted[name] == limits[name]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        v["name"] for v in pod["volumes"]
    }
    assert "SNAKEGPT_MACHINE" in {variable["name"] for variable in container["env"]}
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert len(paths) == len(set(paths))


def gpu_rules() -> set[str]:
    text = "".join(file.read_text() for file in (HERE.parent / "rules").glob("*.smk"))
    blocks = re.findall(r"^rule (\w+):\n(.*?)(?=^rule |\Z)", text, re.M | re.S)
    return {name for name, body in blocks if "gpu=GPU" in body}


def test_a_pod_whose_command_fails_ends_the_run_and_keeps_its_log(deployment, s3):
    """Plugin 0.5.1 asks for the log of a container before this one, which there never is; see docs."""
    (deployment.folder / "texts/a.txt").write_text("not what was locked")
    running = deployment.start(s3, "results/corpora/generated/corpus.json")
    assert ended(running, 120) == 1
    assert "previous terminated container" in deployment.said
    (name,) = deployment.cluster.jobs  # not tried again
    assert "a.txt" in deployment.cluster.log(name)
    assert deployment.cluster.secrets == {}
