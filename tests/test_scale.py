"""The source of Linux from its package to tokens, one line of a gigabyte, very many tiny files. With the long tests."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import yaml
from data_fixtures import CACHE
from snakegpt.corpus_parts import MOST_FILES
from snakegpt.tokenizers import PATTERNS, BytePairTokenizer
from test_workflow import WORDS, Project

PACKAGE = "linux-source-6.1"
KINDS = ("c", "h", "S", "rst", "txt", "dts", "dtsi")
TINY_FILES = int(os.environ.get("SNAKEGPT_TEST_TINY_FILES", "60000"))  # a million: 17 minutes
MOST_MEMORY_MB = 600


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


def peak_memory(command):
    """(exit status, what it said, MB that the command held at most)."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), said, usage.ru_maxrss * 1024 / 1e6


@pytest.mark.long
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_one_line_of_a_gigabyte_takes_little_memory(tmp_path, name):
    """A text is encoded; of JSON, which cannot be read in pieces, the error says what to do instead."""
    draw = random.Random(0)
    words = " ".join(draw.choice(WORDS) for _ in range(200_000)).encode() + b" "
    (tmp_path / "files").mkdir()
    times = 1_000_000_000 // len(words) + 1
    with (tmp_path / "files" / name).open("wb") as file:
        file.write(b'{"text": "' if name.endswith("l") else b"")
        for _ in range(times):
            file.write(words)
        file.write(b'"}\n' if name.endswith("l") else b"")
    (tmp_path / "corpus.json").write_text(json.dumps({"files": [{"path": name}]}))
    tokenizer = BytePairTokenizer(
        PATTERNS["gpt2"], [bytes([byte]) for byte in range(256)], kind="bpe"
    )
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    command = [sys.executable, "-m", "snakegpt.stages.encode_tokens"]
    command += ["--corpus", str(tmp_path / "corpus.json"), "--out", str(tmp_path / "out")]
    command += ["--tokenizer", str(tmp_path / "tokenizer.json")]
    command += ["--settings", '{"validation": {"by": "position", "fraction": 0.1}}']
    status, said, memory = peak_memory(command)
    assert memory < MOST_MEMORY_MB
    if name.endswith("l"):
        assert status == 2 and "the most for a JSON line" in said and "a file of its own" in said
        return
    assert status == 0, said
    part = json.loads((tmp_path / "out/part_000000.json").read_text())["splits"]
    assert sum(part[split]["n_text_bytes"] for split in part) == times * len(words)
    # Every byte is a token here, and each split begins with the end-of-text id.
    tokens = sum(shard["n_tokens"] for split in part.values() for shard in split["shards"])
    assert tokens == times * len(words) + 2


@pytest.mark.long
def test_very_many_tiny_files_become_tokens(tmp_path):
    project = Project(tmp_path)
    shutil.rmtree(tmp_path / "texts")
    for folder in range(TINY_FILES // 1000):
        (tmp_path / f"texts/{folder:04d}").mkdir(parents=True)
        for number in range(1000):
            text = f"the {number} red mats of cat {folder}"
            (tmp_path / f"texts/{folder:04d}/{number:03d}.txt").write_text(text)
    config = yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8"))
    config["corpora"]["generated"] |= {
        "source": {"kind": "local", "paths": ["texts/**/*.txt"]},
        "validation": {"by": "document", "fraction": 0.01},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    files = ("--configfile", "config.yaml", "mine.yaml")
    done = project.call("snakegpt.stages.lock_corpora", *files)
    assert done.returncode == 0, done.stderr
    target = "results/tokens/generated-generated_char/manifest.json"
    done = project.snakemake(target)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / target).read_text(encoding="utf-8"))
    n_parts = len(manifest["splits"]["train"]["shards"])
    assert TINY_FILES // MOST_FILES <= n_parts <= 2 * TINY_FILES // MOST_FILES + 1
    n_documents = sum(split["n_documents"] for split in manifest["splits"].values())
    assert n_documents == TINY_FILES // 1000 * 1000
    done = project.snakemake(target)
    assert "Nothing to be done" in done.stdout + done.stderr
