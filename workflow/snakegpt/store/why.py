"""Why a result would run again, or why it would not; before anything is spent, or after.

python -m snakegpt.store why train_gpt2
python -m snakegpt.store why results/models/gpt2/weights.safetensors --json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from snakegpt.store import forecast
from snakegpt.store.command import (
    add_settings,
    pipeline_of,
    print_json,
    print_lines,
    requested,
    store_of,
)
from snakegpt.store.explain import Explainer, Verdict

MOST_LINES = 12  # of one action's differences without --all


def add(commands: Any) -> None:
    """The command `why`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "why", help="what would run for a result, and what differs from the action that made it"
    )
    parser.add_argument("target", help="a file below results/, a target such as train_gpt2, or all")
    parser.add_argument(
        "--all",
        action="store_true",
        help="every difference of every stage, up-to-date ones included",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; with --all of every stage")
    add_settings(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    pipeline = pipeline_of(args)
    explainer = Explainer(store_of(pipeline), pipeline, args.configfile)
    verdict = explainer.of(requested(pipeline, args.target))
    if args.json:
        print_json(as_json(explainer, verdict, everything=args.all))
    else:
        print_lines(lines(explainer, verdict, everything=args.all))


def lines(explainer: Explainer, verdict: Verdict, *, everything: bool = False) -> list[str]:
    """The explanation for a terminal: the first action that differs in full, all that follows in a table."""
    chain = list(verdict.chain())
    stale = [v for v in chain if v.status != "up to date"]
    if not stale:
        told = [*_head(verdict), *history(verdict)]
        told += [line for v in chain[:-1] if v.adopted for line in [*_head(v), *_adoption(v)]]
        return [*told, *(_rest(explainer, chain) if everything else [])]
    told = []
    # What differs by itself; the rest follows from it.
    for first in [v for v in stale if everything or v.differences or v.notes] or stale:
        reasons = first.reasons()
        shown = reasons if everything else reasons[:MOST_LINES]
        told += [*_head(first), *(f"  {line}" for line in shown)]
        if len(shown) < len(reasons):
            told.append(f"  and {len(reasons) - len(shown):,} more (--all shows them)")
        told += history(first)
        if not everything:
            break
    if len(stale) > 1 or everything:
        told += ["", *_rest(explainer, chain if everything else stale)]
    fresh = len(chain) - len(stale)
    if fresh and not everything:
        told.append(f"{fresh:,} more {'is' if fresh == 1 else 'are'} up to date.")
    return told


def _rest(explainer: Explainer, chain: list[Verdict]) -> list[str]:
    return forecast.table(forecast.rows(explainer, chain))


def _head(verdict: Verdict) -> list[str]:
    said = {
        "up to date": "is up to date",
        "look-up": "is looked up: the store has what its settings ask for",
        "may run": "may run: it is looked up if its inputs come out the same",
        "runs": "runs",
    }[verdict.status]
    key = f"  ({verdict.key[:12]})" if verdict.key else ""
    return [f"{verdict.label}: {said}{key}"]


def history(verdict: Verdict) -> list[str]:
    """When the present result was made, and by whom it was adopted."""
    if verdict.record is None:
        return []
    made = verdict.record["provenance"]
    text = f"  the present result: {when(made['finished'])} by {made.get('user', 'unknown')}"
    key = verdict.record["key"]
    return [text + (f"  ({key[:12]})" if key != verdict.key else ""), *_adoption(verdict)]


def _adoption(verdict: Verdict) -> list[str]:
    adopted = verdict.adopted
    return [f"  {adoption_line(adopted)}"] if adopted else []


def adoption_line(adopted: Mapping[str, str]) -> str:
    """Who declared a result valid under a new key, when and why."""
    return (
        f"adopted {when(adopted['finished'])} by {adopted['user']}"
        f" from {adopted['from'][:12]}: {adopted['reason']}"
    )


def when(finished: str) -> str:
    """An ISO 8601 time (UTC) as people read it."""
    return f"{finished[:16].replace('T', ' ')} UTC"


def as_json(explainer: Explainer, verdict: Verdict, *, everything: bool = False) -> dict[str, Any]:
    """For programs: the action, those above it that are not up to date (or all), and the costs."""
    chain = list(verdict.chain())
    shown = [v for v in chain if everything or v.status != "up to date"]
    return {
        "target": _verdict_json(verdict),
        "actions": [_verdict_json(v) for v in shown],
        "costs": [row.as_json() for row in forecast.rows(explainer, shown)],
    }


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    record = verdict.record
    return {
        "stage": verdict.request.stage,
        "name": verdict.request.name,
        "status": verdict.status,
        "key": verdict.key,
        "present": {"key": record["key"], **record["provenance"]} if record else None,
        "adopted": verdict.adopted,
        "differences": [difference.as_json() for difference in verdict.differences],
        "notes": verdict.notes,
        "awaited": verdict.awaited,
    }
