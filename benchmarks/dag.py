"""The pipeline of a corpus in 10,000 parts against Snakemake's own time for the same DAG of trivial rules.

python benchmarks/dag.py                  some minutes, 1 GB of disk below --folder
python benchmarks/dag.py --parts 1000

dry run   `snakemake -n` where everything is still to be made
no-op     `snakemake` where everything is made

Times are CPU seconds, since Snakemake computes nearly all the while and other work on the machine
changes them least. The bars were set on a machine where Snakemake alone took 9.7 s and 11 s.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import Row, finish, in_turn, medians, parser
from projects import (
    FLAGS,
    TRIVIAL_FLAGS,
    Call,
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
    made.set_defaults(rounds=3)
    args = made.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        rows = dag(Path(name), args.rounds, args.parts)
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


if __name__ == "__main__":
    main()
