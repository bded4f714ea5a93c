"""Templates to HTML, and how numbers and text are written in it.

A page is one HTML file without scripts and without a reference to anything outside itself. All text from
corpora and models is untrusted and escaped.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from snakegpt.progress import quantity

# HTML cannot hold control characters; Unicode has a picture of each.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def render(template: str, **context: Any) -> str:
    """A page from one of `snakegpt/templates`; what is not marked as HTML is escaped."""
    environment = Environment(
        loader=PackageLoader("snakegpt", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "quantity": quantity,
        "number": lambda value: f"{value:,}",
        "bytes": readable_bytes,
        "fixed": lambda value, decimals: f"{value:.{decimals}f}",
        "figures": figures,
        "time": readable_time,
        "visible": visible,
    }
    return environment.get_template(template).render(context)


def picture(svg: str) -> str:
    """A chart as a file of its own: with the page's colours, and a background."""
    theme = (Path(__file__).parent.parent / "templates" / "theme.css").read_text(encoding="utf-8")
    style = f"{theme}svg {{ background: var(--paper); font-family: var(--sans); }}\n"
    return svg.replace(">", f">\n<style>\n{style}</style>", 1) + "\n"


def readable_time(seconds: float) -> str:
    """A time as people say it, to about three digits: 350 µs, 18.4 ms, 43 s, 5 min 12 s, 2 h 5 min."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (10.0, 1.0, "s")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 2880:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{seconds / 86_400:.3g} days"


def readable(amount: float, unit: str) -> str:
    """An amount with a decimal prefix before its unit: 5,057,198 B -> 5.06 MB."""
    number = quantity(amount)
    return f"{number[:-1]} {number[-1]}{unit}" if number[-1].isalpha() else f"{number} {unit}"


def readable_bytes(n_bytes: float) -> str:
    """5,057,198 -> 5.06 MB."""
    return readable(n_bytes, "B")


def figures(value: float) -> str:
    """About four significant digits, never in scientific notation: 94.63, 1,234, 0.001570."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def visible(text: str) -> str:
    """Text whose control characters are replaced by their pictures."""
    return text.translate(PICTURES)
