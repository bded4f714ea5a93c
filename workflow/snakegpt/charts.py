"""Charts as inline SVG: same data, same bytes; colours come from the page, so they follow its theme.

matplotlib draws with a few stand-in colours, which are then replaced by the page's CSS variables; text
stays text, in the page's font. A page needs --ink, --muted, --grid, --series-1 and --series-2.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from snakegpt.progress import quantity

Points = Sequence[tuple[float, float]]

# Stand-in -> what the page sees. No other colour may be used.
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--grid)",
    "#040404": "var(--series-1)",
    "#050505": "var(--series-2)",
}
INK, MUTED, GRID, FIRST, SECOND = COLOURS

# Inches; the page scales a chart to its column, so width sets how large text is within it.
WIDE = (7.2, 3.2)
NARROW = (3.9, 2.5)
STEPS = [1, 2, 2.5, 5, 10]  # round ticks
MAX_POINTS = 400  # more than a screen shows


def thinned(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most so many points: means of runs of neighbours, which is also what smooths a noisy curve."""
    if len(points) <= most:
        return list(points)
    edges = [round(index * len(points) / most) for index in range(most + 1)]
    groups = [points[a:b] for a, b in pairwise(edges)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Mean over a window around each point, a thirtieth of the curve wide and narrower at its ends."""
    reach = len(points) // 60
    ys = [y for _, y in points]
    result = []
    for index, (x, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)
        window = ys[index - near : index + near + 1]
        result.append((x, sum(window) / len(window)))
    return result


# ---- the charts --------------------------------------------------------------------------------


def loss_chart(
    train: Points, validation: Points, uniform: float | None = None, best_step: int | None = None
) -> str:
    """Training loss, faint and smoothed, and validation losses, over steps; nats.

    uniform    loss of a guess among all tokens alike, where training starts
    best_step  the validation point to mark
    """
    with _figure("loss", "Training and validation loss, nats per token, by step") as (axes, svg):
        noisy = thinned(train)
        axes.plot(*_columns(noisy), color=FIRST, alpha=0.3, linewidth=0.9)
        axes.plot(
            *_columns(smoothed(noisy)), color=FIRST, linewidth=1.8, label="training, smoothed"
        )
        if validation:
            axes.plot(
                *_columns(validation), color=SECOND, linewidth=1.4, marker="o", markersize=4.5,
                label="validation",
            )  # fmt: skip
            best = next((p for p in validation if p[0] == best_step), None)
            if best:
                axes.plot(
                    *best, color=SECOND, marker="o", markersize=10, fillstyle="none",
                    markeredgewidth=1.4, linestyle="none", label=f"lowest, {best[1]:.3f}",
                )  # fmt: skip
        if uniform is not None:
            axes.axhline(uniform, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
            axes.annotate(
                f"uniform guess, {uniform:.2f}", (1, uniform), (-2, -4), color=MUTED,
                xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", va="top", fontsize=9,
            )  # fmt: skip
        axes.legend(loc="upper right" if uniform is None else "center right")
        _label(axes, "step", "loss, nats a token")
    return svg.text


def learning_rate_chart(points: Points) -> str:
    """Learning rate over steps."""
    with _figure("learning-rate", "Learning rate by step", NARROW) as (axes, svg):
        axes.plot(*_columns(thinned(points)), color=FIRST, linewidth=1.8)
        axes.set_ylim(bottom=0)
        _label(axes, "step", "learning rate")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return svg.text


def gradient_chart(points: Points, clip: float | None) -> str:
    """Norm of the gradient before clipping over steps."""
    with _figure("gradient-norm", "Gradient norm before clipping, by step", NARROW) as (axes, svg):
        noisy = thinned(points)
        axes.plot(*_columns(noisy), color=FIRST, alpha=0.3, linewidth=0.9)
        axes.plot(*_columns(smoothed(noisy)), color=FIRST, linewidth=1.8)
        if clip is not None:
            axes.axhline(clip, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
            axes.annotate(
                f"clipped to {clip:g}", (1, clip), (-2, 3), color=MUTED, ha="right", fontsize=9,
                xycoords=("axes fraction", "data"), textcoords="offset points",
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        _label(axes, "step", "gradient norm")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return svg.text


def throughput_chart(points: Points, planned: float | None) -> str:
    """Tokens a second over training time; points are (seconds, rate)."""
    unit, seconds = ("minutes", 60) if points[-1][0] < 10_800 else ("hours", 3600)
    with _figure("throughput", "Throughput, tokens per second, over training time") as (axes, svg):
        noisy = [(time_s / seconds, rate) for time_s, rate in thinned(points)]
        axes.plot(*_columns(noisy), color=FIRST, alpha=0.3, linewidth=0.9)
        axes.plot(*_columns(smoothed(noisy)), color=FIRST, linewidth=1.8)
        if planned:
            axes.axhline(planned, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
            # Above the axes: a good plan's line is where the curve is.
            axes.annotate(
                f"dotted: planned, {quantity(planned)}", (1, 1), (-2, 3), color=MUTED, ha="right",
                xycoords="axes fraction", textcoords="offset points", fontsize=9,
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        _label(axes, f"training time, {unit}", "tokens/s")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return svg.text


def share_chart(points: Points, of: str) -> str:
    """Share of a peak that training reached, over steps; `of` says which peak."""
    with _figure("mfu", f"Share of {of}, by step", (WIDE[0], 2.2)) as (axes, svg):
        noisy = [(step, 100 * share) for step, share in thinned(points)]
        axes.plot(*_columns(noisy), color=FIRST, alpha=0.3, linewidth=0.9)
        axes.plot(*_columns(smoothed(noisy)), color=FIRST, linewidth=1.8)
        axes.set_ylim(bottom=0)
        _label(axes, "step", "%")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return svg.text


def bandwidth_chart(points: Points) -> str:
    """Bus bandwidth of an all-reduce over the size of the message, both axes logarithmic."""
    with _figure("bandwidth", "All-reduce bus bandwidth by message size") as (axes, svg):
        axes.plot(*_columns(points), color=FIRST, linewidth=1.8, marker="o", markersize=4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _label(axes, "message, bytes", "bus bandwidth, GB/s")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
    return svg.text


def shares_chart(bars: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Steps of several runs, each a bar cut into what took its time; bars are (number of ranks, part -> share).

    Parts: computing, exchanging, and what is waited for: batches and the slowest rank.
    """
    looks = {
        "computing": (FIRST, 1.0),
        "exchanging gradients": (SECOND, 1.0),
        "waiting for batches": (SECOND, 0.5),
        "waiting for the slowest rank": (MUTED, 0.5),
    }
    size = (WIDE[0], 1.3 + 0.42 * len(bars))
    with _figure("shares", "Shares of a step by number of ranks", size) as (axes, svg):
        at = [0.0] * len(bars)
        for name, (colour, alpha) in looks.items():
            widths = [100 * shares.get(name, 0.0) for _, shares in bars]
            axes.barh(range(len(bars)), widths, 0.62, at, color=colour, alpha=alpha, label=name)
            at = [left + width for left, width in zip(at, widths, strict=True)]
        axes.grid(visible=False, axis="y")
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, borderpad=0, handlelength=1
        )
        _label(axes, "share of a step, %", "ranks")
        axes.set_xlim(0, 100)
        axes.set_yticks(range(len(bars)), [ranks for ranks, _ in bars])
        axes.invert_yaxis()
    return svg.text


