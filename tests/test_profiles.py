"""Profiles say what the study of clusters found necessary, and Snakemake takes them as they are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from snakegpt.command import block
from snakegpt.settings import Model, Training

ROOT = Path(__file__).parent.parent
PROFILES = sorted(path.parent.name for path in ROOT.glob("profiles/*/profile.yaml"))


def profile(name):
    return yaml.safe_load((ROOT / f"profiles/{name}/profile.yaml").read_text(encoding="utf-8"))


def test_the_documented_profiles_are_there():
    assert PROFILES == ["default", "gpu", "kubernetes", "slurm"]
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    for name in PROFILES:
        assert f"`{name}`" in text


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_keeps_many_jobs_quick_and_reruns_for_the_same_reasons(name):
    found, default = profile(name), profile("default")
    assert (found["scheduler"], found["scheduler-subsample"]) == ("greedy", 200)
    for key in ("rerun-triggers", "rerun-incomplete", "nolock"):
        assert found[key] == default[key], key


@pytest.mark.parametrize("name", PROFILES)
def test_every_setting_has_its_reason_beside_or_above_it(name):
    """One without is one that nobody dares to change. Two that belong together may share it."""
    settings_since = 9
    for line in (ROOT / f"profiles/{name}/profile.yaml").read_text("utf-8").splitlines():
        if not line:
            settings_since = 9
        elif line.startswith("#"):
            settings_since = 0
        elif line[0].isalpha() and "#" not in line:
            settings_since += 1
            assert settings_since <= 2, line


def test_slurm_has_what_keeps_it_from_waiting_for_ever():
    found = profile("slurm")
    assert found["slurm-status-command"] == "squeue"  # sacct's "CANCELLED by 0" is never recognised
    assert 3 * found["slurm-init-seconds-before-status-checks"] <= 300  # MinJobAge's default
    assert found["slurm-requeue"] is True
    assert found["retries"] >= 2
    assert not any("array" in key or "group" in key for key in found)
    assert "--signal=TERM@" in found["set-resources"]["train_model"]["slurm_extra"]


def test_no_rule_retries_by_itself():
    for file in (ROOT / "rules").glob("*.smk"):
        assert "retries:" not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize("name", ["gpu", "slurm"])
def test_snakemake_takes_the_profile_anywhere(name, tmp_path):
    """A dry run needs no cluster."""
    command = [sys.executable, "-m", "snakemake", "-n", "-q", "all"]
    command += ["--workflow-profile", f"profiles/{name}", "--directory", str(ROOT)]
    done = subprocess.run(
        [*command, "--", "plan_shakespeare_char"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_manifest_of_several_nodes_is_consistent():
    """Names and numbers that must agree, as Kubernetes would find out at run time only."""
    text = (ROOT / "envs/kubernetes/training.yaml").read_text(encoding="utf-8")
    service, job = yaml.safe_load_all(text)
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    name, nodes = job["metadata"]["name"], spec["completions"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == nodes
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["SNAKEGPT_RENDEZVOUS"].startswith(f"{name}-0.{pod['subdomain']}:")
    assert f"$JOB_COMPLETION_INDEX/{nodes}" in container["args"][0]
    assert f'"nodes": {nodes}' in container["args"][0]
    gpus = "nvidia.com/gpu"
    assert container["resources"]["limits"][gpus] == container["resources"]["requests"][gpus]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    # The volume that the executor's pods leave tokens on, whose results/ is there.
    claim, path = profile("kubernetes")["kubernetes-persistent-volumes"][0].split(":")
    assert volumes["snakegpt"]["persistentVolumeClaim"]["claimName"] == claim
    assert mounts["snakegpt"] == container["workingDir"] == path


def test_settings_for_the_manifest_are_made_as_it_says(tmp_path):
    """By the command in its comment; training takes them."""
    text = (ROOT / "envs/kubernetes/training.yaml").read_text(encoding="utf-8")
    (code,) = re.findall(r'python -c "(.*?)" > settings.json', text, re.DOTALL)
    command = [sys.executable, "-c", code.replace("\n#   ", "\n")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"]["layers"] == 12  # of the published recipe
    assert block(Training, found["training"], "training").steps > 10_000
    assert block(Model, found["model"], "model").context == 1024


def test_the_kubernetes_profile_says_everywhere_the_same():
    """Bucket and volume stand in several lines of it, and in what is to be done once."""
    found = profile("kubernetes")
    results = (
        f".snakemake/storage/s3/{found['default-storage-prefix'].removeprefix('s3://')}/results"
    )
    assert f"ln -sfn /volume/results {results}" in found["precommand"]
    assert f"ln -s {results} results" in (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    assert found["kubernetes-persistent-volumes"] == ["snakegpt:/volume"]
    assert "keep-storage-local-copies" not in found  # for pods alone


def test_the_slurm_profile_lets_no_rule_ask_for_one_gpu():
    """Every rule that counts GPUs for a laptop's scheduler is told otherwise: a cluster may have none."""
    rules = "".join(file.read_text() for file in (ROOT / "rules").glob("*.smk"))
    counting = {
        name
        for name, body in re.findall(r"^rule (\w+):\n(.*?)(?=^rule |\Z)", rules, re.M | re.S)
        if "gpu=GPU" in body
    }
    told = profile("slurm")["set-resources"]
    assert counting == {name for name, resources in told.items() if resources.get("gpu") == 0}
