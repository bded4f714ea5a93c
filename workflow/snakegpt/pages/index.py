"""The page over all experiments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from snakegpt.charts import sparkline
from snakegpt.pages.rendering import render


def index_page(summaries: Sequence[Mapping[str, Any]], networks: Collection[str] = ()) -> str:
    """The page over all experiments, best bits per byte first.

    networks  experiments that have a page of what draw_network shows
    """
    ranked = sorted(summaries, key=lambda s: (s["bits_per_byte"], s["experiment"]))
    experiments = []
    for found in ranked:
        curve = [(float(x), float(y)) for x, y in found["validation_curve"]]
        what = f"validation loss of {found['experiment']} by step"
        experiments.append(
            {
                **found,
                "sparkline": Markup(sparkline(curve, what)),
                "has_network": found["experiment"] in networks,
            }
        )
    return render("index.html.j2", experiments=experiments)