def efficiency_chart(ranks: Sequence[int], weak: Sequence[float], strong: Sequence[float]) -> str:
    """Weak and strong efficiency by number of ranks, and the line of perfect scaling."""
    with _figure("efficiency", "Weak and strong efficiency by number of ranks") as (axes, svg):
        places = range(len(ranks))
        axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        for values, colour, label in ((weak, FIRST, "weak"), (strong, SECOND, "strong")):
            axes.plot(places, values, color=colour, linewidth=1.8, marker="o", label=label)
        axes.legend(loc="lower left")
        _label(axes, "ranks", "efficiency")
        axes.set_ylim(0, 1.08 * max(1, *weak, *strong))
        axes.set_xticks(places, [f"{n:,}" for n in ranks])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return svg.text


def sparkline(points: Points, description: str) -> str:
    """A curve of a few words' size without axes, for a table cell."""
    if len(points) < 2:
        return ""
    xs, ys = _columns(points)
    width, height, edge = 120.0, 28.0, 2.0
    span_x, span_y = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    path = " ".join(
        f"{edge + (x - min(xs)) / span_x * (width - 2 * edge):.1f},"
        f"{edge + (max(ys) - y) / span_y * (height - 2 * edge):.1f}"
        for x, y in points
    )
    return (
        f'<svg class="sparkline" viewBox="0 0 {width:g} {height:g}" role="img"'
        f' aria-label="{escape(description)}"><polyline points="{path}"/></svg>'
    )


def parts_bar(parts: Sequence[tuple[str, float]]) -> str:
    """One bar cut into parts, each as wide as its share of the whole; the page colours them by their class."""
    whole = sum(amount for _, amount in parts) or 1.0
    told = ", ".join(f"{name} {amount / whole:.0%}" for name, amount in parts)
    drawn, at = [], 0.0
    for name, amount in parts:
        width = 100 * amount / whole
        drawn.append(
            f'<rect class="part {name}" x="{at:.2f}" width="{max(width - 0.3, 0):.2f}" height="8"/>'
        )
        at += width
    return (
        '<svg class="parts" viewBox="0 0 100 8" preserveAspectRatio="none" role="img"'
        f' aria-label="A step by part: {escape(told)}">{"".join(drawn)}</svg>'
    )


# ---- drawing -----------------------------------------------------------------------------------


class _Svg:
    """Where `_figure` leaves what was drawn."""

    text = ""


@contextmanager
def _figure(
    name: str, description: str, size: tuple[float, float] = WIDE
) -> Iterator[tuple[Axes, _Svg]]:
    """Axes to draw on; at the end of the block they stand in `.text` as one <svg> element."""
    result = _Svg()
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # ids are hashes; without a salt they are random
        "font.family": "sans-serif",
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "text.color": INK,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        yield axes, result
        drawn = io.BytesIO()
        canvas.print_svg(
            drawn, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    kind = "chart narrow" if size == NARROW else "chart"
    result.text = _embedded(drawn.getvalue().decode("utf-8"), name, description, kind)


def _embedded(svg: str, name: str, description: str, kind: str) -> str:
    """A stand-alone SVG file as an element of a page: themed, scalable, named, ids unique to it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # hits the page
    for stand_in, variable in COLOURS.items():
        svg = svg.replace(stand_in, variable)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)  # the page's own
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view, "matplotlib writes a viewBox"
    opening = (
        f'<svg class="{kind}" {view.group()} role="img" aria-label="{escape(description)}"'
        ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    svg = re.sub(r"^<svg[^>]*>", opening, svg)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(which="both", length=0)
    figure = axes.figure
    wide = isinstance(figure, Figure) and figure.get_figwidth() > NARROW[0]
    if axes.get_xscale() == "linear":
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(7 if wide else 4, steps=STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
        axes.yaxis.set_major_locator(MaxNLocator(6 if wide else 4, steps=STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
