"""The whole pipeline through Snakemake, on a copy of the project: what runs, what does not, and why."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "tree",
    "and",
    "then",
    "so",
    "it",
    "was",
    "red",
    "blue",
    "old",
    "new",
]

DATA = {"fetch_corpus", "build_tokenizer", "encode_tokens", "index_tokens"}
AFTER_TRAINING = {"evaluate_model", "sample_text", "build_report", "build_index"}


class Project:
    """A checkout of its own, with text, settings and store, that runs Snakemake as a person would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Snakefile", "rules", "workflow", "profiles", "envs", "config.yaml"):
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / name)
        (folder / "mine.yaml").write_text((ROOT / "tests/tiny.yaml").read_text(encoding="utf-8"))
        (folder / "texts").mkdir()
        draw = random.Random(0)
        for name in "ab":
            text = " ".join(draw.choice(WORDS) for _ in range(2000))
            (folder / "texts" / f"{name}.txt").write_text(text, encoding="utf-8")
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder / "workflow"),
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / ".cache"),
        }
        self.environment.pop("SNAKEGPT_STORE", None)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", *words]

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def snakemake(self, *words: str) -> subprocess.CompletedProcess[str]:
        configuration = ("--configfile", "config.yaml", "mine.yaml")
        return self.call("snakemake", "--cores", "2", *configuration, "--", *words)

    def run(self, *words: str) -> Run:
        done = self.snakemake(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return Run(done.stdout + done.stderr)

    def set(self, path: str, value: object) -> None:
        """Change one value of mine.yaml, as a person would in an editor."""
        file = self.folder / "mine.yaml"
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        *parents, last = path.split(".")
        block = config
        for parent in parents:
            block = block.setdefault(parent, {})
        block[last] = value
        file.write_text(yaml.safe_dump(config), encoding="utf-8")

    def why(self, target: str) -> str:
        done = self.call(
            "snakegpt.store", "why", target, "--configfile", "config.yaml", "mine.yaml"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def digest(self, path: str) -> str:
        return (self.folder / path).resolve().name


class Run:
    """Which stages one Snakemake call ran, and which it only looked up."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.ran = set(re.findall(r"^(\w+) \S+  runs ", text, re.MULTILINE))
        self.found = set(re.findall(r"^(\w+) \S+  found in the store", text, re.MULTILINE))
        self.idle = "Nothing to be done" in text


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose tiny experiment has been built once; its path has a space and a quote in it."""
    folder = tmp_path_factory.mktemp("work") / "it's a project"
    folder.mkdir()
    project = Project(folder)
    locked = project.call(
        "snakegpt.stages.lock_corpora", "--configfile", "config.yaml", "mine.yaml"
    )
    assert locked.returncode == 0, locked.stderr
    first = project.run()
    assert first.ran >= DATA | {"train_model"} | AFTER_TRAINING
    return project


def test_results_stand_where_the_design_says(project):
    results = project.folder / "results"
    for path in (
        "corpora/generated/corpus.json",
        "tokenizers/generated_char/tokenizer.json",
        "tokens/generated-generated_char/manifest.json",
        "tokens/generated-generated_char/train_000000.bin",
        "plans/tiny/plan.json",
        "networks/tiny/network.json",
        "models/tiny/weights.safetensors",
        "models/tiny/best.safetensors",
        "models/tiny/config.json",
        "models/tiny/metrics.jsonl",
        "models/tiny/optimizer.safetensors",
        "evaluations/tiny/evaluation.json",
        "samples/tiny/samples.jsonl",
        "reports/tiny/report.html",
        "reports/index.html",
    ):
        if path.endswith(".html"):  # browsers go by the name that a link leads to
            assert not (results / path).is_symlink(), path
        else:
            assert not os.path.isabs(os.readlink(results / path)), path
        assert (results / path).stat().st_size > 0


def test_the_state_of_a_finished_training_is_gone(project):
    assert not list((project.folder / "store/state").iterdir())
    assert not list((project.folder / "store/tmp").iterdir())


def test_a_second_run_does_nothing(project):
    assert project.run().idle


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("execution.log_interval_s", 1),
        ("execution.save_interval_s", 7),
        ("execution.profile_step", 3),
        ("execution.download_workers", 2),
        ("execution.device", "cpu"),
        ("execution.ranks", 1),
        ("execution.attention", "math"),
        ("execution.compiled", False),
        ("execution.network_environment", False),
        ("experiments.tiny.execution", {"rows_per_rank": 2}),
        ("corpora.generated.description", "other words"),
    ],
)
def test_what_is_no_science_reruns_nothing_that_trains(project, setting, value):
    before = (project.folder / "mine.yaml").read_text()
    project.set(setting, value)
    try:
        dry = project.run("train_tiny", "evaluate_tiny", "sample_tiny")
        assert dry.idle, dry.text
    finally:
        (project.folder / "mine.yaml").write_text(before)


