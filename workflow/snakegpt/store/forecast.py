"""What would run, why, and what it may cost, as a short table: the end of a dry run and of `why`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from snakegpt.pipeline import OUTPUTS
from snakegpt.progress import duration, quantity
from snakegpt.store.estimate import Cost, cost
from snakegpt.store.explain import Explainer, Status, Verdict, ordered

WIDEST_REASON = 100  # characters


@dataclass(frozen=True)
class Row:
    """Actions of one stage that fare alike, such as the parts of a corpus."""

    title: str
    status: Status
    reason: str
    costs: Sequence[Cost]

    def total(self, figure: str) -> float | None:
        """Sum of time_s or n_bytes over the actions; None if one of them is not known."""
        return _sum(getattr(cost, figure) for cost in self.costs)

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "actions": len(self.costs),
            "status": self.status,
            "reason": self.reason,
            "time_s": self.total("time_s"),
            "bytes": self.total("n_bytes"),
            "estimate": next((cost.source for cost in self.costs if cost.source), None),
        }


def of_jobs(explainer: Explainer, jobs: Iterable[tuple[str, Mapping[str, str]]]) -> list[str]:
    """The table for the jobs, (stage, wildcards), that Snakemake would start; of other rules it says nothing."""
    asked = [explainer.pipeline.request(*job) for job in jobs if job[0] in OUTPUTS]
    started = {(request.stage, request.name) for request in asked}
    verdicts = [
        # What Snakemake starts all the same, since an input is younger, finds its result.
        replace(verdict, status="look-up") if verdict.status == "up to date" else verdict
        for verdict in ordered(map(explainer.of, asked))
        if (verdict.request.stage, verdict.request.name) in started
    ]
    return table(rows(explainer, verdicts))


def rows(explainer: Explainer, verdicts: Iterable[Verdict]) -> list[Row]:
    """One row for actions that differ in no more than the part of a corpus they are for."""
    groups: dict[tuple[str, str, Status, str], list[Verdict]] = {}
    for verdict in verdicts:
        name, _, _part = verdict.request.name.partition("/")
        first = verdict.differences[0] if verdict.differences else None
        # Digests and file names tell parts apart that fare alike.
        kind = f"{first.kind} {first.name.partition('[')[0]}" if first else verdict.reason()
        groups.setdefault((verdict.request.stage, name, verdict.status, kind), []).append(verdict)
    found = []
    for (stage, name, status, kind), alike in groups.items():
        reasons = {verdict.reason() for verdict in alike}
        title = alike[0].label if len(alike) == 1 else f"{stage} {name} ({len(alike):,} parts)"
        reason = reasons.pop() if len(reasons) == 1 else f"{kind} differs"
        found.append(Row(title, status, reason, [cost(explainer, verdict) for verdict in alike]))
    return found


def table(found: Sequence[Row]) -> list[str]:
    """Lines for a terminal, the reason last so that nothing is lost where lines are cut; none without rows."""
    if not found:
        return []
    cells = [("stage", "what", "time", "bytes", "why")]
    for row in found:
        looked_up = row.status in ("look-up", "up to date")
        time_s, n_bytes = row.total("time_s"), row.total("n_bytes")
        figures = ("-", "-") if looked_up else (_time(time_s), _bytes(n_bytes))
        cells.append((row.title, row.status, *figures, _short(row.reason)))
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = [
        f"{title:<{widths[0]}}  {what:<{widths[1]}}  {time:>{widths[2]}}  {n:>{widths[3]}}  {why}"
        for title, what, time, n, why in cells
    ]
    return [*lines, "", *summary(found)]


def summary(found: Sequence[Row]) -> list[str]:
    """How much of each kind there is, and what the figures follow from."""
    parts = []
    for status, noun in (("runs", "to run"), ("may run", "that may run"), ("look-up", "looked up")):
        alike = [row for row in found if row.status == status]
        if not alike:
            continue
        costs = [cost for row in alike for cost in row.costs]
        text = f"{len(costs):,} {noun}"
        if status != "look-up":
            unknown = sum(cost.time_s is None for cost in costs)
            known = [cost for cost in costs if cost.time_s is not None]
            if known:
                time_s, n_bytes = (
                    _sum(getattr(c, f) for c in known) for f in ("time_s", "n_bytes")
                )
                text += f" (about {_time(time_s)}, {_bytes(n_bytes)}"
                text += f"; {unknown:,} unknown)" if unknown else ")"
            else:
                text += " (cost unknown)"
        parts.append(text)
    sources = {cost.source for row in found for cost in row.costs}
    told = []
    if "last run" in sources:
        told.append("the last run of each stage, scaled by its work")
    if "plan" in sources:
        told.append("the plan for training")
    return [", ".join(parts) + ".", *([f"Costs follow from {' and '.join(told)}."] if told else [])]


def _sum(values: Iterable[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(max(1.0, seconds))


def _bytes(n_bytes: float | None) -> str:
    return "unknown" if n_bytes is None else quantity(n_bytes, "B")


def _short(text: str) -> str:
    return text if len(text) <= WIDEST_REASON else f"{text[: WIDEST_REASON - 3]}..."
