"""`from snakegpt import results`: what notebooks read is what the files and records say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from snakegpt import results
from snakegpt.errors import UserError

pytest_plugins = ["made_results"]


def test_importing_the_package_is_light():
    code = "import sys; from snakegpt import results; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"pandas", "numpy", "torch", "pydantic", "yaml"} & set(loaded)


def test_metrics_and_samples_are_frames_of_their_lines(made):
    tiny = results("tiny")
    assert list(tiny.metrics["event"]) == ["start", "train", "end"]
    assert tiny.metrics["step"].dtype == "Int64"  # whole, though the start has none
    end = tiny.metrics[tiny.metrics["event"] == "end"].iloc[0]
    assert (end["step"], end["elapsed_s"], end["rate_tokens_per_s"]) == (30, 90.0, 42.7)
    assert tiny.samples.to_dict("records") == [{"prompt": "the ", "text": "cat"}]
    assert tiny.evaluation["best"]["perplexity"] == 7.389


def test_settings_are_those_of_the_weights_not_those_of_the_configuration(made):
    made.set("experiments.tiny.training.steps", 999)
    tiny = results("tiny")
    assert tiny.settings["training"]["steps"] == 30
    assert tiny.settings["model"]["channels"] == 16
    assert tiny.weights == Path("results/models/tiny/weights.safetensors")
    assert tiny.best_weights.exists()


def test_provenance_reaches_from_the_corpus_to_all_that_is_there(
    made, monkeypatch, tmp_path_factory
):
    monkeypatch.chdir(tmp_path_factory.mktemp("notebooks"))
    found = results("tiny", project=made.folder).provenance
    stages = [action["stage"] for action in found]
    assert stages[0] == "fetch_corpus"
    assert stages.count("encode_tokens") == 2
    assert set(stages[-2:]) == {"evaluate_model", "sample_text"}
    train = next(action for action in found if action["stage"] == "train_model")
    name = Path(made.folder, "results/models/tiny/weights.safetensors").resolve().name
    assert train["outputs"]["weights.safetensors"] == name


def test_all_experiments_are_one_frame(made):
    config = made.config()
    config["experiments"]["other"] = config["experiments"]["tiny"]
    made.write(config)
    made.make(made.request("train_model", experiment="other"))
    frame = results()
    assert list(frame.index) == ["other", "tiny"]
    assert frame.loc["tiny", "loss_nats"] == 2.0
    assert frame["n_parameters"].tolist() == [3680, 3680]
    assert frame["bits_per_byte"].isna().tolist() == [True, False]


def test_what_is_missing_is_named_with_the_command_that_makes_it(made):
    path = Path("results/evaluations/tiny/evaluation.json")
    path.unlink()
    tiny = results("tiny")
    with pytest.raises(UserError) as stopped:
        tiny.evaluation  # noqa: B018
    assert str(stopped.value) == (
        f"{path} is not there.\n  make it: snakemake --cores all evaluate_tiny"
    )
    made.store.object_path(tiny.weights.resolve().name).unlink()
    with pytest.raises(UserError, match="points to an object that is gone"):
        tiny.weights  # noqa: B018
    with pytest.raises(UserError, match="Nearest valid name: tiny"):
        results("tinny")


def test_without_any_results_the_frame_is_empty_and_a_name_is_an_error(bare):
    assert results().empty
    with pytest.raises(UserError, match="snakemake --cores all report_tiny"):
        results("tiny")


def test_the_weights_alone_say_what_made_them(made):
    for name in ("evaluations", "samples"):
        for path in Path("results", name).rglob("*.json*"):
            path.unlink()
    assert [a["stage"] for a in results("tiny").provenance][-1] == "train_model"


def test_results_that_no_record_made_say_so(made):
    Path("results/.actions/models/tiny/weights.safetensors.json").unlink()
    with pytest.raises(UserError, match="no record says what made"):
        results("tiny").settings  # noqa: B018
