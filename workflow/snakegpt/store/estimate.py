"""What an action will cost, from what it cost last time; never an invented figure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snakegpt.store.explain import Explainer, Verdict
from snakegpt.store.objects import Store

# Settings that decide how long a stage takes in another way than by its amount of work: the last run
# says nothing once one of them has changed.
DECISIVE = {
    "adapt_weights": ("model",),
    "bench_network": ("model",),
    "evaluate_model": ("evaluation",),
    "measure_scaling": ("model",),
    "train_model": ("model", "training.precision"),
}
TAIL_BYTES = 4096  # of metrics.jsonl, longer than its last line


@dataclass(frozen=True)
class Cost:
    """Time and published bytes; None where nothing is known.

    source   what it follows from: "last run", "plan" or "look-up"
    """

    time_s: float | None = None
    n_bytes: float | None = None
    source: str | None = None


def cost(explainer: Explainer, verdict: Verdict) -> Cost:
    """What an action would cost if it ran; nothing if a look-up is enough."""
    store = explainer.store
    if verdict.settled:
        return Cost(0.0, 0, "look-up")
    record = verdict.record
    if record is not None and not _unlike(verdict):
        ratio = _ratio(verdict.request.stage, record["science"], verdict.request.settings)
        if ratio is not None:
            n_bytes = sum(size_bytes(output) for output in record["outputs"].values())
            grows = verdict.request.stage != "train_model"  # weights have the size of the model
            return Cost(
                ratio * run_time_s(store, record), n_bytes * (ratio if grows else 1), "last run"
            )
    return _planned(explainer, verdict)


def _unlike(verdict: Verdict) -> bool:
    """Whether the last run was another kind of work, also because its model was."""
    names = DECISIVE.get(verdict.request.stage, ())
    changed = [d.name for d in verdict.differences if d.kind == "setting"]
    decided = any(name == d or name.startswith(f"{d}.") for name in changed for d in names)
    return decided or any(
        not source.settled and source.record is not None and _unlike(source)
        for source in verdict.upstream
        if source.request.stage == "train_model"
    )


def _ratio(stage: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> float | None:
    """How much more work an action is than the last one was."""
    before, after = (_work(stage, science) for science in (old, new))
    return None if before is None or after is None or not before else after / before


def _work(stage: str, science: Mapping[str, Any]) -> float | None:
    """What a stage's time grows with; the same for all runs where it hardly grows."""
    if stage == "train_model":
        return float(science["training"]["steps"] * science["training"]["batch_tokens"])
    if stage in ("fetch_corpus", "fetch_weights", "encode_tokens"):
        files = science["files"]
        return float(sum(file["bytes"] for file in files)) if files else None
    if stage == "sample_text":
        asked = science["sampling"]
        return float(len(asked["prompts"]) * asked["samples_per_prompt"] * asked["max_tokens"])
    return 1.0


def size_bytes(output: Mapping[str, Any]) -> int:
    return int(output["folder"]["bytes"] if "folder" in output else output["bytes"])


def run_time_s(store: Store, record: Mapping[str, Any]) -> float:
    """How long an action took. A record has the time since training was last resumed; its metrics, all."""
    wall_s = float(record["provenance"]["wall_s"])
    metrics = record["outputs"].get("metrics.jsonl")
    if metrics is None:
        return wall_s
    end = last_line(store.object_path(metrics["sha256"]))
    return max(wall_s, float(end.get("elapsed_s", 0)))


def last_line(path: Path) -> dict[str, Any]:
    """The last of some JSON lines, without reading what is before it; {} if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            value = json.loads(file.read().rstrip(b"\n").rpartition(b"\n")[2])
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _planned(explainer: Explainer, verdict: Verdict) -> Cost:
    """Training as plan.json foresees it, if there is a plan of these settings on this machine."""
    if verdict.request.stage != "train_model":
        return Cost()
    request = explainer.pipeline.request("plan_training", verdict.request.wildcards)
    plan = explainer.of(request)
    if not plan.settled:
        return Cost()
    try:
        path = explainer.store.object_path(plan.outputs[request.outputs[0]])
        figures = json.loads(path.read_text(encoding="utf-8"))
        time_s = figures["time_estimate_s"] + figures["validation_time_estimate_s"]
        return Cost(time_s, figures["disk_bytes"]["weights"], "plan")
    except (OSError, ValueError, KeyError):
        return Cost()
