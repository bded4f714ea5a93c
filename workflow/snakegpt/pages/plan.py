"""What was planned, what happened, and what the run would take elsewhere: the plan's section of a report."""

from __future__ import annotations

from typing import Any

from snakegpt.pages.evidence import Evidence
from snakegpt.pages.rendering import readable, readable_bytes, readable_time
from snakegpt.plan_text import COMMON
from snakegpt.progress import quantity


def plan_section(evidence: Evidence) -> dict[str, Any]:
    """What the section says."""
    plan = evidence.plan
    calibration = plan.get("calibration")
    measured = "half a second of matrix products on this machine"
    if calibration:
        measured = f"{calibration['steps']} steps tried on this machine"
    return {
        "verdict": plan.get("verdict", ""),
        "measured": measured,
        "comparison": _comparison(evidence),
        "arithmetic": _arithmetic(evidence),
        "gpus": _gpus(evidence),
        "gpu_efficiency": plan.get("assumptions", {}).get("gpu_efficiency"),
    }


def _gpus(evidence: Evidence) -> list[dict[str, str]]:
    rows = []
    for row in evidence.plan.get("gpus", ()):
        if not row["fits"] or (row["gpu"] not in COMMON and row["cost"] is None):
            continue
        twice = ", activations twice" if row["activation_checkpointing"] else ""
        rows.append(
            {
                "name": f"{row['gpus']} × {row['gpu']}",
                "strategy": row["strategy"] + twice,
                "rows": f"{row['rows_per_rank']:,}",
                "memory": readable_bytes(row["memory_bytes"]),
                "time": readable_time(row["time_s"]),
                "cost": "" if row["cost"] is None else f"{row['cost']:,.2f}",
            }
        )
    return rows


def _comparison(evidence: Evidence) -> list[dict[str, str]]:
    plan, end, launch = evidence.plan, evidence.end, evidence.launch
    splits = evidence.tokens["splits"]
    train_tokens = splits["train"]["n_tokens"]
    corpus_tokens = sum(split["n_tokens"] for split in splits.values())

    def row(name: str, planned: float | None, actual: float | None, write: Any) -> dict[str, str]:
        known = planned is not None and actual is not None and planned > 0
        return {
            "name": name,
            "planned": "unknown" if planned is None else write(planned),
            "actual": "unknown" if actual is None else write(actual),
            "ratio": f"{actual / planned:.2f}" if known and actual and planned else "",
        }

    rows = [
        row("training time", plan["time_estimate_s"], end["elapsed_s"], readable_time),
        row(
            "tokens per second",
            plan["rate_tokens_per_s_estimate"],
            end["rate_tokens_per_s"],
            quantity,
        ),
        row(
            "memory of a process",
            plan["memory_bytes"]["total"],
            end.get("peak_memory_bytes"),
            readable_bytes,
        ),
        row("tokens of the corpus", plan["corpus_tokens_estimate"], corpus_tokens, quantity),
        row(
            "epochs",
            plan["epochs_estimate"],
            evidence.trained_tokens / train_tokens if train_tokens else None,
            lambda n: f"{n:.3g}" if n < 1000 else f"{n:,.0f}",
        ),
        row("parameters", plan["n_parameters"], launch["n_parameters"], lambda n: f"{n:,}"),
    ]
    shapes = [
        " × ".join(str(of[name]) for name in ("ranks", "rows_per_rank", "accumulation"))
        for of in (plan, launch)
    ]
    name = "processes × rows × accumulated"
    return [*rows, {"name": name, "planned": shapes[0], "actual": shapes[1], "ratio": ""}]


def _arithmetic(evidence: Evidence) -> str:
    plan, end, launch = evidence.plan, evidence.end, evidence.launch
    reached = end["rate_tokens_per_s"] * plan["flops_per_token"]
    text = (
        f"A token costs {readable(plan['flops_per_token'], 'FLOP')} (6N + 12LCT, as nanoGPT and PaLM count),"
        f" so training ran at {readable(reached, 'FLOP/s')}, {reached / plan['matmul_flops_per_s']:.0%} of"
        f" the {readable(plan['matmul_flops_per_s'], 'FLOP/s')} that matrix products alone reached here in"
        f" {plan['precision']}."
    )
    if launch["precision"] != plan["precision"]:
        text += f" Training itself ran in {launch['precision']}."
    wall_s = [a["wall_s"] for a in evidence.provenance or () if a["stage"] == "train_model"]
    if wall_s:
        text += (
            f" With start-up, validation and saving the stage took {readable_time(wall_s[-1])}"
            + ("." if not evidence.events("resume") else " since it was last started.")
        )
    return text
