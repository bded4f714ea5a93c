"""The plan's arithmetic, against published figures, real models and counting by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from snakegpt import plan_text, planning
from snakegpt.errors import UserError
from snakegpt.gpus import GPUS
from snakegpt.model import GPT, Shape
from snakegpt.optimizer import make_optimizers
from snakegpt.settings import Training

GPT2 = Shape(vocabulary=50_304, layers=12, heads=12, channels=768, context=1024)
XL = Shape(vocabulary=50_304, layers=48, heads=25, channels=1600, context=1024)
TINY = Shape(vocabulary=96, layers=2, heads=2, channels=16, context=8)
MODERN = replace(TINY, architecture="modern", bias=False, softcap=15.0)
ONE = planning.Placement(
    device="cpu", precision="float32", ranks=1, rows_per_rank=2, accumulation=3, threads=1, attention="sdpa"
)  # fmt: skip


def plan_of(shape=TINY, placement=ONE, **changes):
    facts = {
        "tokenizer_kind": "gpt2",
        "corpus_bytes": 4000,
        "validation_fraction": 0.05,
        "matmul_flops_per_s": 1e9,
    }
    facts |= {name: changes.pop(name) for name in list(changes) if name in (*facts, *EXTRAS)}
    recipe = {
        "batch_tokens": 48,
        "steps": 10,
        "warmup_steps": 2,
        "validation_interval": 5,
        "validation_tokens": 30,
    }
    plan = planning.plan(shape, placement, Training(**{**recipe, **changes}), **facts)
    return plan | {"free_disk_bytes": 10**9, "available_memory_bytes": 10**10}


EXTRAS = ("calibration", "prices", "keep_states")


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
    [optimizer] = make_optimizers(model, Training())
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()
    moments = [t for s in optimizer.state.values() for n, t in s.items() if n != "step"]
    assert memory["optimizer"] == sum(t.numel() * t.element_size() for t in moments)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "math"])
@pytest.mark.parametrize("shape", [TINY, MODERN])
def test_activations_are_about_what_the_backward_pass_keeps(shape, attention, precision):
    shape = replace(shape, channels=128, context=60, layers=6)
    model = GPT(shape, attention)
    weights = {p.data_ptr() for p in model.parameters()}
    cast = {p.numel() for p in model.parameters()}  # autocast's copies are counted elsewhere
    kept: dict[int, tuple[int, object]] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.numel() not in cast:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    ids = torch.randint(0, shape.vocabulary, (3, 60))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        loss = model(ids, ids)
    placement = replace(ONE, rows_per_rank=3, attention=attention, precision=precision)
    estimate = planning.memory_bytes(shape, placement)
    outside = 3 * 60 * (shape.vocabulary * 8 + shape.channels * 8)  # head, last norm, embeddings
    assert loss.shape == (3, 60)
    found = sum(size for size, _ in kept.values()) - outside
    assert estimate["activations"] == pytest.approx(found, rel=0.12)


def test_each_strategy_shares_out_what_it_says():
    parts = {
        strategy: planning.memory_bytes(XL, replace(ONE, ranks=8, strategy=strategy))
        for strategy in ("ddp", "zero1", "fsdp")
    }
    N = sum(p.numel() for p in GPT(TINY).parameters())
    assert planning.memory_bytes(TINY, ONE)["weights"] == 4 * N
    ddp, zero1, fsdp = parts.values()
    assert ddp["weights"] == zero1["weights"] == 8 * fsdp["weights"]
    assert ddp["gradients"] == zero1["gradients"] == 8 * fsdp["gradients"]
    assert ddp["optimizer"] == 8 * zero1["optimizer"] == 8 * fsdp["optimizer"]
    assert ddp["optimizer"] == 2 * ddp["weights"]
    assert ddp["gathered"] == 0 < fsdp["gathered"]
    assert ddp["total"] > zero1["total"] > fsdp["total"]


def test_muon_keeps_one_moment_of_the_matrices_inside_blocks():
    shape = replace(TINY, bias=False)
    model = GPT(shape)
    recipe = Training(optimizer="muon")
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    n_bytes = 0
    for optimizer in make_optimizers(model, recipe):
        optimizer.step()
        for state in optimizer.state.values():
            n_bytes += sum(t.numel() * 4 for name, t in state.items() if name != "step")
    assert planning.memory_bytes(shape, ONE, "muon")["optimizer"] == n_bytes


def test_gradients_that_come_as_activations_go_are_not_added_to_them():
    shape = replace(GPT2, layers=4)
    once = replace(ONE, accumulation=1, rows_per_rank=8)
    memory = planning.memory_bytes(shape, once)
    parts = {name: size for name, size in memory.items() if name != "total"}
    head = 4 * shape.vocabulary * shape.channels  # the first gradient, beside all activations
    assert memory["total"] == sum(parts.values()) - parts["gradients"] + head
    assert planning.memory_bytes(shape, replace(once, accumulation=2))["total"] == sum(
        parts.values()
    )


def test_activations_computed_twice_are_few_and_chunked_logits_are_bounded():
    many = replace(ONE, rows_per_rank=8, precision="bfloat16")
    plain = planning.memory_bytes(GPT2, many)
    twice = planning.memory_bytes(GPT2, replace(many, activation_checkpointing=True))
    assert twice["activations"] < plain["activations"] / 4
    chunked = planning.memory_bytes(GPT2, replace(many, loss="chunked"))
    assert plain["logits"] == 8 * 1024 * 50_304 * 10
    assert chunked["logits"] < 0.1 * plain["logits"]


# ---- elsewhere ----


def recipe(batch_tokens=524_288, **changes):
    return Training(batch_tokens=batch_tokens, **changes)


def test_the_published_models_fit_where_people_train_them():
    # llm.c and nanoGPT train 124M with ddp on GPUs of 24 GB and more, rows to spare.
    placement, need = planning.fitting(GPT2, recipe(), "bfloat16", 1, 24)
    assert placement.strategy == "ddp"
    assert placement.rows_per_rank >= 4
    assert need <= 24 * 2**30
    assert planning.verdict(GPT2, recipe()).startswith("fits with ddp on one")
    # 16 bytes a parameter and more: 1.5B cannot go onto 24 GB, nor eight of 16 GB in ddp.
    assert planning.fitting(XL, recipe(), "bfloat16", 1, 24) is None
    placement, _ = planning.fitting(XL, recipe(), "bfloat16", 8, 24)
    assert placement.strategy == "fsdp" or placement.strategy == "zero1"


def test_a_verdict_names_the_least_that_will_do():
    seven = replace(XL, layers=32, heads=32, channels=4096, context=2048)  # 6.9B
    # 6.9B: 16 bytes a parameter are 13.7 GB a rank on eight, and autocast's copy as much again.
    assert planning.verdict(seven, recipe()).startswith("does not fit below 8 x 40 GB: use fsdp")
    twenty = replace(seven, layers=48, channels=6144)  # billions
    verdict = planning.verdict(twenty, recipe())
    assert "x 80 GB: use fsdp on" in verdict
    assert "nodes" in verdict
    huge = replace(twenty, channels=65_536)
    assert "tensor or pipeline" in planning.verdict(huge, recipe())


def test_what_fits_less_memory_fits_more():
    sizes = [planning.fitting(XL, recipe(), "bfloat16", 8, gib) for gib in (16, 24, 40, 80)]
    rows = [found[0].rows_per_rank if found else 0 for found in sizes]
    twice = [found[0].activation_checkpointing if found else True for found in sizes]
    assert rows[-1] > 1
    assert twice == sorted(twice, reverse=True)


def test_gpus_have_times_by_their_peaks_and_costs_by_the_users_prices_alone():
    training = recipe(steps=19_073)
    rows = {
        (row["gpu"], row["gpus"]): row
        for row in planning.on_gpus(GPT2, training, {"A100 80GB": 2.0})
    }
    assert len(rows) == 2 * len(GPUS)
    one, eight = rows["A100 80GB", 1], rows["A100 80GB", 8]
    assert one["time_s"] == pytest.approx(8 * eight["time_s"])
    flops = plan_of(GPT2)["flops_per_token"] * 524_288 * 19_073
    assert one["time_s"] == pytest.approx(flops / (0.4 * 312e12))
    assert one["cost"] == pytest.approx(2.0 * one["time_s"] / 3600)
    assert eight["cost"] == pytest.approx(one["cost"])
    assert rows["H100", 1]["cost"] is None
    odd = recipe(batch_tokens=12 * 1024)
    assert "12 rows" in next(
        row["reason"] for row in planning.on_gpus(GPT2, odd, {}) if row["gpus"] == 8
    )


def test_costs_are_a_column_only_where_the_user_gave_prices():
    big = {"batch_tokens": 524_288, "steps": 19_073}
    plain = plan_text.gpu_table(plan_of(GPT2, **big))
    priced = plan_text.gpu_table(plan_of(GPT2, **big, prices={"L4": 0.8}))
    assert not any("cost" in line for line in plain)
    assert "cost" in priced[1]
    [line] = [line for line in priced if "1 x L4 " in line]
    assert float(line.split()[-1].replace(",", "")) > 0


# ---- the whole ----


def test_disk_is_the_sum_of_its_parts():
    plan = plan_of()
    parts = dict(plan["disk_bytes"])
    assert parts.pop("total") == sum(parts.values())
    N = plan["n_parameters"]
    # raw text, uint16 tokens at 4 bytes a token, two float32 weights, four states of four float32 copies
    assert plan["disk_bytes"] == {
        "corpus": 4000,
        "tokens": 2000,
        "weights": 8 * N,
        "states": 64 * N,
        "total": 6000 + 72 * N,
    }
    assert plan_of(keep_states=5)["disk_bytes"]["states"] == 7 * 16 * N


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


def test_a_calibration_wins_over_what_would_be_assumed():
    assumed = plan_of()["memory_bytes"]
    tried = {"step_s": 0.25, "steps": 17, "peak_memory_bytes": assumed["total"] + 123_000_000}
    plan = plan_of(calibration=tried)
    assert plan["memory_bytes"] == {
        **assumed,
        "allocator": 123_000_000,
        "total": tried["peak_memory_bytes"],
    }
    assert any("allocator 123MB" in line for line in plan_text.table(plan))
    less = plan_of(calibration={**tried, "peak_memory_bytes": 1})
    assert less["memory_bytes"] == assumed
    assert plan["rate_tokens_per_s_estimate"] == 48 / 0.25
    assert plan["time_estimate_s"] == 10 * 0.25
    assert plan["assumptions"]["efficiency"] is None
    assert any("17 steps measured" in line for line in plan_text.table(plan))


def test_the_learning_rate_is_drawn_as_it_will_be():
    plan = plan_of(steps=1000, warmup_steps=100, learning_rate=1e-3, min_learning_rate=1e-4)
    curve = dict(map(tuple, plan["learning_rates"]))
    assert curve[100] == max(curve.values()) == 1e-3
    assert curve[0] == pytest.approx(1e-3 / 101)
    line = plan_text.drawn(plan["learning_rates"], width=10)
    assert len(line) == 10
    assert (line[0], line[1]) == ("▁", "█")
    assert list(line[1:]) == sorted(line[1:], reverse=True)


def test_an_unlocked_corpus_leaves_unknown_what_depends_on_it():
    plan = plan_of(corpus_bytes=None)
    assert plan["corpus_tokens_estimate"] is None
    assert plan["epochs_estimate"] is None
    assert plan["disk_bytes"]["tokens"] is None
    assert any("unknown" in line and "locked" in line for line in plan_text.table(plan))


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
    assert not plan_text.warnings(plan | {"available_memory_bytes": 2 * total})
    found = plan_text.warnings(plan | {"available_memory_bytes": 2 * total - 1})
    assert len(found) == 1
    assert "rows_per_rank" in found[0]
    tight = plan["disk_bytes"]["total"] - 1
    assert any("free" in line for line in plan_text.warnings(plan | {"free_disk_bytes": tight}))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("corpus_bytes", [None, 5_057_198, 28_500_000_000])
def test_the_table_fits_eighty_columns_and_its_columns_align(ranks, corpus_bytes):
    big = plan_of(
        GPT2, replace(ONE, ranks=ranks, accumulation=256), batch_tokens=524_288, steps=19_073,
        corpus_bytes=corpus_bytes,
    )  # fmt: skip
    lines = plan_text.table(big)
    assert max(map(len, lines)) <= 80
    for line in lines[: next(i for i, line in enumerate(lines) if "verdict" in line)]:
        assert line[:2] == "  "
        assert line[16] == " "
        assert line[33] == " "
