"""A training that starts from weights: at their loss, to the same bits after a kill, with any strategy."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from pretrained_fixtures import MODEL, N_VOCAB, adapt_arguments, foreign
from safetensors.torch import load_file
from snakegpt.batches import TrainingBatches
from snakegpt.errors import UserError
from snakegpt.identity import file_digest
from snakegpt.locks import read as read_locks
from snakegpt.pipeline import Pipeline
from snakegpt.settings import load
from snakegpt.stages import adapt_weights, train_model
from snakegpt.tokens import open_split, read_manifest
from train_fixtures import ENVIRONMENT, SETTINGS, metrics, tokens, train_command

ROOT = Path(__file__).parent.parent
TRAINING = {**SETTINGS["training"], "batch_tokens": 64, "steps": 6}


def settings(model=MODEL, **training):
    return {"model": model, "training": {**TRAINING, **training}}


def command(manifest, out, start, chosen, **execution) -> list[str]:
    words = train_command(manifest, out, chosen, execution, out.with_name(f"{out.name}.state"))
    return [*words, "--initial", str(start / "weights.safetensors")]


def run(*arguments, **execution) -> None:
    """One rank, in this process."""
    train_model.main(command(*arguments, **execution)[3:])


@pytest.fixture
def manifest(tmp_path):
    return tokens(tmp_path / "tokens")


@pytest.fixture
def start(tmp_path):
    foreign(tmp_path / "theirs")
    adapt_weights.main(adapt_arguments(tmp_path / "theirs", tmp_path / "start", MODEL))
    return tmp_path / "start"


@torch.no_grad()
def losses_of(theirs, ids, targets, padding=0) -> torch.Tensor:
    """transformers' losses, with logits of so many mean rows beside its own."""
    logits = theirs(ids).logits
    mean = logits.mean(-1, keepdim=True).expand(-1, -1, padding)
    flat = torch.cat([logits, mean], dim=-1).flatten(0, 1)
    return torch.nn.functional.cross_entropy(flat, targets.flatten(), reduction="none")


@pytest.mark.parametrize(
    ("config", "multiple", "padding"),
    [({}, 1, 0), ({"n_positions": 32}, 1, 0), ({}, 64, 64 - N_VOCAB)],
    ids=["as they are", "cropped", "padded"],
)
def test_training_begins_at_the_loss_that_transformers_computes(
    manifest, tmp_path, config, multiple, padding
):
    theirs = foreign(tmp_path / "theirs", **config)
    model = {**MODEL, "vocabulary_multiple": multiple}
    adapt_weights.main(adapt_arguments(tmp_path / "theirs", tmp_path / "start", model))
    out = tmp_path / "out"
    run(manifest, out, tmp_path / "start", settings(model, steps=2))

    content = read_manifest(manifest)
    ids = torch.tensor(open_split(manifest, content, "val").read(0, 300))
    windows = [ids[i : i + 9].unsqueeze(0) for i in range(0, 299, 8)]
    expected = torch.cat([losses_of(theirs, w[:, :-1], w[:, 1:], padding) for w in windows])
    first = metrics(out, "validation")[0]
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(expected.mean().item(), abs=1e-5)

    batches = TrainingBatches(open_split(manifest, content, "train"), 8, 8, 1337)
    [(ids, targets)] = batches.micro_batches(0, 8, 0, 1)
    expected = losses_of(theirs, ids, targets, padding).mean().item()
    assert metrics(out, "train")[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics(out, "start")[0]["started_from"] == {
        "name": None,
        "sha256": file_digest(tmp_path / "start/weights.safetensors"),
    }


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "fsdp"])
def test_two_ranks_start_where_one_does(manifest, start, tmp_path, strategy):
    run(manifest, tmp_path / "one", start, settings(optimizer="muon"))
    words = command(
        manifest, tmp_path / "two", start, settings(optimizer="muon"),
        ranks=2, strategy=strategy, threads=2,
    )  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = (
        [m["loss"] for event in ("validation", "train") for m in metrics(tmp_path / out, event)]
        for out in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-5)


