"""Through Snakemake itself: a dry run ends with every stage's reason and cost; what was adopted is a hit."""

from __future__ import annotations

import re

import pytest
from test_workflow import Project

TOKENIZER = "results/tokenizers/generated_char/tokenizer.json"
CONFIG = ("--configfile", "config.yaml", "mine.yaml")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with a tokenizer and nothing behind it."""
    folder = tmp_path_factory.mktemp("work") / "a project"
    folder.mkdir()
    project = Project(folder)
    locked = project.call("snakegpt.stages.lock_corpora", *CONFIG)
    assert locked.returncode == 0, locked.stderr
    assert project.run(TOKENIZER).ran == {"fetch_corpus", "build_tokenizer"}
    return project


def table(done):
    """Stage -> (what, reason) of the table at the end."""
    lines = done.stdout.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith("stage  ")]
    rows = (re.split(r"\s{2,}", line) for line in lines[start + 1 : lines.index("", start)])
    return {title.split()[0]: (what, why) for title, what, _time, _bytes, why in rows}


def test_a_dry_run_ends_with_what_would_run_and_why(project):
    done = project.call("snakemake", "-n", *CONFIG, "--", "train_tiny")
    assert done.returncode == 0, done.stderr
    found = table(done)
    assert found["train_model"] == found["encode_tokens"] == ("runs", "nothing has made it yet")
    assert "build_tokenizer" not in found and "evaluate_model" not in found
    assert done.stdout.rstrip().splitlines()[-1] == "5 to run (cost unknown)."
    assert "Exception" not in done.stderr


def test_a_dry_run_follows_forced_jobs_and_quietness(project):
    done = project.call("snakemake", "--dry-run", "--quiet", "--forceall", *CONFIG, "--", TOKENIZER)
    assert table(done) == dict.fromkeys(("fetch_corpus", "build_tokenizer"), ("look-up", "nothing differs"))  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("-n", *CONFIG, "--", TOKENIZER),  # nothing to be done
        ("-n", *CONFIG, "--", "results/models/nobody/weights.safetensors"),
        ("-n", "--quiet", "all", "--forceall", *CONFIG, "--", TOKENIZER),
        ("--lint", *CONFIG),
    ],
)
def test_nothing_is_said_where_nothing_would_run(project, words):
    done = project.call("snakemake", *words)
    assert not re.search("^stage  ", done.stdout + done.stderr, re.MULTILINE)
    assert "atexit" not in done.stderr


def test_an_adopted_tokenizer_is_found_by_the_next_run(project):
    stage = project.folder / "workflow/snakegpt/stages/build_tokenizer.py"
    before = stage.read_text(encoding="utf-8")
    stage.write_text(before.replace("REVISION = 1", "REVISION = 2"), encoding="utf-8")
    assert "code REVISION: 1 -> 2" in project.why(TOKENIZER)
    dry = project.call("snakemake", "-n", *CONFIG, "--", TOKENIZER)
    assert table(dry) == {"build_tokenizer": ("runs", "code REVISION: 1 -> 2")}
    digest = project.digest(TOKENIZER)
    words = ("adopt", TOKENIZER, "--yes", "--reason", "a comment in REVISION's clothes", *CONFIG)
    adopted = project.call("snakegpt.store", *words)
    assert adopted.returncode == 0, adopted.stderr
    again = project.run(TOKENIZER)
    assert (again.ran, again.found) == (set(), {"build_tokenizer"})
    assert project.digest(TOKENIZER) == digest
    assert "a comment in REVISION's clothes" in project.why(TOKENIZER)
