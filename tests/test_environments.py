"""Rules in a conda environment and in an image, with stand-ins for conda and apptainer that do what theirs do."""

from __future__ import annotations

import os
import sys

import pytest
import yaml
from test_workflow import ROOT, Project

TARGET = "results/corpora/generated/corpus.json"
# Of an environment or image: it notes where it would find snakegpt, of which it has none itself.
PYTHON = """\
#!/bin/sh
echo "$PYTHONPATH" >> {seen}
exec {python} "$@"
"""
CONDA = """\
#!{python}
import json, os, sys, yaml
words = sys.argv[1:]
if words[0] == "info":
    print(json.dumps({{"conda_prefix": {prefix!r}, "platform": "linux-64"}}))
elif words[0] == "config":
    print(json.dumps({{"get": {{"channel_priority": "strict"}}}}))
elif words[0] == "--version":
    print("conda 26.1.0")
elif words[0] == "env":
    file, prefix = (words[words.index(option) + 1] for option in ("--file", "--prefix"))
    for package in yaml.safe_load(open(file))["dependencies"][-1]["pip"]:
        name = package.removeprefix("-r ")  # pip works in the folder of the file
        assert name == package or os.path.exists(os.path.join(os.path.dirname(file), name)), package
    os.makedirs(prefix + "/bin")
    os.symlink({inside!r}, prefix + "/bin/python")
"""
APPTAINER = """\
#!{python}
import os, sys
words = sys.argv[1:]
if words == ["--version"]:
    print("apptainer version 1.4.0")
else:
    image, shell, option, command = words[-4:]
    assert words[0] == "exec" and option == "-c", words
    assert open(image).read() == "an image"
    os.environ["PATH"] = {bin!r} + ":/usr/bin:/bin"
    os.execvp(shell, [shell, "-c", command])
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "checkout").mkdir()
    made = Project(tmp_path / "checkout")
    locked = made.call("snakegpt.stages.lock_corpora", "--configfile", "config.yaml", "mine.yaml")
    assert locked.returncode == 0, locked.stderr
    # What Snakemake's own environment has installed is another copy.
    made.environment["PYTHONPATH"] = str(ROOT / "workflow")
    return made


@pytest.fixture
def programs(tmp_path, project):
    """conda and apptainer on the path; returns the file where their Python notes what it was given."""
    outside, inside = tmp_path / "outside/bin", tmp_path / "inside/bin"
    seen = tmp_path / "seen"
    facts = {"python": sys.executable, "seen": seen, "prefix": str(outside.parent),
             "inside": str(inside / "python"), "bin": str(inside)}  # fmt: skip
    for file, text in {
        inside / "python": PYTHON,
        outside / "conda": CONDA,
        outside / "activate": 'PATH="$1/bin:$PATH"\n',
        outside / "apptainer": APPTAINER,
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text if "$1" in text else text.format(**facts))
        file.chmod(0o755)
    project.environment["PATH"] = f"{outside}:{os.environ['PATH']}"
    return seen


def made_with(project, method):
    return project.call(
        "snakemake", "--cores", "2", "--software-deployment-method", method,
        "--configfile", "config.yaml", "mine.yaml", "--", TARGET,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["conda", "apptainer"])
def test_rules_run_the_code_of_the_checkout_in_an_environment_without_it(project, programs, method):
    (project.folder / "envs/snakegpt.sif").write_text("an image")
    done = made_with(project, method)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project.folder / TARGET).exists()
    lines = programs.read_text().splitlines()
    assert lines and all(
        line.split(os.pathsep)[0] == str(project.folder / "workflow") for line in lines
    )


def test_an_image_that_is_not_there_is_told_with_the_way_to_it(project, programs):
    done = made_with(project, "apptainer")
    assert done.returncode == 1
    assert "the image envs/snakegpt.sif is not there" in done.stderr
    assert "apptainer build envs/snakegpt.sif envs/snakegpt.def" in done.stderr
    assert "Traceback" not in done.stderr
    assert not programs.exists()


def test_the_conda_file_holds_the_lock():
    """All of it: Snakemake copies the file elsewhere, and makes an environment anew for its content alone."""
    (pip,) = yaml.safe_load((ROOT / "envs/snakegpt.yaml").read_text("utf-8"))["dependencies"][-1:]
    lock = (ROOT / "envs/requirements.lock").read_text(encoding="utf-8").splitlines()
    assert pip["pip"] == [line for line in lock if not line.startswith("#")]


def test_images_are_built_from_what_is_there():
    """What the recipes copy exists, and what git does not know is not sent."""
    lines = (ROOT / "envs/snakegpt.def").read_text(encoding="utf-8").splitlines()
    copied = lines[lines.index("%files") + 1 :]
    for line in copied[: copied.index("")]:
        assert (ROOT / line.split()[0]).exists(), line
    ignored = set((ROOT / ".dockerignore").read_text(encoding="utf-8").split())
    for name in (ROOT / ".gitignore").read_text(encoding="utf-8").split():
        assert {name.strip("/"), f"**/{name.strip('/')}"} & ignored, name
