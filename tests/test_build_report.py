"""build_report as a stage: the figures shown are those of the inputs, and what cannot be told is said."""

from __future__ import annotations

import json
import re

import pytest
import report_fixtures
from snakegpt.stages import build_report


def run(tmp_path, *, provenance=True, change=None, adopted=None, **changes):
    files = report_fixtures.results(tmp_path / "in", **changes)
    if change:
        role, edit = change
        value = json.loads(files[role][0].read_text(encoding="utf-8"))
        edit(value)
        files[role][0].write_text(json.dumps(value), encoding="utf-8")
    execution = {"label": "build_report gpt2"}
    if provenance:
        chain = tmp_path / "provenance.json"
        told = report_fixtures.provenance()
        for action in told["actions"]:
            if adopted and action["stage"] == "train_model":
                action["adopted"] = adopted
        chain.write_text(json.dumps(told), encoding="utf-8")
        execution["provenance"] = str(chain)
    settings = {"experiment": "gpt2", "settings": report_fixtures.settings()}
    arguments = ["--settings", json.dumps(settings), "--execution", json.dumps(execution)]
    for role, paths in files.items():
        arguments += [f"--{role}", *map(str, paths)]
    build_report.main([*arguments, "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    return page, json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))


def text_of(page):
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_the_numbers_shown_are_those_of_the_inputs(tmp_path):
    page, summary = run(tmp_path)
    text = text_of(page)
    best = report_fixtures.score(4.6517)
    assert "4.6517 ± 0.0081" in text and "4.6713 ± 0.0081" in text
    assert f"{best['bits_per_byte']:.4f}" in text
    assert "7,248,640" in text  # parameters
    assert "1,487,659" in text and "78,384" in text  # tokens of the splits
    assert summary["loss_nats"] == 4.6517
    assert summary["bits_per_byte"] == best["bits_per_byte"]
    assert summary["tokens"] == 300 * 4096
    assert summary["experiment"] == "gpt2"


def test_the_plan_stands_beside_what_happened(tmp_path):
    page, summary = run(tmp_path)
    ratio = summary["train_time_s"] / 166.05
    assert re.search(rf"training time 2 min 46 s .{{1,20}} {ratio:.2f}", text_of(page))


def test_the_chain_shows_short_digests_and_holds_whole_ones(tmp_path):
    page, _ = run(tmp_path)
    trained = next(
        a for a in report_fixtures.provenance()["actions"] if a["stage"] == "train_model"
    )
    for sha256 in trained["outputs"]["weights.safetensors"], report_fixtures.FINGERPRINT:
        assert f'title="{sha256}">{sha256[:12]}<' in page
    assert f"git checkout {report_fixtures.COMMIT}" in page


def test_an_adopted_result_is_shown_with_who_when_and_why(tmp_path):
    adopted = {
        "from": "5f" * 32,
        "user": "ada",
        "finished": "2026-11-24T08:24:20+00:00",
        "reason": "renamed <Block>, nothing else",
    }
    page, _ = run(tmp_path / "with", adopted=adopted)
    text = text_of(page)
    assert "train_model gpt2, by ada, 2026-11-24 08:24 UTC, from the run 5f5f5f5f5f5f" in text
    assert "renamed &lt;Block&gt;, nothing else" in page
    assert "declared to give the same bytes" not in run(tmp_path / "without")[0]


def test_without_provenance_the_page_says_so(tmp_path):
    page, _ = run(tmp_path, provenance=False)
    assert "run by hand" in page
    assert "not recorded" in page
    assert "git checkout" not in page


def test_a_resumed_training_says_where(tmp_path):
    page, _ = run(tmp_path, resumed_at=120)
    assert "interrupted once" in text_of(page)
    assert "resumed at step 120" in text_of(page)


def test_one_process_has_no_bandwidth_and_says_why(tmp_path):
    page, _ = run(tmp_path, ranks=1)
    assert "one process" in text_of(page)
    assert "bus bandwidth" not in page


def test_results_of_different_tokenizers_are_refused(tmp_path, capsys):
    other = ("evaluation", lambda value: value.update(tokenizer_fingerprint="0" * 64))
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, change=other)
    assert stopped.value.code == 2
    assert "different tokenizers" in capsys.readouterr().err


def test_links_and_nodes_of_a_cluster_stand_in_the_page(tmp_path):
    def several(network):
        speed = {"matmul_flops_per_s": 2.5e10, "host_to_device_gb_per_s": None}
        network["nodes"] = [
            {"host": host, "ranks": 4, "interface": {"name": "ens5"}}
            | {"speed": {**speed, "disk_read_gb_per_s": 1.25}}
            for host in ("ada", "bob")
        ]
        trips = {"p50": 1.5e-4, "p99": 9e-4}
        rate = {"bits_per_second": 9.41e8}
        link = {"from": 0, "to": 1, "up": rate, "down": None, "latency_s": trips, "mtu": 9000}
        network["links"] = [link]
        network["warnings"] = ["bob is slow: it sends less."]

    text = text_of(run(tmp_path, change=("network", several))[0])
    assert "All 1 links between 2 nodes" in text
    assert "ada bob 941M unknown unknown 150 µs 900 µs 9000" in text
    assert "bob ens5 4 25G – 1.25" in text
    assert "bob is slow: it sends less." in text
