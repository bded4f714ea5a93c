"""Pages: self-contained, well-formed, escaped, deterministic, and their settings give the experiment again."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import report_fixtures
import yaml
from report_fixtures import Reader
from snakegpt import charts
from snakegpt import settings as tree
from snakegpt.pages.rendering import readable_time
from snakegpt.pages.report import settings_yaml
from snakegpt.stages import build_index, build_report, draw_network

TEMPLATES = Path(charts.__file__).parent / "templates"


def report(folder, **changes):
    build_report.build_report(
        "gpt2", report_fixtures.settings(), report_fixtures.results(folder / "in", **changes),
        None, folder,
    )  # fmt: skip
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changes", [{}, {"ranks": 1}, {"resumed_at": 120}, {"unsteady": True}, {"gpus": True}]
)
def test_a_report_is_one_well_formed_file_that_refers_to_nothing_outside(tmp_path, changes):
    report_fixtures.require_self_contained(report(tmp_path, **changes))


def test_what_came_between_is_told_in_its_order(tmp_path):
    text = " ".join(Reader(report(tmp_path, unsteady=True, resumed_at=120)).text.split())
    resumed = text.index("resumed at step 120")
    skipped = text.index("the update of step 140 was skipped (loss 9.5)")
    back = text.index("went back from step 141 to step 100, and left out the data in between")
    assert resumed < skipped < back
    assert "One update was not taken." in text


def test_the_parts_of_a_step_add_up_in_the_bar_and_in_the_table(tmp_path):
    page = report(tmp_path)
    widths = [
        float(w) for w in re.findall(r'<rect class="part \w+" x="[\d.]+" width="([\d.]+)"', page)
    ]
    assert len(widths) == 6
    assert sum(widths) == pytest.approx(100, abs=6 * 0.3 + 0.1)
    whole = sum(v for k, v in report_fixtures.PARTS.items() if k.endswith("_s"))
    backward = 100 * report_fixtures.PARTS["backward_s"] / whole
    text = " ".join(Reader(page).text.split())
    assert f"backward 72.2 ms {backward:.1f} %".replace(" ", "") in text.replace(" ", "")
    assert f"backward {backward:.0f}%" in page  # for who cannot see the bar


def test_gpus_and_the_verdict_are_told(tmp_path):
    text = " ".join(Reader(report(tmp_path, gpus=True)).text.split())
    assert "GPUs on average: 96% busy, 640 W, 1,868 MHz, 63 °C." in text
    assert "power cap in" in text
    assert "The verdict before training: fits with ddp on one 8 GB GPU." in text
    assert "17 steps tried on this machine" in text
    assert "1 × H100" in text
    assert "8 × T4" not in text


def test_a_run_that_continues_another_is_not_said_to_begin_anew(tmp_path):
    assert "trained from random weights for" in report(tmp_path / "new")
    settings = report_fixtures.settings()
    settings["training"]["continue_from"] = "short"
    files = report_fixtures.results(tmp_path / "in")
    (tmp_path / "more").mkdir()
    build_report.build_report("gpt2", settings, files, None, tmp_path / "more")
    page = (tmp_path / "more" / "report.html").read_text(encoding="utf-8")
    assert "continued from short up to" in page and "random weights" not in page


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (
            {"schedule": "cosine", "warmup_steps": 5},
            "Learning rate: linear warm-up, then cosine decay.",
        ),
        ({"schedule": "linear", "warmup_steps": 0}, "Learning rate: linear decay."),
        (
            {"optimizer": "muon", "muon_learning_rate": 0.04},
            "that of the matrices, 0.04 at its peak, has the same shape.",
        ),
    ],
)
def test_the_learning_rate_is_described_as_it_was(tmp_path, training, said):
    settings = report_fixtures.settings()
    settings["training"] |= training
    files = report_fixtures.results(tmp_path / "in")
    build_report.build_report("gpt2", settings, files, None, tmp_path)
    assert said in (tmp_path / "report.html").read_text(encoding="utf-8")


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
    """The code digest covers Python only. When this fails: raise REVISION in build_report,
    build_index and draw_network, then write the new revision and digest here."""
    digest = hashlib.sha256()
    for path in sorted(TEMPLATES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    known = {5: "88d32276b1cb722d01e3271c4a083bc8a826275489ee63711cc0b892d9f51fb8"}
    assert build_report.REVISION == build_index.REVISION == draw_network.REVISION
    assert digest.hexdigest() == known[build_report.REVISION]
