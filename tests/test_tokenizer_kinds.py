"""Experiments with tokenizers of every kind that needs no download, from text to report."""

from __future__ import annotations

import copy
import json
import re

import pytest
import yaml
from snakegpt import tokenizers
from snakegpt.shards import read_shard
from test_workflow import Project

pytestmark = pytest.mark.long

KINDS = {
    "byte": {"kind": "byte"},
    "bpe": {"kind": "bpe", "corpus": "generated", "vocabulary": 300},
    "wide": {
        "kind": "char",
        "corpus": "generated",
    },  # of a text with more characters than uint16 counts
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("kinds"))
    file = project.folder / "mine.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    [tiny] = config["experiments"].values()
    config["default_experiments"] = ["bpe"]
    config["tokenizers"] = KINDS
    config["experiments"] = {}
    for kind in KINDS:
        experiment = copy.deepcopy(tiny) | {"tokenizer": kind}
        experiment["training"]["steps"] = 10
        config["experiments"][kind] = experiment
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    letters = "".join(chr(i) for i in range(0x10000, 0x21000))
    (project.folder / "texts" / "a.txt").write_text(letters + " the cat sat" * 2000, "utf-8")
    project.run("lock_corpora")
    return project


def test_every_kind_of_tokenizer_gets_its_report(project):
    project.run("report_byte", "report_bpe", "evaluate_wide")
    for kind, dtype in {"byte": "uint16", "bpe": "uint16", "wide": "uint32"}.items():
        folder = project.folder / f"results/tokens/generated-{kind}"
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        tokenizer = tokenizers.load(project.folder / f"results/tokenizers/{kind}/tokenizer.json")
        assert manifest["dtype"] == dtype
        assert manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
        ids = read_shard(folder / "train_000000.bin", fingerprint=tokenizer.fingerprint)
        assert ids.dtype == dtype
        text = (project.folder / "texts" / "a.txt").read_text(encoding="utf-8")
        [first, second] = (ids == tokenizer.end_of_text).nonzero()[0]
        assert (first, tokenizer.decode(ids[1:second])) == (0, text[: len(text) * 9 // 10])
        split = manifest["splits"]["train"]
        per_token = split["n_text_bytes"] / split["n_tokens"]
        assert per_token > 1 if kind != "byte" else 0.99 < per_token <= 1
        if kind != "wide":
            page = (project.folder / f"results/reports/{kind}/report.html").read_text("utf-8")
            assert f'<td class="n">{per_token:.2f}</td>' in page
    evaluation = project.folder / "results/evaluations/wide/evaluation.json"
    assert re.search(r'"bits_per_byte": \d', evaluation.read_text(encoding="utf-8"))


def test_a_tokenizer_that_learns_runs_again_only_when_its_text_or_settings_change(project):
    manifest = "results/tokens/generated-bpe/manifest.json"
    assert project.run(manifest).idle
    project.set("tokenizers.bpe.vocabulary", 310)
    assert "vocabulary" in project.why("results/tokenizers/bpe/tokenizer.json")
    assert project.run(manifest).ran == {"build_tokenizer", "encode_tokens", "index_tokens"}
    project.set("tokenizers.bpe.vocabulary", 300)
    run = project.run(manifest)
    assert (run.ran, "build_tokenizer" in run.found) == (set(), True)
