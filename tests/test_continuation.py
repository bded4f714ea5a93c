"""A run that goes on from a finished one ends where a run of as many steps ends, or is refused."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from snakegpt.errors import UserError
from snakegpt.lineage import continuation_problems
from snakegpt.locks import read as read_locks
from snakegpt.pipeline import Pipeline
from snakegpt.settings import Training, load
from snakegpt.stages import train_model
from train_fixtures import ENVIRONMENT, SETTINGS, changed, metrics, tokens, train_command

ROOT = Path(__file__).parent.parent
STABLE = {"schedule": "warmup_stable_decay", "cooldown_fraction": 0.25}


def stage(manifest: Path, out: Path, settings, before: Path | None = None) -> None:
    """Run the stage in this process, on one rank."""
    command = train_command(manifest, out, settings, {}, out.with_name(f"{out.name}.state"))
    if before:
        command += [
            *("--weights", str(before / "weights.safetensors")),
            *("--config", str(before / "config.json")),
            *("--optimizer", str(before / "optimizer.safetensors")),
        ]
    train_model.main(command[3:])


@pytest.fixture
def manifest(tmp_path):
    return tokens(tmp_path / "tokens")


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "adamw", "schedule": "cosine", "decay_steps": 24},
        {"optimizer": "muon", "schedule": "linear", "decay_steps": 24},
        {"optimizer": "muon", "decay_steps": 24, **STABLE},  # it falls from step 18 on
    ],
)
def test_it_ends_bit_for_bit_where_one_run_of_all_steps_ends(manifest, tmp_path, training):
    stage(manifest, tmp_path / "whole", changed(steps=20, **training))
    stage(manifest, tmp_path / "first", changed(steps=12, **training))
    stage(manifest, tmp_path / "more", changed(steps=20, **training), tmp_path / "first")
    for name in ("weights.safetensors", "config.json"):
        one, two = ((tmp_path / run / name).read_bytes() for run in ("whole", "more"))
        assert one == two
    moments = [load_file(tmp_path / run / "optimizer.safetensors") for run in ("whole", "more")]
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) > 20
    assert all((moments[0][name] == moments[1][name]).all() for name in moments[0])
    losses = [
        {line["step"]: line["loss"] for line in metrics(tmp_path / run, "train")}
        for run in ("whole", "more")
    ]
    assert losses[1] == {step: losses[0][step] for step in range(13, 21)}
    [end] = metrics(tmp_path / "more", "end")  # the rate of the 8 steps of 64 tokens that it made
    assert end["rate_tokens_per_s"] == pytest.approx(8 * 64 / end["elapsed_s"], rel=0.05)


def test_two_sharded_ranks_go_on_from_one(manifest, tmp_path):
    training = {"decay_steps": 24, "optimizer": "muon"}
    stage(manifest, tmp_path / "whole", changed(steps=20, **training))
    stage(manifest, tmp_path / "first", changed(steps=12, **training))
    first = tmp_path / "first"
    command = train_command(
        manifest,
        tmp_path / "more",
        changed(steps=20, **training),
        {"ranks": 2, "strategy": "fsdp", "threads": 2},
        tmp_path / "more.state",
    )
    command += ["--weights", str(first / "weights.safetensors")]
    command += ["--config", str(first / "config.json")]
    command += ["--optimizer", str(first / "optimizer.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr
    whole, more = (
        [line["loss"] for line in metrics(tmp_path / run, "train")] for run in ("whole", "more")
    )
    assert more == pytest.approx(whole[12:], rel=1e-5)


def recipe(**training) -> Training:
    return Training(**{**SETTINGS["training"], **training})


@pytest.mark.parametrize(
    ("done", "wanted", "said"),
    [
        ({"steps": 12}, {"steps": 12}, "has made 12 already"),
        ({"steps": 12}, {"steps": 24}, "training.decay_steps differ (decay from 2 to 12; here"),
        ({"steps": 12, "decay_steps": 24}, {"steps": 24}, None),
        ({"steps": 12, **STABLE}, {"steps": 24, **STABLE}, "decay_steps, training.cooldown"),
        ({"steps": 12, "decay_steps": 16, **STABLE}, {"steps": 24, **STABLE}, None),
        (
            {"steps": 13, "decay_steps": 16, **STABLE},
            {"steps": 24, **STABLE},
            "decay from 12 to 16",
        ),
        ({"decay_steps": 24}, {"steps": 24, "learning_rate": 0.02}, "learning_rate differ"),
        ({"decay_steps": 24}, {"steps": 24, "optimizer": "muon"}, "training.optimizer"),
        ({"decay_steps": 12}, {"steps": 24, "decay_steps": 12}, None),  # on at the least rate
    ],
)
def test_learning_rates_up_to_there_must_be_the_same(done, wanted, said):
    problems = continuation_problems(recipe(**done), recipe(**wanted))
    assert bool(problems) == (said is not None)
    assert said is None or said in problems[0]


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ending:
        stage(*arguments)
    assert ending.value.code == 2
    return capsys.readouterr().err


def test_what_does_not_belong_together_is_refused(manifest, tmp_path, capsys):
    first, more = tmp_path / "first", changed(steps=20, decay_steps=24)
    stage(manifest, first, changed(steps=12, decay_steps=24))
    out = tmp_path / "out"
    wider = {**more, "model": {**more["model"], "channels": 32}}
    assert "is of another model: channels 16, here 32." in refusal(
        capsys, manifest, out, wider, first
    )
    modern = {**more, "model": {**more["model"], "architecture": "modern"}}
    modern["model"].pop("bias")
    assert "architecture gpt2, here modern" in refusal(capsys, manifest, out, modern, first)
    foreign = tokens(tmp_path / "foreign", fingerprint="cd" * 32)
    said = refusal(capsys, foreign, out, more, first)
    assert "ab" * 32 in said and "cd" * 32 in said
    assert "other learning rates" in refusal(capsys, manifest, out, changed(steps=20), first)

    other = tmp_path / "other"
    stage(manifest, other, changed(steps=12, decay_steps=24, seed=3))
    (other / "optimizer.safetensors").write_bytes((first / "optimizer.safetensors").read_bytes())
    assert "are of different runs" in refusal(capsys, manifest, out, more, other)
    (other / "optimizer.safetensors").write_bytes(b"no such thing")
    assert "left by no training of ours" in refusal(capsys, manifest, out, more, other)


def pipeline(**more) -> Pipeline:
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    gpt2 = config["experiments"]["gpt2"]
    gpt2["laptop"]["training"] |= {"decay_steps": 3000}
    longer = copy.deepcopy(gpt2)
    longer["laptop"]["training"] |= {"steps": 2000, "continue_from": "gpt2", **more}
    config["experiments"]["longer"] = longer
    return Pipeline(load(config), read_locks(ROOT / "corpora.lock.json"))


def test_the_pipeline_hands_over_what_the_run_before_left():
    request = pipeline().request("train_model", {"experiment": "longer"})
    assert "continue_from" not in request.settings["training"]
    assert request.inputs["weights"] == ["results/models/gpt2/weights.safetensors"]
    assert request.inputs["config"] == ["results/models/gpt2/config.json"]
    assert request.inputs["optimizer"] == ["results/models/gpt2/optimizer.safetensors"]
    assert (
        request.inputs["optimizer"][0]
        in pipeline().request("train_model", {"experiment": "gpt2"}).outputs
    )
    plans = [pipeline().request("plan_training", {"experiment": e}) for e in ("longer", "gpt2")]
    assert [plan.settings.get("steps_done") for plan in plans] == [1000, None]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"continue_from": "gtp2"}, "'gtp2' is not defined. Nearest valid name: gpt2"),
        ({"continue_from": "longer"}, "longer -> longer comes back to itself"),
        ({"continue_from": "shakespeare_char"}, "its tokenizer is shakespeare_char"),
        ({"steps": 500}, "has made 1,000 already"),
        ({"decay_steps": 2000}, "other learning rates in its 1,000 steps"),
    ],
)
def test_experiments_that_cannot_continue_are_refused_with_the_settings(more, said):
    with pytest.raises(UserError) as refused:
        pipeline(**more)
    assert said in str(refused.value)
