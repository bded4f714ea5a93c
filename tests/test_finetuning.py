"""Fine-tuning through Snakemake: from an experiment and from a folder of foreign weights, and what reruns."""

from __future__ import annotations

import json

import pytest
import yaml
from pretrained_fixtures import foreign
from test_workflow import Project

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32}


class Tuned(Project):
    """The tiny experiment, and one that starts from its weights."""

    def settings(self):
        return yaml.safe_load((self.folder / "mine.yaml").read_text(encoding="utf-8"))

    def events(self, experiment: str, event: str):
        path = self.folder / f"results/models/{experiment}/metrics.jsonl"
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return [line for line in lines if line["event"] == event]

    def lock(self, *words: str) -> None:
        configuration = ("--configfile", "config.yaml", "mine.yaml")
        done = self.call("snakegpt.stages.lock_corpora", *words, *configuration)
        assert done.returncode == 0, done.stderr

    def theirs(self, **config) -> None:
        """Write or change the folder of foreign weights."""
        about = json.loads(
            (self.folder / "results/tokenizers/generated_char/tokenizer.json").read_text()
        )
        foreign(self.folder / "theirs", vocab_size=about["n_vocab"], **SIZES, **config)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Tuned(tmp_path_factory.mktemp("tuned"))
    tuned = project.settings()["experiments"]["tiny"]
    project.set("experiments.tuned", tuned)
    project.set("experiments.tuned.training.start_from", "tiny")
    project.set("experiments.tuned.training.learning_rate", 3e-3)
    project.lock()
    first = project.run("report_tuned")
    assert {"adapt_weights", "train_model", "build_report"} <= first.ran
    return project


def test_it_begins_where_the_other_experiment_was_best_and_says_so(project):
    [start] = project.events("tuned", "start")
    assert start["started_from"]["name"] == "tiny"
    best = project.digest("results/models/tiny/best.safetensors")
    assert start["started_from"]["sha256"] == best  # they fit as they are: one object
    assert project.digest("results/starts/tuned/weights.safetensors") == best
    reached = min(line["loss"] for line in project.events("tiny", "validation"))
    assert project.events("tuned", "validation")[0]["loss"] == pytest.approx(reached, abs=1e-5)
    page = (project.folder / "results/reports/tuned/report.html").read_text(encoding="utf-8")
    assert "trained from the best weights of tiny for 30 steps" in page
    assert "Weights it started from" in page
    assert project.run("report_tuned").idle


def test_other_weights_are_noticed_told_and_trained_from(project):
    before = (project.folder / "mine.yaml").read_text()
    weights = project.digest("results/models/tuned/weights.safetensors")
    project.set("experiments.tiny.training.seed", 7)
    told = project.why("train_tuned")
    assert "setting training.seed: 1337 -> 7" in told
    rows = {line.split("  ")[0]: line for line in told.splitlines()}
    assert "only on a change of weights" in rows["adapt_weights tuned"]
    assert "only on a change of initial" in rows["train_model tuned"]
    assert "train_model" in project.run("train_tiny").ran
    told = project.why("results/models/tuned/weights.safetensors")
    assert "input weights results/models/tiny/best.safetensors" in told
    assert "(made by train_model tiny)" in told
    changed = project.run("train_tuned")
    assert changed.ran == {"adapt_weights", "train_model"}
    assert project.digest("results/models/tuned/weights.safetensors") != weights
    done = project.call("snakegpt.store", "diff", "tiny", "tuned", "--configfile", "config.yaml", "mine.yaml")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "input initial results/starts/tuned/weights.safetensors: (none) ->" in done.stdout
    (project.folder / "mine.yaml").write_text(before)
    back = project.run("report_tuned")
    assert not back.ran
    assert project.digest("results/models/tuned/weights.safetensors") == weights


def test_another_name_of_the_same_experiment_reruns_nothing(project):
    before = (project.folder / "mine.yaml").read_text()
    project.set("experiments.little", project.settings()["experiments"]["tiny"])
    project.set("experiments.tuned.training.start_from", "little")
    again = project.run("train_tuned")
    assert not again.ran
    (project.folder / "mine.yaml").write_text(before)


def test_a_folder_of_foreign_weights_is_fetched_adapted_and_trained_from(project):
    project.theirs()
    source = {"kind": "local", "paths": ["theirs/config.json", "theirs/model.safetensors"]}
    project.set(
        "weights.theirs", {"tokenizer": "generated_char", "source": source, "license": "MIT"}
    )
    project.set("experiments.foreign", project.settings()["experiments"]["tuned"])
    project.set("experiments.foreign.training.start_from", "theirs")
    told = project.snakemake("train_foreign")
    assert "weights theirs are now locked: 2 files" in told.stdout + told.stderr

    # tiny has no biases, these weights do: said before anything else of it is made.
    told = project.snakemake("report_foreign")
    message = told.stdout + told.stderr
    assert told.returncode != 0 and "Traceback" not in message
    assert "model.bias is false, the weights have true: set it to that" in message
    assert "train_model foreign  runs" not in message

    project.set("experiments.foreign.model.bias", True)
    ran = project.run("report_foreign").ran
    assert {"adapt_weights", "train_model"} <= ran and "fetch_weights" not in ran
    assert json.loads((project.folder / "results/starts/foreign/start.json").read_text())[
        "context"
    ] == [32, 16]
    page = (project.folder / "results/reports/foreign/report.html").read_text(encoding="utf-8")
    assert "the weights theirs (MIT), their context cut from 32 to 16 tokens, for 30 steps" in page
    shown = project.call("snakegpt.store", "show", "results/models/foreign/weights.safetensors")
    assert "fetch_weights theirs" in shown.stdout and "model.safetensors" in shown.stdout

    project.theirs(layer_norm_epsilon=1e-5, initializer_range=0.2)
    project.lock("--update", "theirs")
    told = project.why("train_foreign")
    assert "fetch_weights theirs: runs" in told
    assert "setting files[model.safetensors].sha256" in told
    assert "only on a change of initial" in told
    assert project.run("train_foreign").ran == {"fetch_weights", "adapt_weights", "train_model"}
    assert project.run("train_foreign").idle
