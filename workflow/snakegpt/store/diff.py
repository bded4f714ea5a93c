"""Two experiments, or two actions: in what they differ, and what came of it.

python -m snakegpt.store diff gpt2 shakespeare_char
python -m snakegpt.store diff results/models/gpt2/weights.safetensors 3f6a91c0
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snakegpt.errors import UserError, nearest
from snakegpt.pipeline import Pipeline, Request
from snakegpt.progress import columns, duration, quantity
from snakegpt.store import differences
from snakegpt.store.command import new_command, pipeline_of, print_json, print_lines, store_of
from snakegpt.store.differences import Difference
from snakegpt.store.estimate import last_line, run_time_s, size_bytes
from snakegpt.store.links import maker
from snakegpt.store.objects import Store
from snakegpt.store.show import find

# Stages of an experiment that decide what it is; plans, measurements and pages follow from them.
STAGES = (
    "fetch_corpus",
    "build_tokenizer",
    "encode_tokens",
    "index_tokens",
    "adapt_weights",
    "train_model",
    "evaluate_model",
    "sample_text",
)

Figures = dict[str, float]


@dataclass(frozen=True)
class Side:
    """One of the two.

    actions  stage -> its record; of the parts of a corpus the first
    """

    name: str
    actions: Mapping[str, Mapping[str, Any]]


def add(commands: Any) -> None:
    """The command `diff`."""
    parser = new_command(
        commands, "diff", _run, "in what two experiments or two actions differ, with their metrics"
    )
    for side in ("a", "b"):
        parser.add_argument(
            side, help="an experiment, a file below results/, an action's key or how one starts"
        )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> None:
    pipeline = pipeline_of(args)
    store = store_of(pipeline)
    a, b = (_side(store, pipeline, word) for word in (args.a, args.b))
    if (args.a in pipeline.settings.experiments) != (args.b in pipeline.settings.experiments):
        raise UserError("compare two experiments, or two actions; not one with the other.")
    if args.json:
        print_json(as_json(store, a, b))
    else:
        print_lines(lines(store, a, b))


# ---- finding -----------------------------------------------------------------------------------


def _side(store: Store, pipeline: Pipeline, word: str) -> Side:
    if word in pipeline.settings.experiments:
        return _experiment(pipeline, word)
    try:
        found = find(store, word)
    except UserError as error:
        known = nearest(word, pipeline.settings.experiments)
        raise UserError(f"{error}\n  or an experiment.{known}") from None
    if found.record is None:
        raise UserError(f"no record says what made {found.what}.")
    record = found.record
    return Side(f"{record['stage']} {record['name']} {record['key'][:12]}", {"": record})


def _experiment(pipeline: Pipeline, name: str) -> Side:
    """The actions that made an experiment's present results, whatever the settings ask for by now."""
    found = {}
    starts = pipeline.settings.experiment(name).training.start_from is not None
    for stage in STAGES:
        if stage == "adapt_weights" and not starts:
            continue
        record = maker(Path(_request(pipeline, stage, name).outputs[0]))
        if record:
            found[stage] = record
    if not found:
        raise UserError(
            f"experiment {name} has no results yet.\n  make them: snakemake --cores all report_{name}"
        )
    return Side(name, found)


def _request(pipeline: Pipeline, stage: str, experiment: str) -> Request:
    chosen = pipeline.settings.experiment(experiment)
    tokens = {"corpus": chosen.corpus, "tokenizer": chosen.tokenizer}
    first = next(iter(pipeline.settings.shares(chosen.corpus)))  # of a mixture
    part = min(pipeline.parts(first))
    wildcards = {
        "fetch_corpus": {"corpus": first},
        "build_tokenizer": {"tokenizer": chosen.tokenizer},
        "encode_tokens": {**tokens, "corpus": first, "part": part},
        "index_tokens": tokens,
    }
    return pipeline.request(stage, wildcards.get(stage, {"experiment": experiment}))


# ---- what came of it ---------------------------------------------------------------------------


