"""Imports point down the layers, stages stay apart, and what the Snakefile imports stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from snakegpt.identity import NOT_SCIENCE, code_of
from snakegpt.pipeline import OUTPUTS

PACKAGE = Path(__file__).parent.parent / "workflow" / "snakegpt"

LAYERS = [
    {
        "artefacts",
        "durable",
        "errors",
        "corpus_parts",
        "lineage",
        "formats",
        "gpus",
        "progress",
        "settings",
        "identity",
        "locks",
        "pipeline",
        "store",
        "run",
        "reference",
        "slurm",
        "demo",
        "notebook",
    },
    {
        "command",
        "sources",
        "documents",
        "splitting",
        "tokenizers",
        "bpe_training",
        "engines",
        "shards",
        "inspect",
    },
    {
        "losses",
        "activations",
        "model",
        "huggingface_format",
        "optimizer",
        "distributed",
        "hardware",
        "launching",
        "nodes",
        "outcomes",
        "batches",
        "prefetch",
        "placement",
        "tokens",
        "strategies",
        "stability",
        "fitting",
        "watchdog",
    },
    {
        "training_state",
        "updates",
        "continuation",
        "starting",
        "trainer",
        "evaluation",
        "sampling",
        "network",
        "planning",
        "plan_text",
        "calibration",
        "counters",
        "parts",
        "metrics",
        "scaling",
        "charts",
        "pages",
    },
    {"stages"},
]


def modules() -> dict[str, Path]:
    return {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" or path.parent != PACKAGE
    }


def layer(module: str) -> int:
    top = module.split(".")[0]
    found = [number for number, names in enumerate(LAYERS) if top in names]
    assert len(found) == 1, f"{module} belongs in exactly one layer of LAYERS"
    return found[0]


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    inside = {name.removeprefix("snakegpt.") for name in names if name.startswith("snakegpt.")}
    return {name for name in inside if name.split(".")[0] in {m.split(".")[0] for m in modules()}}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module):
    for other in imported(modules()[module]):
        assert layer(other) <= layer(module), f"{module} imports {other} of a higher layer"
        if module.startswith("stages.") and other.startswith("stages."):
            pytest.fail(f"stage {module} imports stage {other}")


def test_what_the_snakefile_and_a_hit_import_is_light():
    code = "import sys, snakegpt.pipeline, snakegpt.locks, snakegpt.run, snakegpt.store.__main__; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "torch",
        "transformers",
        "numpy",
        "pandas",
        "tiktoken",
        "datasets",
        "pyarrow",
        "matplotlib",
    }
    assert not heavy & set(loaded)


def test_the_runner_reads_no_settings():
    code = "import sys, snakegpt.run; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"pydantic", "yaml"} & set(loaded)  # a hit takes a fraction of a second


@pytest.mark.parametrize("stage", sorted({*OUTPUTS}))
def test_every_stage_declares_its_science(stage):
    code = code_of(stage)
    assert code["revision"] >= 1
    assert not NOT_SCIENCE & code["modules"].keys()


@pytest.mark.parametrize("stage", sorted({*OUTPUTS, "lock_corpora", "export_tokens"}))
def test_every_stage_runs_alone(stage):
    done = subprocess.run(
        [sys.executable, "-m", f"snakegpt.stages.{stage}", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_importing_a_module_does_nothing():
    """No module but a stage's or a command's `__main__` block does work at import."""
    for name, path in modules().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            assert not call, f"{name} line {node.lineno} calls something at import"
