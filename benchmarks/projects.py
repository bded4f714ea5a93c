"""Projects of many parts for benchmarks: an experiment as snakegpt runs it, and the same DAG of trivial rules.

Neither runs a stage: their results are made here, as the stages would have left them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple

from snakegpt import locks
from snakegpt.identity import Action, code_of
from snakegpt.pipeline import Pipeline, Request
from snakegpt.settings import load_files
from snakegpt.store import Store
from snakegpt.store.links import digest_of, link

ROOT = Path(__file__).parent.parent

# What both are called with; the trivial one has no profile to say the rest.
FLAGS = ["--cores", "2", "--scheduler", "greedy"]
TRIVIAL_FLAGS = [*FLAGS, "--rerun-triggers", "mtime", "params", "input"]


class Call(NamedTuple):
    """One finished Snakemake call.

    cpu_s  user and system time, which other work on the machine changes least
    """

    elapsed_s: float
    cpu_s: float
    peak_mb: float
    text: str


# Snakemake sleeps a tenth of a second for each job that it touches: a quarter of an hour for 10,000.
TOUCH = """
import sys
from snakemake.executors.touch import Executor
Executor.SLEEPING_TIME = 0
from snakemake.cli import main
main(sys.argv[1:])
"""


def touch(place: Path, words: list[str]) -> None:
    """Give every result the metadata that Snakemake keeps of a job that ran."""
    _call(place, ["-c", TOUCH, *words, "--touch", "--forceall", "--cores", "1000"])


def snakemake(place: Path, words: list[str]) -> Call:
    """Call Snakemake in a project."""
    return _call(place, ["-m", "snakemake", *words])


def _call(place: Path, words: list[str]) -> Call:
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=place,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        elapsed_s = time.perf_counter() - started
        output.seek(0)
        text = output.read().decode("utf-8")
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, text[-5000:]
    cpu_s = usage.ru_utime + usage.ru_stime
    return Call(elapsed_s, cpu_s, usage.ru_maxrss * 1024 / 1e6, text)


# ---- an experiment ----

SETTINGS = """
corpora:
  x: {source: {kind: local, paths: ["texts/*.txt"]}, part_bytes: 1000}
tokenizers:
  x: {kind: char, corpus: x}
experiments:
  x: {corpus: x, tokenizer: x}
"""


def make_project(place: Path, parts: int) -> None:
    """A project whose corpus is locked in so many files of a part each, and of which nothing is made."""
    place.mkdir()
    for name in ("Snakefile", "rules", "profiles", "workflow"):
        (place / name).symlink_to(ROOT / name)
    (place / "config.yaml").write_text(SETTINGS)
    locks.put(place / "corpora.lock.json", {"x": _entry(place, parts)})


def fill_project(place: Path, parts: int) -> None:
    """Put the whole experiment of a project into results/, published by the store and not by its stages."""
    settings = load_files([place / "config.yaml"], {})
    pipeline = Pipeline(settings, {"x": _entry(place, parts)})
    with chdir(place):
        store = Store("store")
        store.make()
        names = {"corpus": "x", "tokenizer": "x", "experiment": "x"}
        wanted = [("fetch_corpus", ["corpus"]), ("build_tokenizer", ["tokenizer"])]
        wanted += [("index_tokens", ["corpus", "tokenizer"]), ("bench_network", ["experiment"])]
        wanted += [("plan_training", ["experiment"]), ("train_model", ["experiment"])]
        for stage, wildcards in wanted:
            if stage == "index_tokens":
                for part in pipeline.parts("x"):
                    given = {"corpus": "x", "tokenizer": "x", "part": part}
                    _publish(store, pipeline.request("encode_tokens", given))
            _publish(store, pipeline.request(stage, {name: names[name] for name in wildcards}))


def _entry(place: Path, parts: int) -> locks.Entry:
    source = load_files([place / "config.yaml"], {}).corpora["x"].source.model_dump()
    files = (locks.File(f"texts/{part:06d}.txt", f"{part:064x}", 1000) for part in range(parts))
    return locks.Entry(source, tuple(files))


def _publish(store: Store, request: Request) -> None:
    inputs = {
        role: [digest_of(store, Path(path)) for path in paths]
        for role, paths in request.inputs.items()
    }
    action = Action(request.stage, request.settings, code_of(request.stage), inputs)
    with store.workspace(action.key) as workspace:
        for path in request.outputs:
            (workspace / Path(path).name).write_text(json.dumps({"of": request.name, "path": path}))
        outputs = store.publish(workspace)
    record = {"key": action.key, "outputs": outputs, "inputs": {}, "stage": request.stage}
    store.record(action.key, record)
    link(store, record, Path(request.folder))


# ---- the same DAG of trivial rules ----

TRIVIAL = """
PARTS = [f"{{i:06d}}" for i in range({parts})]
rule all:
    input: "results/models/x/weights"
rule fetch:
    output: "results/corpora/x/corpus.json"
    shell: "touch {{output}}"
rule tokenizer:
    input: "results/corpora/x/corpus.json"
    output: "results/tokenizers/x/tokenizer.json"
    shell: "touch {{output}}"
rule encode:
    input: "results/corpora/x/corpus.json", "results/tokenizers/x/tokenizer.json"
    output: multiext("results/tokens/x/{{part}}", "_train.bin", "_val.bin", ".json")
    shell: "touch {{output}}"
rule index:
    input: expand("results/tokens/x/{{part}}.json", part=PARTS)
    output: "results/tokens/x/manifest.json"
    shell: "touch {{output}}"
rule network:
    input: "results/tokenizers/x/tokenizer.json"
    output: "results/networks/x/network.json"
    shell: "touch {{output}}"
rule plan:
    input: "results/tokenizers/x/tokenizer.json"
    output: "results/plans/x/plan.json"
    shell: "touch {{output}}"
rule train:
    input: "results/tokens/x/manifest.json", "results/plans/x/plan.json", "results/networks/x/network.json"
    output: multiext("results/models/x/", "weights", "best", "config", "metrics")
    shell: "touch {{output}}"
"""


def make_trivial(place: Path, parts: int) -> None:
    """A folder with the Snakefile alone."""
    place.mkdir()
    (place / "Snakefile").write_text(TRIVIAL.format(parts=parts))


def completed_per_minute(place: Path, words: list[str], window_s: float) -> float:
    """Parts whose jobs a Snakemake completes in its first seconds, from nothing; it is killed then."""
    for name in ("results", ".snakemake"):
        shutil.rmtree(place / name, ignore_errors=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", *words],
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = process.wait(window_s)
        assert status == 0, f"{words} ended with status {status}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    took_s = time.perf_counter() - started
    return 60 * len(list((place / "results/tokens/x").glob("*.json"))) / took_s


def fill_trivial(place: Path, parts: int) -> None:
    """Every result of the trivial rules, empty but for two characters."""
    names = ["corpora/x/corpus.json", "tokenizers/x/tokenizer.json", "tokens/x/manifest.json"]
    names += ["networks/x/network.json", "plans/x/plan.json"]
    names += [f"models/x/{name}" for name in ("weights", "best", "config", "metrics")]
    for part in range(parts):
        names += [f"tokens/x/{part:06d}{end}" for end in ("_train.bin", "_val.bin", ".json")]
    for name in names:
        path = place / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
