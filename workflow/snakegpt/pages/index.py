"""The page over all experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from snakegpt.charts import sparkline
from snakegpt.pages.rendering import render


def index_page(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The page over all experiments, best bits per byte first."""
    ranked = sorted(summaries, key=lambda s: (s["bits_per_byte"], s["experiment"]))
    experiments = []
    for found in ranked:
        curve = [(float(x), float(y)) for x, y in found["validation_curve"]]
        what = f"validation loss of {found['experiment']} by step"
        experiments.append({**found, "sparkline": Markup(sparkline(curve, what))})
    return render("index.html.j2", experiments=experiments)
