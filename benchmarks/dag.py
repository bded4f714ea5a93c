"""The pipeline of a corpus in 10,000 parts against Snakemake's own time for the same DAG of trivial rules.

python benchmarks/dag.py                  some minutes, 1 GB of disk below --folder
python benchmarks/dag.py --parts 1000

dry run   `snakemake -n` where everything is still to be made
no-op     `snakemake` where everything is made
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import Row, finish, in_turn, medians, parser
from projects import (
    FLAGS,
    TRIVIAL_FLAGS,
    fill_project,
    fill_trivial,
    make_project,
    make_trivial,
    snakemake,
)

DRY_RUN_S, DRY_RUN_MB, NO_OP_S = 15, 500, 20
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
    peaks: dict[str, float] = {}

    def calling(side: str, *more: str) -> float:
        call = snakemake(places[side], [*words[side], *more])
        peaks[side] = max(peaks.get(side, 0), call.peak_mb)
        return call.elapsed_s

    def measure(*more: str) -> dict[str, float]:
        peaks.clear()
        sides = {side: lambda side=side: calling(side, *more) for side in places}
        return medians(in_turn(rounds, **sides))

    dry = measure("-n")
    size = f"{parts:,} parts"
    rows = [
        _row(f"dry run, {size}", "s", dry, DRY_RUN_S, parts),
        _row(f"dry run, {size}, peak memory", "MB", dict(peaks), DRY_RUN_MB, parts),
    ]
    fill_project(places["snakegpt"], parts)
    fill_trivial(places["trivial"], parts)
    for side, place in places.items():
        # Gives every result the metadata that Snakemake keeps of a job that ran.
        snakemake(place, [*words[side], "--touch"])
        assert "Nothing to be done" in snakemake(place, words[side]).text, place
    return [*rows, _row(f"no-op run, {size}", "s", measure(), NO_OP_S, parts)]


def _row(what: str, unit: str, figures: dict[str, float], limit: float, parts: int) -> Row:
    """Our own figure beside its bar; smaller corpora have to meet the bar of 10,000 parts as well."""
    value = figures["snakegpt"]
    ratio = value / figures["trivial"]
    bar = f"at most {limit} {unit} at {PARTS:,} parts; {ratio:.2f} x trivial"
    return Row(what, unit, figures, value, bar, parts > PARTS or value <= limit)


if __name__ == "__main__":
    main()
