"""The schedule by hand values, who decays, and AdamW against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from snakegpt.model import GPT, Shape
from snakegpt.optimizer import (
    Schedule,
    clip_gradients,
    make_optimizers,
    schedule_of,
    set_learning_rate,
)
from snakegpt.settings import Training

RECIPE = Training(learning_rate=0.1, weight_decay=0.5, beta1=0.9, beta2=0.95)


def schedule(kind: str, **changed) -> Schedule:
    sizes = {"floor": 0.1, "warmup_steps": 4, "decay_steps": 14, "cooldown_steps": 5}
    return Schedule(kind=kind, **{**sizes, **changed})


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        # Of the steps 0, 3, 4, 9, 14 and 100.
        ("cosine", [1 / 5, 4 / 5, 1.0, 0.55, 0.1, 0.1]),  # half-way: the mean of peak and floor
        ("linear", [1 / 5, 4 / 5, 1.0, 0.55, 0.1, 0.1]),
        ("warmup_stable_decay", [1 / 5, 4 / 5, 1.0, 1.0, 0.1, 0.1]),
    ],
)
def test_the_schedules_by_hand(kind, shares):
    made = schedule(kind)
    assert [made.at(step) for step in (0, 3, 4, 9, 14, 100)] == pytest.approx(shares)


def test_between_their_ends_the_schedules_differ():
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert schedule("cosine", warmup_steps=0, decay_steps=40).at(10) == pytest.approx(quarter)
    assert schedule("linear", warmup_steps=0, decay_steps=40).at(10) == pytest.approx(0.775)
    late = schedule("warmup_stable_decay", warmup_steps=0, decay_steps=40, cooldown_steps=10)
    assert [late.at(30), late.at(32)] == pytest.approx([1.0, 0.1 + 0.9 * 0.8])


def test_a_cooldown_longer_than_what_follows_the_warm_up_begins_after_it():
    assert schedule("warmup_stable_decay", cooldown_steps=14).at(9) == pytest.approx(0.55)


def test_no_warm_up_starts_at_the_peak():
    assert schedule("cosine", warmup_steps=0).at(0) == 1.0


def test_settings_make_the_schedule():
    made = schedule_of(Training(steps=80, schedule="warmup_stable_decay", min_learning_rate=6e-5))
    assert (made.floor, made.decay_steps, made.cooldown_steps) == (pytest.approx(0.1), 80, 40)
    assert schedule_of(Training(steps=80, decay_steps=70)).decay_steps == 70


def test_matrices_decay_and_biases_and_norms_do_not():
    model = GPT(Shape(vocabulary=8, layers=1, heads=1, channels=4, context=4))
    [adamw] = make_optimizers(model, RECIPE)
    decaying, others = adamw.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in others["params"])
    assert all(
        names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decaying["params"]
    )
    assert len(decaying["params"]) + len(others["params"]) == len(names)


def test_one_step_is_adamw_by_hand():
    layer = torch.nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(3.0)
    optimizers = make_optimizers(layer, RECIPE)
    set_learning_rate(optimizers, 0.5)
    layer.weight.grad, layer.bias.grad = torch.tensor([[4.0]]), torch.tensor([-1.0])
    optimizers[0].step()
    # The first step moves by the learning rate times the gradient's sign; decay first shrinks by lr x wd.
    assert float(layer.weight.detach()) == pytest.approx(2.0 * (1 - 0.05 * 0.5) - 0.05, abs=1e-6)
    assert float(layer.bias.detach()) == pytest.approx(3.0 + 0.05, abs=1e-6)


def test_clipping_scales_to_the_limit_and_tells_the_norm_before():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients([weight], None)) == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]
    assert float(clip_gradients([weight], 1.0)) == 5.0
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
