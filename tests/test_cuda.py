"""On a GPU, where there is one: kernels against each other, and training as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest
import torch
from ranks_at_work import trainer
from safetensors.torch import load_file
from snakegpt import losses
from snakegpt.losses import mean_loss, mean_loss_of_compiled
from snakegpt.model import GPT, Shape, initialise
from snakegpt.stages import evaluate_model, sample_text
from train_fixtures import ENVIRONMENT, changed, metrics, tokenizer, tokens, train, train_command

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

SHAPE = Shape(vocabulary=128, layers=2, heads=2, channels=128, context=256, bias=False)
MODERN = replace(SHAPE, architecture="modern", softcap=15.0)
GPU = {"device": "cuda"}


@pytest.fixture
def manifest(tmp_path):
    return tokens(tmp_path / "tokens")


# ---- kernels ----


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_chunks_have_the_gradients_of_the_plain_loss(softcap, compiled, monkeypatch):
    monkeypatch.setattr(losses, "GPU_CHUNK_LOGITS", 1000 * 300)
    torch.manual_seed(0)
    x = torch.randn(1024, 64, device="cuda", requires_grad=True)
    head = torch.randn(1000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(1000, (1024,), device="cuda")
    found = {}
    for kernel in ("plain", "chunked"):
        function = mean_loss_of_compiled(kernel) if compiled else mean_loss
        with torch.autocast("cuda", torch.bfloat16):
            loss = function(x * 1.0, head, targets, softcap, kernel)
        found[kernel] = loss, *torch.autograd.grad(loss, [x, head])
    for one, other in zip(found["plain"], found["chunked"], strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-2


@pytest.mark.parametrize("shape", [SHAPE, MODERN])
@pytest.mark.parametrize("kernel", ["sdpa", "math"])
def test_attention_kernels_agree_with_float32_on_the_cpu(shape, kernel):
    ids = torch.randint(128, (3, 256))
    expected = initialise(GPT(shape, "math"), 0)(ids, ids, reduction="mean")
    model = initialise(GPT(shape, kernel), 0).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(ids.cuda(), ids.cuda(), reduction="mean")
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_flex_sees_what_a_mask_written_out_allows():
    ids = torch.randint(128, (3, 256), device="cuda")
    documents = torch.arange(256, device="cuda").expand(3, -1) // 50
    found = []
    for kernel in ("math", "flex"):
        model = initialise(GPT(SHAPE, kernel), 0).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            found.append(model(ids, ids, documents_BT=documents))
    torch.testing.assert_close(*found, atol=2e-2, rtol=2e-2)


# ---- training ----


def test_training_on_a_gpu_learns_and_says_how_it_ran(manifest, tmp_path):
    done = train(manifest, tmp_path / "out", changed(precision="auto", steps=40), **GPU)
    assert done.returncode == 0, done.stderr
    [start] = metrics(tmp_path / "out", "start")
    assert start["device"] == torch.cuda.get_device_name()
    assert start["precision"] == "bfloat16" and start["compiled"]
    steps = metrics(tmp_path / "out", "train")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    [counters] = metrics(tmp_path / "out", "counters")[-1:]
    assert counters["gpus"][0]["memory_bytes"] > 0 and counters["gpus"][0]["power_w"] > 0
    [parts] = metrics(tmp_path / "out", "parts")
    assert parts["forward_s"] > 0 and parts["backward_s"] > 0


@pytest.mark.parametrize(
    "training",
    [
        {"precision": "float16"},
        {"precision": "float32"},
        {"optimizer": "muon", "muon_learning_rate": 0.02, "muon_momentum": 0.95},
        {"document_masking": True, "precision": "bfloat16"},
    ],
    ids=["float16", "float32", "muon", "document_masking"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_every_recipe_trains(manifest, tmp_path, training, compiled):
    settings = changed(steps=20, **training)
    settings["model"] = {**settings["model"], "channels": 64}  # flex wants heads of 16 at least
    done = train(manifest, tmp_path / "out", settings, compiled=compiled, **GPU)
    assert done.returncode == 0, done.stderr
    assert "does not compile" not in done.stderr
    steps = metrics(tmp_path / "out", "train")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1


def test_a_killed_run_goes_on_to_the_bits_of_an_undisturbed_one(manifest, tmp_path):
    settings = changed(steps=600, validation_interval=300)
    how = {**GPU, "deterministic": True, "save_interval_s": 1.0, "compiled": False}
    done = train(manifest, tmp_path / "a", settings, **how)
    assert done.returncode == 0, done.stderr
    command = train_command(manifest, tmp_path / "b", settings, how, tmp_path / "b.state")
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "b.state").glob("state_*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = train(manifest, tmp_path / "b", settings, **how)
    assert again.returncode == 0 and "resumes at step" in again.stderr
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_micro_batch_is_found_and_made_smaller_where_memory_ends(
    manifest, tmp_path, monkeypatch, capsys
):
    """A GPU that other work fills up to some bytes."""
    shape = Shape(vocabulary=50_304, layers=2, heads=2, channels=256, context=8, bias=False)
    launch = {"device": "cuda", "dtype": torch.bfloat16, "loss": "plain", "probed": True}
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(0.9e9 / total)
    try:
        one = trainer(
            tmp_path / "state",
            manifest,
            shape=shape,
            launch={**launch, "micro_rows": 1024},
            batch_tokens=8 * 1024,
            steps=3,
        )
        assert 1 <= one.updates.micro_rows < 1024
        (tmp_path / "out").mkdir()
        one.run(tmp_path / "out")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (tmp_path / "out" / "weights.safetensors").exists()


def test_a_model_is_evaluated_and_sampled_on_a_gpu(tmp_path):
    spelling, out = tokenizer(tmp_path), tmp_path / "out"
    fingerprint = json.loads(spelling.read_text())["fingerprint"]
    manifest = tokens(tmp_path / "tokens", fingerprint=fingerprint)
    done = train(manifest, out, changed(steps=40), **GPU)
    assert done.returncode == 0, done.stderr
    model = ["--weights", str(out / "weights.safetensors"), "--config", str(out / "config.json")]
    common = [*model, "--tokenizer", str(spelling), "--out", str(out)]
    how = ["--execution", json.dumps({"device": "cuda", "threads": 1})]
    best = ["--best", str(out / "best.safetensors"), "--tokens", str(manifest)]
    evaluate_model.main([*common, *best, *how, "--settings", "{}"])
    evaluation = json.loads((out / "evaluation.json").read_text())
    [validation] = metrics(out, "validation")[-1:]
    assert evaluation["weights"]["loss"] == pytest.approx(validation["loss"], rel=1e-3)
    sampling = {"sampling": {"prompts": ["abc"], "max_tokens": 20}}
    sample_text.main([*common, *how, "--settings", json.dumps(sampling)])
    assert (out / "samples.jsonl").read_text().count("\n") > 0