def test_lost_results_come_back_without_a_stage_running(project):
    weights = project.digest("results/models/tiny/weights.safetensors")
    shutil.rmtree(project.folder / "results")
    again = project.run()
    assert not again.ran
    assert again.found >= DATA | {"train_model"} | AFTER_TRAINING
    assert project.digest("results/models/tiny/weights.safetensors") == weights


def test_a_learning_rate_reruns_training_and_what_follows_and_going_back_is_free(project):
    weights = project.digest("results/models/tiny/weights.safetensors")
    before = (project.folder / "mine.yaml").read_text()
    project.set("experiments.tiny.training.learning_rate", 2e-2)
    reason = project.why("report_tiny")
    assert "setting training.learning_rate: 0.01 -> 0.02" in reason
    changed = project.run()
    assert changed.ran == {"plan_training", "train_model"} | AFTER_TRAINING
    assert project.digest("results/models/tiny/weights.safetensors") != weights
    (project.folder / "mine.yaml").write_text(before)
    back = project.run()
    assert not back.ran
    assert project.digest("results/models/tiny/weights.safetensors") == weights


def test_another_tokenizer_rebuilds_tokens_and_what_follows_but_downloads_nothing(project):
    before = (project.folder / "mine.yaml").read_text()
    project.set("tokenizers.second", {"kind": "char", "corpus": "generated"})
    project.set("experiments.tiny.tokenizer", "second")
    other = project.run("train_tiny")
    # The same kind on the same corpus: the tokenizer's action is found, and so are its tokens.
    assert not other.ran & {"fetch_corpus", "build_tokenizer", "encode_tokens", "index_tokens"}
    assert "train_model" not in other.ran
    (project.folder / "mine.yaml").write_text(before)
    assert not project.run("train_tiny").ran


def test_a_change_that_gives_the_same_bytes_stops_there(project):
    """Early cut-off within one invocation: the stage reruns, its dependents only look up."""
    science = project.folder / "workflow/snakegpt/documents/rows.py"
    before = science.read_text(encoding="utf-8")
    science.write_text(before + "\nUNUSED = 1\n", encoding="utf-8")
    try:
        assert "snakegpt.documents.rows, outside functions and classes: changed" in project.why(
            "train_tiny"
        )
        changed = project.run()
        assert "encode_tokens" in changed.ran
        assert not changed.ran & {"index_tokens", "train_model", *AFTER_TRAINING}
        assert "index_tokens" in changed.found
    finally:
        science.write_text(before, encoding="utf-8")
    assert not project.run().ran


def test_one_changed_text_is_noticed_and_named(project):
    text = project.folder / "texts/a.txt"
    before = text.read_text(encoding="utf-8")
    shutil.rmtree(project.folder / "results/corpora")
    record = next(
        path
        for path in (project.folder / "store/actions").rglob("*.json")
        if json.loads(path.read_text())["stage"] == "fetch_corpus"
    )
    kept = record.read_text()
    record.unlink()
    text.write_text(before.replace("cat", "cow"), encoding="utf-8")
    try:
        done = project.snakemake("results/corpora/generated/corpus.json")
        assert done.returncode != 0
        message = done.stdout + done.stderr
        assert "a.txt" in message and "expected" in message and "found" in message
    finally:
        text.write_text(before, encoding="utf-8")
        record.write_text(kept)
    assert "train_model" not in project.run().ran
    assert not project.run("results/corpora/generated/corpus.json").ran


def test_a_page_of_the_network_makes_the_index_lead_to_it_and_nothing_else_anew(project):
    page = project.folder / "results/networks/tiny/network.html"
    page.write_text("as `snakemake scaling_tiny` leaves it")
    link = "../networks/tiny/network.html"
    try:
        measured = project.run()
        assert measured.ran == {"build_index"}
        assert link in (project.folder / "results/reports/index.html").read_text(encoding="utf-8")
        assert project.run().idle
    finally:
        page.unlink()
    assert not project.run().ran  # the index without it is found in the store
    assert link not in (project.folder / "results/reports/index.html").read_text(encoding="utf-8")


def test_why_says_that_nothing_differs(project):
    assert "is up to date" in project.why("results/models/tiny/weights.safetensors")


def test_a_dry_run_runs_nothing(project):
    before = sorted(str(p) for p in project.folder.rglob("*") if ".snakemake" not in str(p))
    done = project.call(
        "snakemake",
        "-n",
        "--configfile",
        "config.yaml",
        "mine.yaml",
        "--forceall",
        "--",
        "report_tiny",
    )
    assert done.returncode == 0
    assert "train_model" in done.stdout + done.stderr
    after = sorted(str(p) for p in project.folder.rglob("*") if ".snakemake" not in str(p))
    assert [p for p in after if "__pycache__" not in p] == [
        p for p in before if "__pycache__" not in p
    ]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("train_tny", ["unknown target 'train_tny'", "Nearest valid name: train_tiny"]),
        (
            "results/models/nobody/weights.safetensors",
            ["results/models/nobody/weights.safetensors"],
        ),
    ],
)
def test_a_target_that_does_not_exist_is_explained(project, target, words):
    done = project.snakemake(target)
    assert done.returncode != 0
    for word in words:
        assert word in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_mistyped_setting_stops_snakemake_before_anything_runs(project):
    before = (project.folder / "mine.yaml").read_text()
    project.set("experiments.tiny.training.stepps", 3)
    try:
        done = project.snakemake("train_tiny")
    finally:
        (project.folder / "mine.yaml").write_text(before)
    assert done.returncode != 0
    message = done.stdout + done.stderr
    assert "unknown setting experiments.tiny.training.stepps (mine.yaml, line" in message
    assert "Nearest valid name: steps" in message
    assert "Traceback" not in message


