"""What bench_network and measure_scaling found: a section of the report, and a page of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from snakegpt import charts
from snakegpt.pages.rendering import readable_bytes, readable_time, render
from snakegpt.progress import quantity


def network_page(
    experiment: str, network: Mapping[str, Any] | None, scaling: Mapping[str, Any] | None
) -> str:
    """The page about one or both of network.json and scaling.json."""
    return render(
        "network.html.j2",
        experiment=experiment,
        network=network and network_section(network),
        scaling=scaling and scaling_section(scaling),
    )


# ---- network.json ----------------------------------------------------------------------------


def network_section(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the section says."""
    text = (
        f"{found['ranks']} processes sum their gradients by {found['backend']} before every update,"
        f" {readable_bytes(found['gradient_bytes'])} a step."
    )
    tcp = found.get("iperf3")
    if tcp:
        text += f" A plain TCP stream over the same interface carries {tcp['gb_per_s']:.3g} GB/s (iperf3)."
    reasons = [
        f"{what} was not measured: {why}." for what, why in (found.get("reason") or {}).items()
    ]
    hosts = [node["host"] for node in found.get("nodes") or ()]
    return {
        "rows": found["all_reduce"],
        "chart": Markup(bandwidth_chart(found)),
        "text": text,
        "links": [_link(link, hosts) for link in found.get("links") or ()],
        "nodes": [node for node in found.get("nodes") or () if node.get("speed")],
        "warnings": found.get("warnings") or [],
        "advice": [*found["advice"], *reasons],
    }


def bandwidth_chart(found: Mapping[str, Any]) -> str:
    """The plot of network.json; empty where one process has nothing to sum."""
    points = [(row["bytes"], row["busbw_gb_per_s"]) for row in found["all_reduce"]]
    return charts.bandwidth_chart(points) if points else ""


def _link(link: Mapping[str, Any], hosts: list[str]) -> dict[str, Any]:
    """A row of the table of links; None where a figure is missing."""
    rates = {
        name: (link.get(key) or {}).get("bits_per_second")
        for name, key in (("up", "up"), ("down", "down"), ("several", "up_4_streams"))
    }
    trips = link.get("latency_s") or {}
    ends = {"from": hosts[link["from"]], "to": hosts[link["to"]]}
    return {
        **ends,
        **rates,
        "p50": trips.get("p50"),
        "p99": trips.get("p99"),
        "mtu": link.get("mtu"),
    }


# ---- scaling.json ----------------------------------------------------------------------------


def scaling_section(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the section says."""
    strong, verdict = found["strong"], found["verdict"]
    widest, last = strong[-1], found["efficiencies"][-1]
    several = len(strong) > 1
    headline = [
        ("Ranks", f"{widest['ranks']:,}", f"on {found['nodes']:,} {_plural('node', found['nodes'])}"),
        ("A step", readable_time(widest["step_s"]), f"mean of {widest['steps']}, of the slowest rank"),
        ("Tokens", quantity(verdict["rate_tokens_per_s"]), "a second, all ranks together"),
        ("All steps", readable_time(verdict["predicted_s"]), "without validation and saving"),
        ("Weak efficiency", f"{last['weak']:.2f}" if several else "–", "as much work a rank"),
        ("Strong efficiency", f"{last['strong']:.2f}" if several else "–", "the same work, shared out"),
    ]  # fmt: skip
    return {
        "verdict": verdict["text"][0].upper() + verdict["text"][1:],
        "headline": [dict(zip(("name", "value", "unit"), row, strict=True)) for row in headline],
        "shares": Markup(shares_chart(found)),
        "efficiency": Markup(efficiency_chart(found)) if several else "",
        "gradient_bytes": found["gradient_bytes"],
        "rows": [
            {**run, **how, "tokens": how_much, "shares": list(_shares(run).values())}
            for run, how, how_much in zip(strong, found["efficiencies"], _rates(found), strict=True)
        ],
    }


def _plural(noun: str, number: int) -> str:
    return noun if number == 1 else f"{noun}s"


def shares_chart(found: Mapping[str, Any]) -> str:
    """The plot of scaling.json."""
    return charts.shares_chart([(f"{run['ranks']:,}", _shares(run)) for run in found["strong"]])


def efficiency_chart(found: Mapping[str, Any]) -> str:
    rows = found["efficiencies"]
    ranks, weak, strong = ([row[key] for row in rows] for key in ("ranks", "weak", "strong"))
    return charts.efficiency_chart(ranks, weak, strong)


def _shares(run: Mapping[str, Any]) -> dict[str, float]:
    """Part -> share of a step, of the mean rank: what the slowest takes longer is waited for."""
    parts = {
        "computing": max(0.0, run["compute_s"] - run["idle_s"] - run["data_s"]),
        "exchanging gradients": run["communication_s"],
        "waiting for batches": run["data_s"],
        "waiting for the slowest rank": run["idle_s"],
    }
    whole = sum(parts.values())
    return {name: seconds / whole for name, seconds in parts.items()}


def _rates(found: Mapping[str, Any]) -> list[float]:
    """Tokens a second of each run, from that of the widest: all take the same rows a step."""
    strong = found["strong"]
    batch_tokens = found["verdict"]["rate_tokens_per_s"] * strong[-1]["step_s"]
    return [batch_tokens / run["step_s"] for run in strong]
