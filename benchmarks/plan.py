"""What plans say against what then happens: memory and time of three small models on this machine.

python benchmarks/plan.py                    a few minutes on a quiet machine
python benchmarks/plan.py --device cuda      on a GPU, where models and steps may grow too

Plan and training are run in turn, each by its own command in processes of their own. Memory is arithmetic
against the peak of the training process; time is a calibration of 20 steps against that of all updates.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, finish, medians, parser
from trainers import write_token_set

MODELS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name -> ids, model, training
    "characters, 0.8M": (
        65,
        {"layers": 4, "heads": 4, "channels": 128, "context": 64, "vocabulary_multiple": 1},
        {"batch_tokens": 768, "steps": 150},
    ),
    "large vocabulary, 7.3M, Muon": (
        50_257,
        {"layers": 4, "heads": 4, "channels": 128, "context": 128},
        {"batch_tokens": 1024, "steps": 40, "optimizer": "muon"},
    ),
    "modern, 14M, accumulated": (
        4096,
        {"architecture": "modern", "layers": 8, "heads": 6, "channels": 384, "context": 256},
        {"batch_tokens": 4096, "steps": 20},
    ),
}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--threads", type=int, default=1, help="a rank's; there is one rank")
    args = made.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for index, (what, (n_vocab, model, training)) in enumerate(MODELS.items()):
            folder = Path(name) / str(index)
            folder.mkdir()
            rows += compare(what, n_vocab, model, training, folder, args)
    finish(rows, as_json=args.json)


def compare(
    what: str,
    n_vocab: int,
    model: dict[str, Any],
    training: dict[str, Any],
    folder: Path,
    args: Any,
) -> list[Row]:
    """A model's plan and its training in turn, and the two rows of the table."""
    manifest, tokenizer = made_up_tokens(folder, n_vocab)
    recipe = {"warmup_steps": 10, "validation_interval": 10**6, "validation_tokens": 1000}
    settings = {"model": model, "training": {**recipe, **training}}
    how: dict[str, Any] = {"device": args.device, "ranks": 1, "threads": args.threads}
    if "accumulated" in what:
        how["rows_per_rank"] = 4
    measured: dict[str, list[float]] = {}
    for round_ in range(args.rounds):
        out = folder / f"round{round_}"
        call("plan_training", settings, how, out / "plan", tokenizer=tokenizer)
        call("train_model", settings, how, out / "train", tokens=manifest)
        plan = json.loads((out / "plan" / "plan.json").read_text("utf-8"))
        end = json.loads((out / "train" / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
        for name, value in (
            ("planned_mb", plan["memory_bytes"]["total"] / 1e6),
            ("mb", end["peak_memory_bytes"] / 1e6),
            ("planned_s", plan["time_estimate_s"]),
            ("s", end["elapsed_s"]),
        ):
            measured.setdefault(name, []).append(value)
    found = medians(measured)
    memory, time = found["mb"] / found["planned_mb"], found["s"] / found["planned_s"]
    return [
        Row(
            f"{what}: memory",
            "MB",
            {"planned": found["planned_mb"], "actual": found["mb"]},
            memory,
            "0.85 to 1.15",
            0.85 <= memory <= 1.15,
        ),
        Row(
            f"{what}: time of updates",
            "s",
            {"planned": found["planned_s"], "actual": found["s"]},
            time,
            "0.75 to 1.25",
            0.75 <= time <= 1.25,
        ),
    ]


def call(
    stage: str, settings: dict[str, Any], how: dict[str, Any], out: Path, **inputs: Path
) -> None:
    """Run a stage by its command line."""
    words = [sys.executable, "-m", f"snakegpt.stages.{stage}", "--out", str(out)]
    words += ["--settings", json.dumps(settings), "--execution", json.dumps(how)]
    for role, path in inputs.items():
        words += [f"--{role}", str(path)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{stage} failed:\n{done.stderr}")


def made_up_tokens(folder: Path, n_vocab: int) -> tuple[Path, Path]:
    """A manifest with two shards of random ids, and what a plan reads of a tokenizer."""
    draws = np.random.default_rng(0)
    ids = {
        split: draws.integers(0, n_vocab, count, dtype=np.uint16)
        for split, count in (("train", 2_000_000), ("val", 20_000))
    }
    manifest = write_token_set(folder, ids, n_vocab=n_vocab)
    tokenizer = folder / "tokenizer.json"
    known = json.loads(manifest.read_text("utf-8"))["tokenizer"]
    tokenizer.write_text(json.dumps(known), encoding="utf-8")
    return manifest, tokenizer


if __name__ == "__main__":
    main()
