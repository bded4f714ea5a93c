"""Pages: self-contained, well-formed, escaped, deterministic, and their settings give the experiment again."""

from __future__ import annotations

import hashlib
import html.parser
from pathlib import Path

import pytest
import report_fixtures
import yaml
from snakegpt import charts
from snakegpt import settings as tree
from snakegpt.pages.rendering import readable_time
from snakegpt.pages.report import settings_yaml
from snakegpt.stages import build_index, build_report

TEMPLATES = Path(charts.__file__).parent / "templates"
VOID = {"meta", "link", "br", "hr", "img", "path", "use"}


class Reader(html.parser.HTMLParser):
    """Checks that tags nest, and gathers references, ids and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.references, self.ids, self.tags, self.texts = [], [], [], set(), []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def report(folder, **changes):
    build_report.build_report(
        "gpt2", report_fixtures.settings(), report_fixtures.results(folder / "in", **changes),
        None, folder,
    )  # fmt: skip
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("changes", [{}, {"ranks": 1}, {"resumed_at": 120}])
def test_a_report_is_one_well_formed_file_that_refers_to_nothing_outside(tmp_path, changes):
    page = report(tmp_path, **changes)
    read = Reader(page)
    outside = [to for to in read.references if not to.startswith("#") and to != "data:,"]
    assert outside == []
    assert "script" not in read.tags
    assert "@import" not in page
    assert all(part.startswith("#") for part in _urls(page))
    assert len(read.ids) == len(set(read.ids))
    assert {to[1:] for to in read.references if to.startswith("#")} <= set(read.ids)


def _urls(page):
    return [part.split(")")[0] for part in page.split("url(")[1:]]


def test_what_a_model_wrote_is_text(tmp_path):
    page = report(tmp_path)
    assert "<script>" not in page
    assert "<script>alert('a model wrote this')</script>" in Reader(page).text
    assert "\x00" not in page


def test_same_inputs_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert report(tmp_path / "a") == report(tmp_path / "b")


def test_the_settings_in_a_report_ask_for_the_same_experiment(tmp_path):
    given = report_fixtures.settings()
    file = tmp_path / "mine.yaml"
    file.write_text(settings_yaml("gpt2", given), encoding="utf-8")
    # Over a configuration that means something else by the name.
    other = {
        "experiments": {
            "gpt2": {"corpus": "x", "tokenizer": "gpt2", "laptop": {"model": {"layers": 9}}}
        }
    }
    base = tmp_path / "config.yaml"
    base.write_text(yaml.safe_dump(other), encoding="utf-8")
    found = tree.load_files([base, file])
    experiment = found.experiment("gpt2")
    for name in ("model", "training", "evaluation", "sampling"):
        assert getattr(experiment, name).model_dump() == given[name]
    corpus = {k: v for k, v in given["corpus"].items() if k != "name"}
    assert found.corpus(experiment.corpus).model_dump() == corpus


def test_charts_take_their_colours_from_the_page():
    points = [(float(x), 1.0 + x) for x in range(50)]
    drawn = charts.loss_chart(points, points[::10], 4.2, 40)
    Reader(drawn)
    assert "var(--series-1)" in drawn
    assert "var(--series-2)" in drawn
    assert not [stand_in for stand_in in charts.COLOURS if stand_in in drawn]
    assert drawn == charts.loss_chart(points, points[::10], 4.2, 40)


def test_thinning_keeps_the_mean():
    points = [(float(x), float(x % 7)) for x in range(1000)]
    thin = charts.thinned(points, 100)
    assert len(thin) == 100
    assert sum(y for _, y in thin) / 100 == pytest.approx(sum(y for _, y in points) / 1000)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.5e-4, "350 µs"),
        (0.0184, "18.4 ms"),
        (43, "43 s"),
        (312, "5 min 12 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_times_read_as_people_say_them(seconds, text):
    assert readable_time(seconds) == text


def test_changed_templates_mean_a_new_revision():
    """The code digest covers Python only. When this fails: raise REVISION in build_report and
    build_index, then write the new revision and digest here."""
    digest = hashlib.sha256()
    for path in sorted(TEMPLATES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    known = {3: "5cb217b06187fffb9198d629ff718d1d35bfc1e0883c7512741b1de013420c34"}
    assert build_report.REVISION == build_index.REVISION
    assert digest.hexdigest() == known[build_report.REVISION]
