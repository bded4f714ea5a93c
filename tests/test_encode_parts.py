"""Several parts encoded by one job, as a cluster's profile has it: where they are encoded, and no more."""

from __future__ import annotations

import re

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
    done = project.call("snakemake", "--cores", "2", *words, *batched, *files, "--", MANIFEST)
    return done.returncode, done.stdout + done.stderr


def started(rule, text):
    return len(re.findall(rf"^(?:local)?rule {rule}:", text, re.MULTILINE))


def parts(how, text):
    return sorted(re.findall(rf"^encode_tokens \S+/(\d+)  {how}", text, re.MULTILINE))


def test_parts_share_jobs_and_each_is_then_found(seven):
    everyone = [f"{number:06d}" for number in range(7)]
    status, text = made(seven, 2)
    assert status == 0, text
    assert started("encode_parts", text) == 2
    assert parts("runs", text) == everyone
    assert parts("found in the store", text) == everyone
    assert not list((seven.folder / MANIFEST).parent.glob("batch_*"))  # served, and gone
    assert "Nothing to be done" in made(seven, 2)[1]
    # Another number of jobs, or a job a part, gives the same keys.
    for jobs in (3, None):
        status, text = made(seven, jobs)
        assert status == 0, text
        assert started("encode_parts", text) == (jobs or 0)
        assert not parts("runs", text)


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
    assert parts("done", text) == ["000000", "000001"]
    status, text = made(seven, 1)
    assert status != 0
    assert parts("found in the store", text) == ["000000", "000001"]


def test_what_is_no_number_of_jobs_is_refused(seven):
    for wrong in ("0", "many"):
        status, text = made(seven, wrong)
        assert status == 1
        assert "resource jobs of rule encode_parts = " in text
        assert "a number from 1 on is wanted" in text
