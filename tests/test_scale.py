"""The source of Linux from its package to tokens: 70,000 files, over a gigabyte. Minutes, so with the long tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import time

import numpy as np
import pytest
import yaml
from data_fixtures import CACHE
from test_workflow import Project

PACKAGE = "linux-source-6.1"
KINDS = ("c", "h", "S", "rst", "txt", "dts", "dtsi")


def linux(folder):
    """The unpacked source, a folder; its package is kept for a next time."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip("this machine has no apt-get")
    kept = CACHE / "debian"
    if not list(kept.glob("*.deb")):
        kept.mkdir(parents=True, exist_ok=True)
        asked = ["apt-get", "-q=2", "-o", "APT::Sandbox::User=root", "download", PACKAGE]
        if subprocess.run(asked, cwd=kept, capture_output=True, check=False).returncode:
            pytest.skip(f"{PACKAGE} cannot be downloaded")
    (package,) = kept.glob("*.deb")
    listed = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=listed.stdout, mode="r|") as outer:
        for member in outer:
            if member.name.endswith(".tar.xz"):
                with tarfile.open(fileobj=outer.extractfile(member), mode="r|xz") as inner:
                    inner.extractall(folder, filter=_texts)
    listed.stdout.close()
    listed.wait()
    return folder


def _texts(member, folder):
    """Folders and texts, by the `data` filter; links are left out."""
    if member.isdir() or (member.isfile() and member.name.rsplit(".", 1)[-1] in KINDS):
        return tarfile.data_filter(member, folder)
    return None


@pytest.mark.long
def test_the_source_of_linux_becomes_tokens(tmp_path):
    project = Project(tmp_path)
    linux(tmp_path / "linux")
    config = yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8"))
    config["corpora"]["generated"] |= {
        "source": {"kind": "local", "paths": [f"linux/**/*.{kind}" for kind in KINDS]},
        "encoding_errors": "replace",
        "validation": {"by": "document", "fraction": 0.01},
        "part_bytes": 100_000_000,
    }
    config["tokenizers"] = {"gpt2": {"kind": "gpt2"}}
    config["experiments"]["tiny"]["tokenizer"] = "gpt2"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    took = {}

    def timed(what, *words, call=project.call):
        started = time.monotonic()
        done = call(*words)
        took[what] = round(time.monotonic() - started, 1)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    files = ("--configfile", "config.yaml", "mine.yaml")
    target = "results/tokens/generated-gpt2/manifest.json"
    run = {"call": lambda *words: project.snakemake(*words)}
    timed("lock", "snakegpt.stages.lock_corpora", *files)
    timed("all", target, **run)
    again = timed("nothing to do", target, **run)
    assert "Nothing to be done" in again.stdout + again.stderr
    manifest = json.loads((tmp_path / target).read_text(encoding="utf-8"))
    n_files = len(
        json.loads((tmp_path / "corpora.lock.json").read_text())["corpora"]["generated"]["files"]
    )
    train, val = (manifest["splits"][split] for split in ("train", "val"))
    assert (
        train["n_documents"] + val["n_documents"] + manifest["dropped"]["empty"] == n_files > 60_000
    )
    assert 0.005 < val["n_documents"] / n_files < 0.015
    assert train["n_tokens"] > 300_000_000
    first = (tmp_path / "results/tokens/generated-gpt2" / train["shards"][0]["name"]).read_bytes()
    assert np.frombuffer(first, "<u2", 1, 1024)[0] == 50_256
    print(json.dumps({**took, "files": n_files, "tokens": train["n_tokens"] + val["n_tokens"]}))
