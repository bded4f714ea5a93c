"""How a run learned, how fast, and what came between: the training section of a report."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from snakegpt import charts
from snakegpt.pages.evidence import Evidence
from snakegpt.pages.rendering import readable_bytes
from snakegpt.progress import count

PARTS = {
    "forward": "the network and its loss",
    "backward": "gradients",
    "optimizer": "clipping, moving the weights",
    "communication": "sending to other processes or waiting for them, with nothing else to do",
    "data": "waiting for the next batch",
    "waiting": "the rest: reading results, an idle device",
}
SCHEDULES = {
    "cosine": "cosine decay",
    "linear": "linear decay",
    "warmup_stable_decay": "the peak, then linear decay",
}
INCIDENTS_SHOWN = 20


def training_section(evidence: Evidence) -> dict[str, Any]:
    """What the section says; its curves are `training_charts`."""
    parts = _parts(evidence)
    incidents = _incidents(evidence)
    return {
        "interruptions": _interruptions(evidence),
        "incidents": incidents[:INCIDENTS_SHOWN],
        "n_more": max(0, len(incidents) - INCIDENTS_SHOWN),
        "share_of": _share_of(evidence)[1],
        "parts": parts,
        "parts_bar": Markup(charts.parts_bar([(p["name"], p["seconds"]) for p in parts])),
        "parts_text": _parts_text(evidence),
        "machine": _machine(evidence),
        "schedule": _schedule(evidence.settings["training"]),
    }


def training_charts(evidence: Evidence) -> dict[str, str]:
    """The curves of the section, as SVG."""
    train = evidence.events("train")
    validation = [(v["step"], v["loss"]) for v in evidence.events("validation")]
    field, of = _share_of(evidence)
    shares = [(t["step"], t[field]) for t in train if t.get(field) is not None]
    norms = [(t["step"], t["gradient_norm"]) for t in train if t["gradient_norm"] is not None]
    return {
        "loss": charts.loss_chart(
            [(t["step"], t["loss"]) for t in train],
            validation,
            math.log(evidence.tokenizer["n_vocab"]),
            evidence.end["best_step"],
        ),
        "learning_rate": charts.learning_rate_chart(
            [(t["step"], t["learning_rate"]) for t in train]
        ),
        "gradient_norm": charts.gradient_chart(
            norms, evidence.settings["training"]["gradient_clip"]
        ),
        "throughput": charts.throughput_chart(
            [(t["elapsed_s"], t["rate_tokens_per_s"]) for t in train],
            evidence.plan.get("rate_tokens_per_s_estimate"),
        ),
        "share": charts.share_chart(shares, of) if shares else "",
    }


def _schedule(training: Mapping[str, Any]) -> str:
    """What the curve of the learning rate shows, in words."""
    warmed = training["warmup_steps"] > 0
    parts = ["linear warm-up"] * warmed + [SCHEDULES[training["schedule"]]]
    text = ", then ".join(parts)
    if training["optimizer"] == "muon":
        text += (
            f". It is that of embedding and head; that of the matrices, {training['muon_learning_rate']:g}"
            " at its peak, has the same shape"
        )
    return text


def _share_of(evidence: Evidence) -> tuple[str, str]:
    """Which share of a peak to show: the datasheet's where it is known, else the measured product's."""
    known = any(t.get("mfu") is not None for t in evidence.events("train"))
    if known:
        return "mfu", "the datasheet's peak (MFU)"
    return "matmul_share", "the matrix product measured when training started"


# ---- where the time went ------------------------------------------------------------------------


def _parts(evidence: Evidence) -> list[dict[str, Any]]:
    """The parts of a step in the last profiled window, largest groups together."""
    windows = evidence.events("parts")
    if not windows:
        return []
    seconds = {name: windows[-1].get(f"{name}_s") or 0.0 for name in PARTS}
    whole = sum(seconds.values()) or 1.0
    return [
        {"name": name, "text": text, "seconds": seconds[name], "share": seconds[name] / whole}
        for name, text in PARTS.items()
    ]


def _parts_text(evidence: Evidence) -> str:
    windows = evidence.events("parts")
    if not windows:
        return ""
    last = windows[-1]
    text = f"Mean of {count(last['steps'], 'step')} up to step {last['step']:,}, looked at closely."
    if last.get("communication_s") is None:
        text += " Too many micro-batches for a profile: communication is inside the other parts."
    return text


def _machine(evidence: Evidence) -> str:
    """What the counters of processors and GPUs say, in a sentence or two."""
    readings = evidence.events("counters")
    if not readings:
        return ""
    told = [
        f"The leading process kept {statistics.fmean(r['cpu_cores'] for r in readings):.1f} cores busy"
    ]
    told[0] += f" and held at most {readable_bytes(readings[-1]['peak_memory_bytes'])}."
    gpus = [gpu for r in readings for gpu in r.get("gpus", ())]
    figures = []
    for field, write in (
        ("utilisation", lambda v: f"{v:.0%} busy"),
        ("power_w", lambda v: f"{v:.0f} W"),
        ("clock_mhz", lambda v: f"{v:,.0f} MHz"),
        ("temperature_c", lambda v: f"{v:.0f} °C"),
    ):
        values = [gpu[field] for gpu in gpus if gpu.get(field) is not None]
        if values:
            figures.append(write(statistics.fmean(values)))
    if figures:
        told.append(f"GPUs on average: {', '.join(figures)}.")
    reasons = Counter(reason for gpu in gpus for reason in gpu.get("throttled") or ())
    if reasons:
        worst = ", ".join(
            f"{reason} in {n:,} of {len(gpus):,}" for reason, n in reasons.most_common()
        )
        told.append(f"Clocks were held down ({worst} readings).")
    return " ".join(told)


# ---- what came between --------------------------------------------------------------------------


def _interruptions(evidence: Evidence) -> str:
    resumes = len(evidence.events("resume"))
    skipped = len(evidence.events("skipped"))
    text = "It ran through without an interruption."
    if resumes:
        times = "once" if resumes == 1 else f"{resumes} times"
        text = (
            f"It was interrupted {times} and went on from its saved state. What came after that state"
            " is not shown twice: the curves are those of the weights."
        )
    if skipped:
        text += (
            f" {count(skipped, 'update')} were not taken."
            if skipped > 1
            else (" One update was not taken.")
        )
    return text


def _incidents(evidence: Evidence) -> list[str]:
    """Resumes, skipped updates and returns to an earlier state, in the order they were written."""
    tell = {"resume": _resume, "skipped": _skipped, "rolled_back": _rolled_back}
    return [tell[e["event"]](e) for e in evidence.metrics if e["event"] in tell]


def _resume(event: Mapping[str, Any]) -> str:
    where = f"{event['ranks']} × {event['device']}, " if "ranks" in event else ""
    return f"resumed at step {event['step']:,} ({where}{event.get('precision', '')})".replace(
        ", )", ")"
    )


def _skipped(event: Mapping[str, Any]) -> str:
    facts = [
        f"{name} {value:.4g}"
        for name, value in (("loss", event.get("loss")), ("norm", event.get("gradient_norm")))
        if isinstance(value, int | float)
    ]
    why = event.get("reason") or ", ".join(facts) or "no finite loss"
    return f"the update of step {event['step']:,} was skipped ({why})"


def _rolled_back(event: Mapping[str, Any]) -> str:
    start = f"from step {event['from_step']:,} " if "from_step" in event else ""
    why = f": {event['reason']}" if event.get("reason") else ""
    return f"went back {start}to step {event['step']:,}, and left out the data in between{why}"