def test_the_published_recipe_plans_without_its_corpus(project):
    done = project.call("snakemake", "-n", "--config", "scale=full", "--", "train_gpt2")
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("fetch_corpus", "encode_tokens", "plan_training", "train_model"):
        assert stage in done.stdout + done.stderr


def test_a_hub_out_of_reach_fails_in_seconds_with_one_message(project):
    project.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    try:
        started = time.monotonic()
        done = project.call(
            "snakemake",
            "--cores",
            "1",
            "--config",
            "scale=full",
            "--",
            "train_gpt2",
        )
        elapsed = time.monotonic() - started
    finally:
        del project.environment["HF_ENDPOINT"]
    assert done.returncode != 0
    assert "cannot be reached" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert Run(done.stdout + done.stderr).ran == {"fetch_corpus"}  # the first of all stages
    assert elapsed < 30  # most of it Snakemake's start and the test machine's other work


def test_killed_training_resumes_to_the_same_weights(project):
    """kill -9 of the training process in the middle, then the same command."""
    before = (project.folder / "mine.yaml").read_text()
    project.set("experiments.tiny.training.steps", 3000)
    project.set("execution.save_interval_s", 0.5)
    try:
        undisturbed = project.run("train_tiny")
        assert "train_model" in undisturbed.ran
        expected = project.digest("results/models/tiny/weights.safetensors")
        shutil.rmtree(project.folder / "results/models")
        for path in (project.folder / "store/actions").rglob("*.json"):
            record = json.loads(path.read_text())
            if record["stage"] == "train_model":
                path.unlink()
        words = ("--cores", "2", "--configfile", "config.yaml", "mine.yaml", "--", "train_tiny")
        process = subprocess.Popen(
            project.command("snakemake", *words),
            cwd=project.folder,
            env=project.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        kill_when_state_is_saved(project.folder / "store/state", process)
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0, output
        resumed = project.run("train_tiny")
        assert "train_model" in resumed.ran
        assert "resum" in resumed.text
        assert project.digest("results/models/tiny/weights.safetensors") == expected
    finally:
        (project.folder / "mine.yaml").write_text(before)


def kill_when_state_is_saved(state: Path, process: subprocess.Popen[str]) -> None:
    """kill -9 every process of the training stage once a state of it is on disk."""
    deadline = time.monotonic() + 120
    while not list(state.glob("*/state_*")):  # whole ones; what is being written begins with a dot
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                inside = os.readlink(entry / "cwd") == str(state.parent.parent)
            except OSError:
                continue
            if inside and b"snakegpt.stages.train_model" in words:
                os.kill(int(entry.name), signal.SIGKILL)


def test_a_mixture_is_trained_evaluated_and_reported(project):
    """Of a corpus that is there already and another one; what was encoded stays."""
    (project.folder / "more").mkdir()
    (project.folder / "more/c.txt").write_text(" ".join(WORDS * 60), encoding="utf-8")
    other = {"kind": "local", "paths": ["more/*.txt"]}
    project.set(
        "corpora.other", {"source": other, "validation": {"by": "position", "fraction": 0.1}}
    )
    project.set("mixtures.both", {"weights": {"generated": 3, "other": 1}})
    file = project.folder / "mine.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    config["experiments"]["mixed"] = {**config["experiments"]["tiny"], "corpus": "both"}
    config["default_experiments"] = ["mixed"]
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    locked = project.call(
        "snakegpt.stages.lock_corpora", "--configfile", "config.yaml", "mine.yaml"
    )
    assert locked.returncode == 0, locked.stderr
    first = project.run("report_mixed")
    assert {"fetch_corpus", "encode_tokens", "index_tokens", "train_model"} <= first.ran
    assert "build_tokenizer" not in first.ran
    evaluation = json.loads(
        (project.folder / "results/evaluations/mixed/evaluation.json").read_text()
    )
    assert len(evaluation["sets"]) == 2
    assert sum(part["n_tokens"] for part in evaluation["sets"]) == evaluation["n_tokens"]
    page = (project.folder / "results/reports/mixed/report.html").read_text(encoding="utf-8")
    assert "best, on other" in page and "0.75 of the rows" in page
    assert project.run("report_mixed").idle
    project.set("mixtures.both.weights.other", 2)
    assert "train_model" in project.run("train_mixed").ran
