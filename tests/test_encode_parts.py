"""Several parts encoded by one job, as a cluster's profile has it: where they are encoded, and no more."""

from __future__ import annotations

import itertools
import re
import shutil

import pytest
from test_workflow import Project

MANIFEST = "results/tokens/generated-generated_char/manifest.json"


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A project whose corpus has seven files, each a part."""
    project = Project(tmp_path_factory.mktemp("parts"))
    project.set("corpora.generated.part_bytes", 1)
    for number in range(5):
        text = f"the cat sat on mat {number} " * 300
        (project.folder / f"texts/c{number}.txt").write_text(text, encoding="utf-8")
    files = ("--configfile", "config.yaml", "mine.yaml")
    locked = project.call("snakegpt.stages.lock_corpora", *files)
    assert locked.returncode == 0, locked.stderr
    return project


def made(project, jobs=None, *words):
    batched = ("--set-resources", f"encode_parts:jobs={jobs}") if jobs else ()
    files = ("--configfile", "config.yaml", "mine.yaml")
    shutil.rmtree(project.folder / "logs", ignore_errors=True)
    done = project.call("snakemake", "--cores", "2", *words, *batched, *files, "--", MANIFEST)
    return done.returncode, done.stdout + done.stderr


def planned(rule, text):
    return len(re.findall(rf"^(?:local)?rule {rule}:", text, re.MULTILINE))


def started(rule, project):
    return len(list((project.folder / "logs" / rule).rglob("*.log")))


def parts(how, project):
    """By the jobs' own logs: two jobs at once may break each other's lines on the terminal."""
    logs = (file.read_text("utf-8") for file in (project.folder / "logs").rglob("*.log"))
    found = (re.findall(rf"^encode_tokens \S+/(\d+)  {how}", log, re.MULTILINE) for log in logs)
    return sorted(itertools.chain(*found))


def test_parts_share_jobs_and_each_is_then_found(seven):
    everyone = [f"{number:06d}" for number in range(7)]
    status, text = made(seven, 2)
    assert status == 0, text
    assert started("encode_parts", seven) == 2
    assert parts("runs", seven) == everyone
    assert parts("found in the store", seven) == everyone
    assert not list((seven.folder / MANIFEST).parent.glob("batch_*"))  # served, and gone
    assert "Nothing to be done" in made(seven, 2)[1]
    # Another number of jobs, or a job a part, gives the same keys.
    for jobs in (3, None):
        status, text = made(seven, jobs)
        assert status == 0, text
        assert started("encode_parts", seven) == (jobs or 0)
        assert not parts("runs", seven)


def test_a_part_that_fails_costs_none_that_was_done_before(seven):
    """The third part holds what is no UTF-8: its job ends there, and finds the first two when tried again."""
    file = sorted((seven.folder / "texts").iterdir())[2]
    file.write_bytes(b"\xff" + file.read_bytes())
    files = ("--configfile", "config.yaml", "mine.yaml")
    locked = seven.call("snakegpt.stages.lock_corpora", "--update", "generated", *files)
    assert locked.returncode == 0, locked.stderr
    seven.set("tokenizers.generated_char", {"kind": "byte"})  # all parts anew
    status, text = made(seven, 1)
    assert status != 0
    assert "is not valid UTF-8 at byte 0" in text
    assert parts("done", seven) == ["000000", "000001"]
    status, text = made(seven, 1)
    assert status != 0
    assert parts("found in the store", seven) == ["000000", "000001"]


def test_other_resources_of_the_rule_ask_for_no_batches(seven):
    status, text = made(
        seven, None, "-n", "--forceall", "--set-resources", "encode_parts:mem_mb=500"
    )
    assert status == 0, text
    assert planned("encode_tokens", text) == 7
    assert not planned("encode_parts", text)


def test_what_is_no_number_of_jobs_is_refused(seven):
    for wrong in ("0", "many"):
        status, text = made(seven, wrong)
        assert status == 1
        assert "resource jobs of rule encode_parts = " in text
        assert "a number from 1 on is wanted" in text
