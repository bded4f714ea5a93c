"""List all experiments with their key figures on one page that leads to their reports.

Reads: summary.json of each experiment. Writes: index.html, one UTF-8 file; its links lead to
<experiment>/report.html beside it, where the reports stand under results/reports/, and for experiments
that `networks` of the settings names to ../networks/<experiment>/network.html. By hand:

    python -m snakegpt.stages.build_index --summaries results/reports/*/summary.json --out /tmp/index \\
        --settings '{"networks": ["gpt2"]}'
"""

from __future__ import annotations

from pathlib import Path

from snakegpt.command import read_json, stage_parser
from snakegpt.errors import reports_errors
from snakegpt.pages.index import index_page
from snakegpt.progress import say

REVISION = 5  # bump when templates/ change: tests/test_pages.py tells
SCIENCE = ("snakegpt.pages.index",)


def build_index(summaries: list[Path], networks: list[str], out: Path) -> None:
    """Write index.html to `out`."""
    found = [read_json(path) for path in summaries]
    (out / "index.html").write_text(index_page(found, networks), encoding="utf-8")


@reports_errors
def main(argv: list[str] | None = None) -> None:
    args = stage_parser(__doc__, {"summaries": "summary.json of each experiment"}).parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    build_index(args.summaries, args.settings.get("networks", []), args.out)
    say(f"{args.execution.get('label', 'build_index')}  {len(args.summaries)} experiments")


if __name__ == "__main__":
    main()