def test_with_activations_computed_twice_it_starts_there_too(manifest, start, tmp_path):
    run(manifest, tmp_path / "plain", start, settings(steps=2))
    run(manifest, tmp_path / "twice", start, settings(steps=2), activation_checkpointing=True)
    plain, twice = ([m["loss"] for m in metrics(tmp_path / o, "train")] for o in ("plain", "twice"))
    assert twice == pytest.approx(plain, rel=1e-6)


def test_killed_and_started_again_it_ends_at_the_same_bits(manifest, start, tmp_path):
    chosen = settings(steps=1500, validation_interval=500)
    run(manifest, tmp_path / "whole", start, chosen)
    words = command(manifest, tmp_path / "out", start, chosen, save_interval_s=0.2)
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out.state").glob("state_*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "resumes at step" in done.stderr
    whole, out = ((tmp_path / o / "weights.safetensors").read_bytes() for o in ("whole", "out"))
    assert out == whole
    assert [m["step"] for m in metrics(tmp_path / "out", "validation")] == [0, 500, 1000, 1500]


def test_a_state_of_other_starting_weights_is_refused(manifest, start, tmp_path, capsys):
    run(manifest, tmp_path / "out", start, settings())
    path = start / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert "continued.weights_sha256" in refusal(
        capsys, manifest, tmp_path / "out", start, settings()
    )


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ending:
        run(*arguments)
    assert ending.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_what_does_not_fit_is_refused_before_the_first_step(manifest, start, tmp_path, capsys):
    out = tmp_path / "out"
    wider = settings({**MODEL, "channels": 32})
    assert "does not fit the model to be trained" in refusal(capsys, manifest, out, start, wider)
    other = tokens(tmp_path / "foreign", fingerprint="cd" * 32)
    said = refusal(capsys, other, out, start, settings())
    assert "ab" * 32 in said and "cd" * 32 in said
    (start / "weights.safetensors").write_bytes(b"no such thing")
    assert "is damaged, or no safetensors" in refusal(capsys, manifest, out, start, settings())


def test_starting_and_continuing_exclude_each_other(manifest, start, tmp_path, capsys):
    words = command(manifest, tmp_path / "out", start, settings())
    with pytest.raises(SystemExit):
        train_model.main([*words[3:], "--optimizer", "optimizer.safetensors"])
    assert "give one of them" in capsys.readouterr().err


def test_the_optimiser_is_new(manifest, start, tmp_path):
    run(manifest, tmp_path / "out", start, settings(steps=1, warmup_steps=0))
    moments = load_file(tmp_path / "out/optimizer.safetensors")
    steps = {float(t) for name, t in moments.items() if name.endswith(".step")}
    assert steps == {1.0}


# ---- settings and pipeline ----


def config(**training):
    """The shipped configuration, with an experiment `tuned` that is as gpt2 at laptop scale."""
    shipped = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    tuned = copy.deepcopy(shipped["experiments"]["gpt2"])
    tuned["laptop"]["training"] |= {"start_from": "gpt2", **training}
    shipped["experiments"]["tuned"] = tuned
    return shipped


