"""Show what bench_network and measure_scaling found: one page, and the plots as files.

Reads: network.json, scaling.json; one is enough. Writes: network.html, one UTF-8 file that needs no
network and runs no scripts; network.svg and scaling.svg, its first plot of each. By hand:

    python -m snakegpt.stages.draw_network --network /tmp/net/network.json \\
        --scaling /tmp/scaling/scaling.json --settings '{"experiment": "gpt2"}' --out /tmp/net
"""

from __future__ import annotations

from pathlib import Path

from snakegpt.command import only_path, read_json, stage_parser
from snakegpt.errors import UserError, reports_errors
from snakegpt.pages.network import bandwidth_chart, network_page, shares_chart
from snakegpt.pages.rendering import picture
from snakegpt.progress import say

REVISION = 5  # bump when templates/ change: tests/test_pages.py tells
SCIENCE = ("snakegpt.pages.network",)


def draw_network(experiment: str, network: Path | None, scaling: Path | None, out: Path) -> None:
    """Write the page and the plots of what is given to `out`; network.svg only if there was a sum to time."""
    measured = read_json(network, "all_reduce", "advice") if network else None
    scaled = read_json(scaling, "strong", "efficiencies", "verdict") if scaling else None
    (out / "network.html").write_text(network_page(experiment, measured, scaled), encoding="utf-8")
    plots = {
        "network": measured and bandwidth_chart(measured),
        "scaling": scaled and shares_chart(scaled),
    }
    for name, svg in plots.items():
        if svg:
            (out / f"{name}.svg").write_text(picture(svg), encoding="utf-8")


@reports_errors
def main(argv: list[str] | None = None) -> None:
    roles = {"network": "network.json", "scaling": "scaling.json"}
    args = stage_parser(__doc__, roles).parse_args(argv)
    given = {role: only_path(paths, role) for role in roles if (paths := getattr(args, role))}
    if not given:
        raise UserError("nothing to draw: --network, --scaling or both are wanted.")
    args.out.mkdir(parents=True, exist_ok=True)
    experiment = args.settings.get("experiment", "ranks")
    draw_network(experiment, given.get("network"), given.get("scaling"), args.out)
    say(f"{args.execution.get('label', 'draw_network')}  {args.out / 'network.html'}")


if __name__ == "__main__":
    main()
