"""What every benchmark shares: both sides in turn, medians, ratios beside their bars, one table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One comparison.

    figures  side -> its median, in `unit`
    value    what the bar is held against: a ratio, or a figure of one side
    bar      the bar itself, for people
    met      whether it was met
    """

    what: str
    unit: str
    figures: Mapping[str, float]
    value: float
    bar: str
    met: bool


def in_turn(rounds: int, **sides: Callable[[], float | None]) -> dict[str, list[float]]:
    """Run the sides A B A B ...; each returns its own figure, or None: its wall time counts, in seconds."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            started = time.perf_counter()
            figure = run()
            elapsed = time.perf_counter() - started
            measured[name].append(elapsed if figure is None else figure)
    return measured


def medians(measured: Mapping[str, list[float]]) -> dict[str, float]:
    """Side -> median of its rounds."""
    return {name: statistics.median(values) for name, values in measured.items()}


def machine() -> str:
    """The machine a table was measured on, in a line."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.partition(":")[2].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, with --json and --rounds."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    made.add_argument("--rounds", type=int, default=5, help="times that each side runs")
    return made


def finish(rows: list[Row], *, as_json: bool) -> None:
    """Print the table and end with status 1 if a bar was missed."""
    if as_json:
        print(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print(machine())
        for row in rows:
            figures = ", ".join(
                f"{name} {value:.4g} {row.unit}" for name, value in row.figures.items()
            )
            verdict = "met" if row.met else "MISSED"
            print(f"{row.what:42}  {figures}\n{'':42}  {row.value:.3g} (bar: {row.bar})  {verdict}")
    sys.exit(0 if all(row.met for row in rows) else 1)
