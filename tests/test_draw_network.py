"""draw_network as a stage: one page and its plots, of what was measured, whichever of the two it was."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest
import report_fixtures
from report_fixtures import Reader, require_self_contained
from snakegpt.stages import draw_network


def drawn(folder, **measured):
    """The page and the names of all files, from contents of network.json and scaling.json."""
    arguments = ["--settings", '{"experiment": "gpt2"}', "--out", str(folder / "out")]
    for role, content in measured.items():
        path = folder / f"{role}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        arguments += [f"--{role}", str(path)]
    draw_network.main(arguments)
    files = sorted(path.name for path in (folder / "out").iterdir())
    return (folder / "out" / "network.html").read_text(encoding="utf-8"), files


@pytest.mark.parametrize(
    ("roles", "ranks", "files"),
    [
        (("network", "scaling"), 2, ["network.html", "network.svg", "scaling.svg"]),
        (("scaling",), 2, ["network.html", "scaling.svg"]),
        (("network",), 2, ["network.html", "network.svg"]),
        (("network", "scaling"), 1, ["network.html", "scaling.svg"]),  # nothing to sum
    ],
)
def test_the_page_shows_what_there_is(tmp_path, roles, ranks, files):
    measured = {
        "network": report_fixtures.network(ranks),
        "scaling": report_fixtures.scaling((1, 2, 4) if ranks > 1 else (1,)),
    }
    page, found = drawn(tmp_path, **{role: measured[role] for role in roles})
    require_self_contained(page)
    assert found == files
    for role, title in (("network", "The network under it"), ("scaling", "Strong efficiency")):
        assert (title in page) == (role in roles)


def test_the_bars_are_the_shares_and_the_table_says_them(tmp_path):
    page, _ = drawn(tmp_path, scaling=report_fixtures.scaling())
    text = "".join(Reader(page).text.split())
    # Four ranks: 2 s of computing, of which 0.02 s for batches and 0.08 s for the slowest; 0.2 s of exchanges.
    assert "4|2.2s|1.86k|86.4%|9.1%|0.9%|3.6%|0.83|0.91".replace("|", "") in text  # 8 / (4 x 2.2)
    assert "Fine with ddp: exchanges take 9% of a step on 4 ranks".replace(" ", "") in text
    chart = page[page.index('aria-label="Shares of a step') :]
    chart = chart[: chart.index("</svg>")]
    spans = re.findall(r'd="M ([\d.]+) [\d.]+ *\nL ([\d.]+) ', chart)
    ((_, width), (left, right), *rest) = [(float(x), float(y)) for x, y in spans]
    assert right < width  # the axes are inside the figure
    at = left
    for seconds in (1.9, 0.2, 0.02, 0.08):
        end = at + (right - left) * seconds / 2.2
        assert any((x, y) == pytest.approx((at, end), abs=0.01) for x, y in rest), seconds
        at = end


def test_a_plot_is_a_picture_of_its_own(tmp_path):
    drawn(tmp_path, network=report_fixtures.network(), scaling=report_fixtures.scaling())
    for name in ("network", "scaling"):
        svg = (tmp_path / "out" / f"{name}.svg").read_text(encoding="utf-8")
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        for colour in set(re.findall(r"var\((--[\w-]+)\)", svg)):
            assert f"{colour}: " in svg  # defined in it, light and dark


def test_mistakes_are_one_line(tmp_path, capsys):
    broken = tmp_path / "network.json"
    broken.write_text("{}", encoding="utf-8")
    for arguments, words in (([], "nothing to draw"), (["--network", str(broken)], "has no")):
        with pytest.raises(SystemExit) as ended:
            draw_network.main([*arguments, "--out", str(tmp_path)])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