def changed(path: str, value: object):
    found = config()
    *parents, last = path.split(".")
    block = found
    for parent in parents:
        block = block.setdefault(parent, {})
    block[last] = value
    return found


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (config(start_from="gtp2"), "start_from = 'gtp2' is not defined. Nearest valid name: gpt2"),
        (config(start_from="openai_gtp2_xl"), "Nearest valid name: openai_gpt2_xl"),
        (config(start_from="tuned"), "start_from: tuned -> tuned comes back to itself"),
        (
            changed("experiments.gpt2.laptop.training.start_from", "tuned"),
            "start_from: tuned -> gpt2 -> tuned comes back to itself",
        ),
        (
            config(continue_from="gpt2"),
            "has both continue_from = 'gpt2' and start_from = 'gpt2'",
        ),
        (
            changed("weights.openai_gpt2.tokenizer", "gpt3"),
            "weights.openai_gpt2.tokenizer = 'gpt3' is not defined. Nearest valid name: gpt2",
        ),
        (
            changed("weights.gpt2", {"tokenizer": "gpt2", "source": {"kind": "local", "paths": ["a"]}}),
            "weights.gpt2 has the name of an experiment; give it another one",
        ),
        (
            changed("weights.openai_gpt2.source.kind", "hugginface"),
            "Nearest valid name: huggingface",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_start_are_refused_with_the_way_out(wrong, said):
    with pytest.raises(UserError) as refused:
        load(wrong)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (config(start_from="shakespeare_char"), "its tokenizer is shakespeare_char, this one's gpt2"),
        (
            changed("experiments.tuned.laptop.model.layers", 6),
            "'gpt2': model.layers is 6, the weights have 4: set it to that",
        ),
        (
            changed("experiments.tuned.laptop.model.bias", False),
            "model.bias is false, the weights have true",
        ),
        (
            changed("experiments.tuned.laptop.model.context", 256),
            "model.context is 256, and the weights have 128 positions: set it to that or less",
        ),
    ],
)  # fmt: skip
def test_weights_that_cannot_fit_are_refused_before_anything_runs(wrong, said):
    """And only where they are asked for: the other experiments of the file are none the worse."""
    known = pipeline(wrong)
    known.request("train_model", {"experiment": "gpt2"})
    with pytest.raises(UserError) as refused:
        known.request("adapt_weights", {"experiment": "tuned"})
    assert said in str(refused.value)


def test_what_may_differ_is_taken():
    for path, value in (
        ("model.dropout", 0.1),
        ("model.context", 64),
        ("model.vocabulary_multiple", 1),
        ("model.bias", None),  # which is true
    ):
        settings = changed(f"experiments.tuned.laptop.{path}", value)
        pipeline(settings).request("adapt_weights", {"experiment": "tuned"})


def pipeline(settings) -> Pipeline:
    return Pipeline(load(settings), read_locks(ROOT / "corpora.lock.json"))


def test_training_gets_the_weights_and_its_key_no_name():
    known = pipeline(config())
    train = known.request("train_model", {"experiment": "tuned"})
    assert train.settings == known.request("train_model", {"experiment": "gpt2"}).settings
    assert train.inputs["initial"] == ["results/starts/tuned/weights.safetensors"]
    assert "initial" not in known.request("train_model", {"experiment": "gpt2"}).inputs
    adapt = known.find(train.inputs["initial"][0])
    assert adapt.inputs["weights"] == ["results/models/gpt2/best.safetensors"]
    plans = [known.request("plan_training", {"experiment": e}) for e in ("gpt2", "tuned")]
    assert plans[0].settings == plans[1].settings


def test_the_shipped_fine_tuning_starts_from_the_right_weights_at_either_scale():
    shipped = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    laptop, full = (pipeline(shipped | {"scale": scale}) for scale in ("laptop", "full"))
    of = {"experiment": "finetune_gpt2"}
    assert laptop.request("adapt_weights", of).inputs["weights"] == [
        "results/models/gpt2/best.safetensors"
    ]
    adapt = full.request("adapt_weights", of)
    assert adapt.inputs["weights"] == ["results/weights/openai_gpt2/weights.json"]
    assert full.request("fetch_weights", {"weights": "openai_gpt2"}).settings == {"files": None}
    recipe = full.settings.experiments["finetune_gpt2"].training
    assert (recipe.batch_tokens, recipe.steps) == (32 * 1024, 20)  # nanoGPT's
    assert recipe.learning_rate == recipe.min_learning_rate == 3e-5
