"""The plan's arithmetic, against published figures, a real model and counting by hand."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from snakegpt import planning
from snakegpt.errors import UserError
from snakegpt.model import GPT, Shape

GPT2 = Shape(vocabulary=50_304, layers=12, heads=12, channels=768, context=1024)
TINY = Shape(vocabulary=96, layers=2, heads=2, channels=16, context=8)
ONE = planning.Placement(
    device="cpu", precision="float32", ranks=1, rows_per_rank=2, accumulation=3, threads=1, attention="sdpa"
)  # fmt: skip


def plan_of(shape=TINY, placement=ONE, **changes):
    arguments = {
        "batch_tokens": 48,
        "steps": 10,
        "validation_interval": 5,
        "validation_tokens": 30,
        "tokenizer_kind": "gpt2",
        "corpus_bytes": 4000,
        "validation_fraction": 0.05,
        "matmul_flops_per_s": 1e9,
    } | changes
    plan = planning.plan(shape, placement, **arguments)
    return plan | {"free_disk_bytes": 10**9, "available_memory_bytes": 10**10}


def test_gpt2_124m_is_the_published_model():
    plan = plan_of(GPT2, batch_tokens=524_288, steps=19_073)
    # 124,439,808 parameters (transformers' gpt2) and 47 padded rows of the embedding
    assert plan["n_parameters"] == 124_439_808 + 47 * 768
    # nanoGPT prints "number of parameters: 123.59M" for the same without biases; positions left out
    without = plan_of(replace(GPT2, bias=False))
    assert without["n_parameters"] - 1024 * 768 == pytest.approx(123.59e6, abs=5e3)
    attention = 12 * 12 * 12 * 64 * 1024  # 12 L H Q T
    assert without["flops_per_token"] == 6 * (without["n_parameters"] - 1024 * 768) + attention
    assert plan["tokens"] == 524_288 * 19_073


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_and_their_memory_are_those_of_the_real_model(bias):
    shape = replace(TINY, bias=bias)
    model = GPT(shape)
    count = sum(p.numel() for p in model.parameters())
    plan = plan_of(shape)
    assert plan["n_parameters"] == count
    embeddings = model.token_embedding.weight.numel() + model.position_embedding.weight.numel()
    assert plan["n_parameters_without_embedding"] == count - embeddings
    memory = plan["memory_bytes"]
    assert memory["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()
    moments = [t for s in optimizer.state.values() for n, t in s.items() if n != "step"]
    assert memory["optimizer"] == sum(t.numel() * t.element_size() for t in moments)


@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_activations_are_about_what_the_backward_pass_keeps(attention):
    shape = replace(TINY, channels=64, context=64, layers=3)
    model = GPT(shape, attention)
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.dtype == torch.float32:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, shape.vocabulary, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, ids)
    estimate = planning.memory_bytes(shape, replace(ONE, attention=attention))
    logits = 2 * 64 * shape.vocabulary * 4
    assert loss.shape == (2, 64)
    assert estimate["activations"] == pytest.approx(sum(kept.values()) - logits, rel=0.25)


def test_the_total_is_the_sum_of_its_parts():
    plan = plan_of()
    for name in ("memory_bytes", "disk_bytes"):
        parts = dict(plan[name])
        assert parts.pop("total") == sum(parts.values())
    N = plan["n_parameters"]
    # raw text, uint16 tokens at 4 bytes a token, two float32 weights, three states of four float32 copies
    assert plan["disk_bytes"] == {
        "corpus": 4000,
        "tokens": 2000,
        "weights": 8 * N,
        "states": 48 * N,
        "total": 6000 + 56 * N,
    }


@pytest.mark.parametrize(
    ("vocabulary", "kind", "tokens"),  # 4,000 bytes of text
    [(65_536, "char", 8000), (65_600, "char", 16_000), (257, "byte", 8000), (257, "gpt2", 2000)],
)
def test_tokens_take_four_bytes_above_65_536_ids(vocabulary, kind, tokens):
    plan = plan_of(replace(TINY, vocabulary=vocabulary), tokenizer_kind=kind)
    assert plan["disk_bytes"]["tokens"] == tokens


def test_time_follows_from_arithmetic_and_speed():
    plan = plan_of()
    flops = plan["flops_per_token"]
    assert plan["total_flops"] == flops * 480
    assert plan["rate_tokens_per_s_estimate"] == pytest.approx(0.6e9 / flops)
    assert plan["time_estimate_s"] == pytest.approx(480 * flops / 0.6e9)
    # two validations of 30 tokens, a third of the arithmetic
    assert plan["validation_time_estimate_s"] == pytest.approx(60 * flops / 3 / 0.6e9)
    # 4,000 bytes are 1,000 tokens; a twentieth is fewer than the 60 asked for
    assert plan_of(validation_tokens=60)["validation_time_estimate_s"] == pytest.approx(
        100 * flops / 3 / 0.6e9
    )
    assert plan["epochs_estimate"] == pytest.approx(0.48)


def test_an_unlocked_corpus_leaves_unknown_what_depends_on_it():
    plan = plan_of(corpus_bytes=None)
    assert plan["corpus_tokens_estimate"] is None
    assert plan["epochs_estimate"] is None
    assert plan["disk_bytes"]["tokens"] is None
    assert any("unknown" in line and "locked" in line for line in planning.table(plan))


def test_a_disk_that_cannot_hold_the_run_is_refused_with_both_sizes():
    disk = {
        "corpus": 100,
        "tokens": 50,
        "weights": 2_000_000,
        "states": 6_000_000,
        "total": 8_000_150,
    }
    with pytest.raises(UserError, match=r"about 8MB.*has 7.9MB free"):
        planning.refuse_what_cannot_fit(disk, 7_900_000, 10**9, "this disk")
    with pytest.raises(UserError, match="in all"):
        planning.refuse_what_cannot_fit(disk, 8_000_000, 8_000_100, "this disk")
    planning.refuse_what_cannot_fit(disk, 8_000_000, 10**9, "this disk")


def test_ranks_on_one_cpu_share_its_memory_and_a_tight_one_is_warned_of():
    plan = plan_of(placement=replace(ONE, ranks=2))
    total = plan["memory_bytes"]["total"]
    assert not planning.warnings(plan | {"available_memory_bytes": 2 * total})
    found = planning.warnings(plan | {"available_memory_bytes": 2 * total - 1})
    assert len(found) == 1
    assert "rows_per_rank" in found[0]
    tight = plan["disk_bytes"]["total"] - 1
    assert any("free" in line for line in planning.warnings(plan | {"free_disk_bytes": tight}))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("corpus_bytes", [None, 5_057_198, 28_500_000_000])
def test_the_table_fits_eighty_columns_and_its_columns_align(ranks, corpus_bytes):
    big = plan_of(
        GPT2, replace(ONE, ranks=ranks, accumulation=256), batch_tokens=524_288, steps=19_073,
        corpus_bytes=corpus_bytes,
    )  # fmt: skip
    lines = planning.table(big)
    assert max(map(len, lines)) <= 80
    for line in lines:
        assert line[:2] == "  "
        assert line[16] == " "
        assert line[33] == " "


def test_measuring_takes_about_the_time_it_is_given_and_gives_a_rate():
    torch.set_num_threads(1)
    started = time.perf_counter()
    rate = planning.measure_matmul("cpu", "float32", limit_s=0.1)
    assert time.perf_counter() - started < 3
    a = torch.randn(1024, 1024)
    started = time.perf_counter()
    a @ a
    once = 2 * 1024**3 / (time.perf_counter() - started)
    assert once / 10 < rate < once * 10
