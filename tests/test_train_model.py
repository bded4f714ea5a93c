"""The stage by its command line: what it leaves, how it is killed and resumed, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from snakegpt.huggingface_format import load_model
from snakegpt.stages import train_model
from snakegpt.training_state import newest_step
from train_fixtures import (
    ENVIRONMENT,
    SETTINGS,
    changed,
    metrics,
    shard,
    tokens,
    train,
    train_command,
)
from transformers import AutoModelForCausalLM

LONG = changed(steps=80, validation_interval=30)
EVERY_STEP = {"save_interval_s": 1e-6}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def manifest(tmp_path):
    return tokens(tmp_path / "tokens")


def start(manifest: Path, out: Path, state: Path, **execution) -> subprocess.Popen[str]:
    command = train_command(manifest, out, LONG, {**EVERY_STEP, **execution}, state)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def steps_saved(state: Path) -> int:
    return newest_step(state)


def wait_for_step(step: int, state: Path, process: subprocess.Popen[str]) -> None:
    while steps_saved(state) < step:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    """Whether a process is dead, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def test_what_it_leaves_loads_in_transformers_and_here(manifest, tmp_path):
    out = tmp_path / "out"
    done = train(manifest, out, ranks=1)
    assert done.returncode == 0, done.stderr
    names = {"weights.safetensors", "best.safetensors", "config.json", "metrics.jsonl"}
    names |= {"optimizer.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == 12  # 11 ids, padded to a multiple of 4
    assert config["snakegpt"]["n_vocab"] == 11
    assert config["snakegpt"]["tokenizer_fingerprint"] == "ab" * 32
    ours = load_model(out / "weights.safetensors", config)
    (out / "model.safetensors").write_bytes((out / "weights.safetensors").read_bytes())
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert (
        theirs.num_parameters()
        == sum(p.numel() for p in ours.parameters()) + 2 * 16 * (3 + 1 + 4 + 1 + 2) + 16
    )  # the zero biases that ours does without
    [start], [end] = metrics(out, "start"), metrics(out, "end")
    assert (start["ranks"], start["precision"], start["device"]) == (1, "float32", "cpu")
    assert end["step"] == 12
    assert [line["step"] for line in metrics(out, "validation")] == [5, 10, 12]
    assert [line["tokens"] for line in metrics(out, "train")] == [64 * (i + 1) for i in range(12)]


def test_a_modern_model_trained_with_muon_is_transformers_nanochat(manifest, tmp_path):
    out = tmp_path / "out"
    model = {k: v for k, v in SETTINGS["model"].items() if k != "bias"}
    settings = {
        "model": {**model, "architecture": "modern", "tie_embeddings": False},
        "training": {
            **SETTINGS["training"],
            "optimizer": "muon",
            "schedule": "warmup_stable_decay",
            "document_masking": True,
        },
    }
    done = train(manifest, out, settings, ranks=1, cross_entropy="chunked")
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in metrics(out, "train")]
    assert losses[0] == pytest.approx(math.log(12), abs=1e-4)  # an untied head starts at zero
    assert losses[-1] < 0.7 * losses[0]
    (out / "model.safetensors").write_bytes((out / "weights.safetensors").read_bytes())
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    config = json.loads((out / "config.json").read_text())
    ours, ids = load_model(out / "weights.safetensors", config), torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)