def metrics(store: Store, side: Side) -> Figures:
    """The key figures that a side's actions left: name with unit -> value; of the best weights."""
    found: Figures = {}
    for stage, record in side.actions.items():
        evaluation = _json(store, record, "evaluation.json")
        for name in ("loss_nats", "perplexity", "bits_per_byte"):
            if name in evaluation.get("best", {}):
                found[name] = evaluation["best"][name]
        output = record["outputs"].get("metrics.jsonl")
        if output:
            path = store.object_path(output["sha256"])
            end = last_line(path)
            for name in (
                "step",
                "best_step",
                "best_loss",
                "rate_tokens_per_s",
                "peak_memory_bytes",
            ):
                if end.get(name) is not None:
                    found[{"step": "steps"}.get(name, name)] = end[name]
            n_parameters = _first_line(path).get("n_parameters")
            if n_parameters:
                found["n_parameters"] = n_parameters
        if stage in ("", "train_model"):
            found["wall_time_s" if not stage else "train_time_s"] = run_time_s(store, record)
        if not stage:
            found["bytes"] = sum(map(size_bytes, record["outputs"].values()))
    return found


def _json(store: Store, record: Mapping[str, Any], name: str) -> dict[str, Any]:
    output = record["outputs"].get(name)
    try:
        text = store.object_path(output["sha256"]).read_text(encoding="utf-8") if output else "{}"
        value = json.loads(text)
    except (OSError, ValueError):  # gone or damaged: there is no figure to show
        return {}
    return value if isinstance(value, dict) else {}


def _first_line(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            value = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- telling -----------------------------------------------------------------------------------


def compare(a: Side, b: Side) -> dict[str, list[Difference]]:
    """Stage -> differences; stages that only one side ran are left out."""
    found = {}
    for stage in a.actions.keys() & b.actions.keys():
        old, new = a.actions[stage], b.actions[stage]
        if old["key"] == new["key"]:
            continue
        if old["stage"] != new["stage"]:
            raise UserError(
                f"{a.name} and {b.name} are runs of different stages: they share no settings."
            )
        found[stage] = differences.actions(old, new)
    return {stage: found[stage] for stage in ("", *STAGES) if stage in found}


def as_json(store: Store, a: Side, b: Side) -> dict[str, Any]:
    """For programs."""
    figures = [metrics(store, side) for side in (a, b)]
    told = [difference for group in compare(a, b).values() for difference in group]
    stages = [stage for stage, group in compare(a, b).items() for _ in group]
    return {
        "a": {"name": a.name, "actions": {s: r["key"] for s, r in a.actions.items()}},
        "b": {"name": b.name, "actions": {s: r["key"] for s, r in b.actions.items()}},
        "metrics": {
            name: [side.get(name) for side in figures]
            for name in dict.fromkeys([*figures[0], *figures[1]])
        },
        "differences": [
            {**({"stage": stage} if stage else {}), **difference.as_json()}
            for stage, difference in zip(stages, told, strict=True)
        ],
    }


def lines(store: Store, a: Side, b: Side) -> list[str]:
    """Metrics side by side, then every difference, once where several stages share it."""
    told = _table(a, b, metrics(store, a), metrics(store, b))
    seen: dict[str, str] = {}
    found = compare(a, b)
    for stage, group in found.items():
        fresh = [line for d in group if seen.setdefault(line := d.line(), stage) == stage]
        told += ["", stage or "Differences", *(f"  {line}" for line in fresh)]
        if not fresh:
            told.append("  nothing of its own" if group else "  nothing")
    if not found:
        told += ["", "Nothing differs: the same actions."]
    for side, other in ((a, b), (b, a)):
        missing = [stage for stage in other.actions if stage not in side.actions]
        if missing:
            told += ["", f"Not made for {side.name}: {', '.join(missing)}"]
    return told


def _table(a: Side, b: Side, left: Figures, right: Figures) -> list[str]:
    rows = [("", a.name, b.name, "change")]
    for name in dict.fromkeys([*left, *right]):
        old, new = left.get(name), right.get(name)
        change = f"{new / old - 1:+.1%}" if old and new is not None else ""
        rows.append((name, _figure(name, old), _figure(name, new), change))
    return columns(rows, "<>>>")


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.endswith("time_s"):
        return duration(value)
    if name.endswith("bytes"):
        return quantity(value, "B")
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"
