"""build_index as a stage: a row and a relative link for each experiment, best first."""

from __future__ import annotations

import json
import re

from snakegpt.stages import build_index


def summary(experiment, bits_per_byte, **changes):
    return {
        "experiment": experiment, "description": "a <b>bold</b> claim", "corpus": "plays",
        "tokenizer": "gpt2", "loss_nats": 4.6517, "perplexity": 104.76,
        "bits_per_byte": bits_per_byte, "n_parameters": 7_248_640, "tokens": 1_228_800,
        "rate_tokens_per_s": 8616.0, "train_time_s": 142.6, "prompt": "ROMEO:\n",
        "sample": "<script>alert(1)</script>",
        "validation_curve": [[50, 6.0], [100, 5.0], [150, 4.7]], **changes,
    }  # fmt: skip


def index(tmp_path, *summaries, **settings):
    paths = []
    for found in summaries:
        path = tmp_path / found["experiment"] / "summary.json"
        path.parent.mkdir()
        path.write_text(json.dumps(found), encoding="utf-8")
        paths.append(str(path))
    arguments = ["--summaries", *paths] if paths else []
    arguments += ["--settings", json.dumps(settings)]
    build_index.main([*arguments, "--out", str(tmp_path / "out")])
    return (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_every_experiment_has_a_link_and_its_figures_best_first(tmp_path):
    page = index(tmp_path, summary("worse", 2.5), summary("better", 2.0781))
    table = page[: page.index("</table>")]
    assert re.findall(r'href="([\w/.]+report\.html)"', table) == [
        "better/report.html",
        "worse/report.html",
    ]
    for figure in ("2.0781", "4.6517", "104.8", "7.25M", "1.23M", "8.62k", "2 min 23 s"):
        assert f">{figure}<" in table


def test_what_was_measured_of_the_network_has_a_link(tmp_path):
    page = index(tmp_path, summary("one", 2.0), summary("two", 2.5), networks=["two"])
    assert re.findall(r'href="(\.\./[^"]+)"', page) == ["../networks/two/network.html"]


def test_names_descriptions_and_samples_are_text(tmp_path):
    page = index(tmp_path, summary("one", 2.0))
    assert "<script" not in page and "<b>" not in page


def test_a_curve_of_one_point_is_left_out(tmp_path):
    assert "<polyline" not in index(tmp_path, summary("one", 2.0, validation_curve=[[50, 6.0]]))


def test_no_experiment_gives_a_page_all_the_same(tmp_path):
    assert "No experiment has a report yet" in index(tmp_path)