def test_killed_stopped_and_resumed_is_undisturbed(manifest, tmp_path):
    whole = tmp_path / "whole"
    assert train(manifest, whole, LONG, ranks=1).returncode == 0
    out, state = tmp_path / "out", tmp_path / "state"
    first = start(manifest, out, state, ranks=1)
    wait_for_step(5, state, first)
    first.kill()
    assert ended(first)[0] == -signal.SIGKILL

    at = steps_saved(state)
    second = start(manifest, out, state, ranks=1)
    wait_for_step(at + 5, state, second)
    second.terminate()
    status, said = ended(second)
    assert status == 75
    assert f"resumes at step {at}" in said
    assert "interrupted: train_model saved its state" in said
    assert not (out / "weights.safetensors").exists()

    assert ended(start(manifest, out, state, ranks=1))[0] == 0
    for name in ("weights.safetensors", "best.safetensors", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    losses = [[line["loss"] for line in metrics(o, "train")] for o in (whole, out)]
    assert losses[0] == losses[1]
    assert len(metrics(out, "resume")) == 2


@linux
def test_a_rank_that_dies_is_replaced_and_the_run_ends_undisturbed(manifest, tmp_path):
    whole, out, state = (tmp_path / name for name in ("whole", "out", "state"))
    assert train(manifest, whole, LONG, ranks=2).returncode == 0
    agent = start(manifest, out, state, ranks=2)
    wait_for_step(5, state, agent)
    os.kill(children(agent.pid)[1], signal.SIGKILL)
    status, said = ended(agent)
    assert status == 0, said
    assert said.index("a rank was killed by SIGKILL") < said.index("starts again")
    assert said.count("resumes at step") == 1
    assert "Traceback" not in said
    for name in ("weights.safetensors", "best.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@linux
@pytest.mark.long
def test_two_ranks_killed_in_every_way_and_resumed_are_undisturbed(manifest, tmp_path):
    whole = tmp_path / "whole"
    assert train(manifest, whole, LONG, ranks=2).returncode == 0
    out, state = tmp_path / "out", tmp_path / "state"
    agent = start(manifest, out, state, ranks=2)  # the whole run dies ...
    wait_for_step(5, state, agent)
    ranks = children(agent.pid)
    assert len(ranks) == 2
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + 20
    while not all(map(gone, ranks)):  # ... and no rank goes on writing
        assert time.monotonic() < deadline
        time.sleep(0.01)

    at = steps_saved(state)
    agent = start(manifest, out, state, ranks=2, restarts=0)  # one rank dies
    wait_for_step(at + 5, state, agent)
    os.kill(children(agent.pid)[1], signal.SIGKILL)
    status, said = ended(agent)
    assert status == 1
    assert "a rank was killed by SIGKILL" in said
    assert "Traceback" not in said

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):  # a cluster asks it to stop
        at = steps_saved(state)
        agent = start(manifest, out, state, ranks=2)
        wait_for_step(at + 5, state, agent)
        agent.send_signal(number)
        status, said = ended(agent)
        assert status == 75
        assert said.splitlines()[-1].startswith("interrupted: train_model saved its state at step")

    assert ended(start(manifest, out, state, ranks=2))[0] == 0
    for name in ("weights.safetensors", "best.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.long
def test_killed_at_twenty_random_times_it_ends_bit_for_bit_undisturbed(manifest, tmp_path):
    """Also while it starts, loads, and writes a state: it saves as often as it can."""
    settings = changed(steps=300, validation_interval=40)
    whole, out, state = (tmp_path / name for name in ("whole", "out", "state"))
    begin = time.monotonic()
    assert train(manifest, whole, settings, ranks=1).returncode == 0
    whole_s = time.monotonic() - begin
    command = train_command(manifest, out, settings, {**EVERY_STEP, "ranks": 1}, state)
    draw = np.random.default_rng(20)
    reached = set()
    for kill in range(20):
        one = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        if kill % 4 == 0:  # at any time, starting up most likely
            time.sleep(draw.uniform(0.1, whole_s))
        else:  # some saved steps later, at any time of a step and of saving it
            wait_for_step(steps_saved(state) + int(draw.integers(1, 15)), state, one)
            time.sleep(draw.uniform(0, 0.2))
        assert one.poll() is None, "it ended before the kill"
        one.kill()
        _, said = one.communicate()
        reached.add(steps_saved(state))
        assert "damaged" not in said
    assert len(reached) > 10
    last = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert ended(last)[0] == 0
    for name in ("weights.safetensors", "best.safetensors", "optimizer.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    losses = [[line["loss"] for line in metrics(o, "train")] for o in (whole, out)]
    assert losses[0] == losses[1]


@linux
def test_a_rank_that_hangs_ends_the_run_and_shows_where_the_others_stand(manifest, tmp_path):
    state = tmp_path / "state"
    short = {"hang_timeout_s": 12, "stop_timeout_s": 2, "restarts": 0}
    agent = start(manifest, tmp_path / "out", state, ranks=2, **short)
    wait_for_step(5, state, agent)
    os.kill(children(agent.pid)[1], signal.SIGSTOP)
    status, said = ended(agent)
    assert status == 1
    assert "error: rank 0: no progress for" in said
    assert re.search(r'File ".*updates.py", line \d+ in ', said)
    assert said.rstrip().endswith("the same command resumes from the last saved state")


def test_a_mistake_found_by_the_ranks_is_said_once(manifest, tmp_path):
    diverging = changed(learning_rate=1e30, warmup_steps=0, gradient_clip=None)
    done = train(manifest, tmp_path / "out", diverging, ranks=2)
    assert done.returncode == 2
    assert done.stderr.count("training has diverged") == 1
    assert "Traceback" not in done.stderr


# ---- refused before the first step -------------------------------------------------------------


def refusal(capsys, manifest: Path, folder: Path, settings=SETTINGS, **execution) -> str:
    """What the stage says when it ends with the status of a user's mistake."""
    command = train_command(manifest, folder / "out", settings, execution, folder / "state")
    with pytest.raises(SystemExit) as ending:
        train_model.main(command[3:])
    assert ending.value.code == 2
    assert not list((folder / "state").glob("*"))
    return capsys.readouterr().err


def with_model(**model):
    return {**SETTINGS, "model": {**SETTINGS["model"], **model}}


@pytest.mark.parametrize(
    ("settings", "execution", "said"),
    [
        (
            with_model(context=4096),
            {},
            "training.batch_tokens = 64 is not a multiple of model.context = 4,096.\n"
            "  nearest that fit: 4,096 and 8,192",
        ),
        (
            {**with_model(context=4096), "training": {"batch_tokens": 4096}},
            {"ranks": 1},
            "model.context = 4,096 needs a training split of at least 4,097 tokens",
        ),
        (with_model(heads=3), {}, "model.channels = 16 is not a multiple of heads = 3"),
        (with_model(tie_embeddings=False), {}, "tie_embeddings = False means nothing"),
        (with_model(architecture="modern", bias=True), {}, "bias = True means nothing"),
        (changed(muon_momentum=0.9), {}, "muon_momentum = 0.9 means nothing"),
        (with_model(hedas=2), {}, "unknown setting model.hedas. Nearest valid name: heads."),
        (changed(precision="float8"), {}, "training.precision"),
        (SETTINGS, {"ranks": 5}, "execution.ranks = 5 does not divide the 8 rows"),
        (SETTINGS, {"ranks": 16}, "execution.ranks = 16 does not divide the 8 rows"),
        (SETTINGS, {"device": "tpu"}, "execution.device: Input should be 'auto', 'cpu', 'cuda'"),
        (SETTINGS, {"strategy": "zero3"}, "execution.strategy"),
        (
            SETTINGS,
            {"deterministic": True, "strategy": "fsdp"},
            "execution.deterministic goes with strategy ddp alone, not with fsdp",
        ),
        (SETTINGS, {"deterministic": True, "rows_per_rank": 3}, "does not divide the 8 rows"),
        (
            SETTINGS,
            {"deterministic": True, "rows_per_rank": 4, "ranks": 4},
            "execution.ranks = 4 does not divide the 2",
        ),
        (SETTINGS, {"ranks": 1, "attention": "flex"}, "training.document_masking on cuda"),
        (SETTINGS, {"ranks": 1, "rows_per_rank": 3}, "execution.rows_per_rank = 3"),
        (
            changed(precision="float16"),
            {"ranks": 1, "cross_entropy": "chunked"},
            "cross_entropy = chunked does not go with float16",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    manifest, tmp_path, capsys, settings, execution, said
):
    assert said in refusal(capsys, manifest, tmp_path, settings, **execution)


def test_cuda_asked_for_where_there_is_none_is_refused(manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "available: " in refusal(capsys, manifest, tmp_path, device="cuda")


def test_more_ranks_than_windows_are_refused(tmp_path, capsys):
    few = tokens(tmp_path / "few", n_train=30)
    said = refusal(capsys, few, tmp_path, ranks=4)
    assert "4 ranks would share 3 windows of 8 tokens" in said
    assert "set execution.ranks to at most 3" in said


def test_a_state_of_another_run_is_refused(manifest, tmp_path, capsys, monkeypatch):
    command = train_command(manifest, tmp_path / "out", SETTINGS, {}, tmp_path / "state")
    train_model.main(command[3:])
    other = changed(learning_rate=0.02)
    command = train_command(manifest, tmp_path / "out", other, {}, tmp_path / "state")
    # Before the network is made ready, which may take minutes.
    monkeypatch.setattr("snakegpt.trainer.Updates", None)
    with pytest.raises(SystemExit):
        train_model.main(command[3:])
    assert "of another run: training.learning_rate 0.01, here 0.02." in capsys.readouterr().err


def test_a_validation_split_without_a_target_is_refused(tmp_path, capsys):
    empty = tokens(tmp_path / "empty", n_val=1)
    assert "no token to predict" in refusal(capsys, empty, tmp_path)


def test_shards_that_are_not_the_manifests_are_refused(manifest, tmp_path, capsys):
    first = manifest.parent / "train_000000.bin"
    content = first.read_bytes()
    first.write_bytes(content[:-2])
    assert "train_000000.bin has" in refusal(capsys, manifest, tmp_path)
    shard(first, np.frombuffer(content[1024:], dtype="<u2"), "cd" * 32)
    said = refusal(capsys, manifest, tmp_path)
    assert "cd" * 32 in said and "ab" * 32 in said
    first.unlink()
    assert "train_000000.bin is missing" in refusal(capsys, manifest, tmp_path)
