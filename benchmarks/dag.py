"""The pipeline of a corpus in 10,000 parts against Snakemake's own time for the same DAG of trivial rules.

python benchmarks/dag.py                  a quarter of an hour, 1 GB of disk below --folder
python benchmarks/dag.py --parts 1000
python benchmarks/dag.py --only jobs      what is completed alone

dry run   `snakemake -n` where everything is still to be made
no-op     `snakemake` where everything is made
jobs      parts completed of the trivial rules, by two at a time, in the first --window seconds of a call
          with the shipped profile and of one with Snakemake's own defaults

Times are CPU seconds, since Snakemake computes nearly all the while and other work on the machine
changes them least. The bars were set on a machine where Snakemake alone took 9.7 s and 11 s.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import Row, finish, in_turn, medians, parser
from projects import (
    FLAGS,
    ROOT,
    TRIVIAL_FLAGS,
    Call,
    completed_per_minute,
    fill_project,
    fill_trivial,
    make_project,
    make_trivial,
    snakemake,
    touch,
)

PARTS = 10_000  # what the bars are for


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    made.add_argument("--parts", type=int, default=PARTS, help="parts of the corpus")
    made.add_argument("--only", choices=("times", "jobs"), help="half of it")
    made.add_argument(
        "--window", type=float, default=60, help="seconds that each call has for jobs"
    )
    made.set_defaults(rounds=3)
    args = made.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        rows = dag(Path(name), args.rounds, args.parts) if args.only != "jobs" else []
        if args.only != "times":
            rows += jobs(Path(name), args.rounds, args.parts, args.window)
    finish(rows, as_json=args.json)


def dag(folder: Path, rounds: int, parts: int) -> list[Row]:
    """Both sides in turn, first with all to do, then with nothing."""
    places = {"snakegpt": folder / "ours", "trivial": folder / "trivial"}
    words = {"snakegpt": ["train_x", *FLAGS], "trivial": TRIVIAL_FLAGS}
    make_project(places["snakegpt"], parts)
    make_trivial(places["trivial"], parts)

    def measure(what: str, limit_s: float, alone_s: float, *more: str) -> list[Row]:
        calls: dict[str, list[Call]] = {side: [] for side in places}

        def calling(side: str) -> float:
            calls[side].append(snakemake(places[side], [*words[side], *more]))
            return calls[side][-1].cpu_s

        sides = {side: lambda side=side: calling(side) for side in places}
        cpu_s = medians(in_turn(rounds, **sides))
        peak_mb = {side: max(call.peak_mb for call in calls[side]) for side in places}
        ratio, value, peak = (
            cpu_s["snakegpt"] / cpu_s["trivial"],
            cpu_s["snakegpt"],
            peak_mb["snakegpt"],
        )
        most = limit_s / alone_s
        bar_s = f"at most {limit_s:g} s"
        bar_ratio = f"at most {most:.2f}: {limit_s:g} s where Snakemake alone takes {alone_s:g} s"
        return [
            Row(what, "CPU s", cpu_s, value, bar_s, value <= limit_s),
            Row(f"{what}, against trivial", "CPU s", cpu_s, ratio, bar_ratio, ratio <= most),
            Row(f"{what}, memory", "MB", peak_mb, peak, "at most 500 MB", peak <= 500),
        ]

    rows = measure(f"dry run, {parts:,} parts", 15, 9.7, "-n")
    fill_project(places["snakegpt"], parts)
    fill_trivial(places["trivial"], parts)
    for side, place in places.items():
        touch(place, words[side])
        assert "Nothing to be done" in snakemake(place, words[side]).text, place
    return rows + measure(f"no-op run, {parts:,} parts", 20, 11)


def jobs(folder: Path, rounds: int, parts: int, window_s: float) -> list[Row]:
    """The same trivial jobs, so that choosing among them is all that differs."""
    place = folder / "jobs"
    make_trivial(place, parts)
    words = {
        "shipped profile": ["--workflow-profile", str(ROOT / "profiles/default")],
        "Snakemake's defaults": ["--workflow-profile", "none"],
    }
    sides = {
        side: lambda more=more: completed_per_minute(place, ["--cores", "2", *more], window_s)
        for side, more in words.items()
    }
    rate = medians(in_turn(rounds, **sides))
    ratio = rate["shipped profile"] / max(rate["Snakemake's defaults"], 60 / window_s)
    what = f"jobs completed, {parts:,} parts"
    return [Row(what, "a minute", rate, ratio, "at least 10 times as many", ratio >= 10)]


if __name__ == "__main__":
    main()
