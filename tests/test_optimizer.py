"""The schedule by hand values, who decays, and AdamW against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from snakegpt.model import GPT, Shape
from snakegpt.optimizer import (
    Schedule,
    clip_gradients,
    make_adamw,
    parameter_groups,
    set_learning_rate,
)

SCHEDULE = Schedule(peak=1.0, minimum=0.1, warmup_steps=4, decay_steps=14)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1 / 5),
        (3, 4 / 5),
        (4, 1.0),
        (9, 0.55),  # half-way: the mean of peak and minimum
        (14, 0.1),
        (100, 0.1),
    ],
)
def test_the_schedule_by_hand(step, rate):
    assert SCHEDULE.at(step) == pytest.approx(rate)


def test_the_decay_is_a_cosine():
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert Schedule(1.0, 0.1, 0, 40).at(10) == pytest.approx(quarter)


def test_no_warm_up_starts_at_the_peak():
    assert Schedule(1.0, 0.0, 0, 10).at(0) == 1.0


def test_matrices_decay_and_biases_and_norms_do_not():
    model = GPT(Shape(vocabulary=8, layers=1, heads=1, channels=4, context=4))
    decaying, others = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
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
    optimizer = make_adamw(layer, weight_decay=0.5, beta1=0.9, beta2=0.95)
    set_learning_rate(optimizer, 0.1)
    layer.weight.grad, layer.bias.grad = torch.tensor([[4.0]]), torch.tensor([-1.0])
    optimizer.step()
    # The first step moves by the learning rate times the gradient's sign; decay first shrinks by lr x wd.
    assert float(layer.weight.detach()) == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-6)
    assert float(layer.bias.detach()) == pytest.approx(3.0 + 0.1, abs=1e-6)


def test_clipping_scales_to_the_limit_and_tells_the_norm_before():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients([weight], None)) == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]
    assert float(clip_gradients([weight], 1.0)) == 5.0
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
